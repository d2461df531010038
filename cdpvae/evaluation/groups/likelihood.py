"""The group `likelihood`: what a held-out text costs under the model, and without z.

Legend: N rows, K draws of a row.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from cdpvae.config.text_vae import DecoderReads
from cdpvae.evaluation.baselines import HOW_TO_TRAIN, NAMES, Baselines, rivals_of
from cdpvae.evaluation.checkpoint import OpenedRun, RowSelection
from cdpvae.evaluation.encoded import EncodedRows, encode_rows
from cdpvae.evaluation.estimates import mean_figure, ratio_figure
from cdpvae.evaluation.figures import Figure, FigureGroup
from cdpvae.evaluation.groups.use import other_rows
from cdpvae.evaluation.likelihood import EVALUATION_EPOCH
from cdpvae.latents import KeyedNoise
from cdpvae.latents.importance import effective_samples, log_weights, running_log_mean
from cdpvae_kernels import Stream

NATS = "nats per sequence"
# Importance weights must not use again the draw that -ELBO is made of.
WEIGHTS_EPOCH = EVALUATION_EPOCH + 1
WORTH = "what the instruction is worth"
NO_LATENT = "the model has no latent: its NLL is exact, and there is no ELBO, KL or IW-NLL"


@dataclass(frozen=True)
class TextCounts:
    """How much text each of N rows is, fp64.

    tokens: targets of the decoder, the end of the text among them.
    words: separated by white space, and one for the end of the text.
    size: bytes of the decoded text in UTF-8.
    """

    tokens: Tensor
    words: Tensor
    size: Tensor

    @classmethod
    def of(cls, encoded: EncodedRows, decode: Callable[[list[int]], str]) -> TextCounts:
        """Count the rows' responses. decode: turns token ids into text without special ids."""
        # The end of a text is a target like any other, and so it is counted as a word.
        texts = [decode(ids) for ids in encoded.responses]
        counts = (
            [len(ids) - 1 for ids in encoded.responses],
            [len(text.split()) + 1 for text in texts],
            [len(text.encode()) for text in texts],
        )
        return cls(*(torch.tensor(count, dtype=torch.float64) for count in counts))

    def select(self, indices: Tensor) -> TextCounts:
        """Return the counts of the rows at `indices`."""
        return TextCounts(self.tokens[indices], self.words[indices], self.size[indices])

    def figures(self) -> list[Figure]:
        """Return the sums that all perplexities divide by."""
        counted = {
            "target tokens": (self.tokens, "tokens", "end of each text included"),
            "words": (self.words, "words", "separated by white space, and one for each end"),
            "bytes": (self.size, "bytes", "UTF-8 of the decoded text, without special tokens"),
        }
        return [
            Figure(
                name=name,
                value=float(count.sum()),
                unit=unit,
                estimator="counted",
                rows=len(count),
                note=note,
            )
            for name, (count, unit, note) in counted.items()
        ]

    def rates(self, of: str, nats: Tensor, note: str = "") -> list[Figure]:
        """Return bits per byte and perplexity per token and word of nats (N,), named after `of`."""
        # A byte is the one unit that no tokenizer changes.
        figures = [
            ratio_figure(
                f"bits per byte, {of}",
                nats / math.log(2),
                self.size,
                "bits per byte",
                f"sum of {of} over {int(self.size.sum())} bytes",
                note=note,
            )
        ]
        # Perplexities, per unit of text.
        for unit, counts in (("token", self.tokens), ("word", self.words)):
            ratio = ratio_figure("", nats, counts, "", "", note=note)
            # No float holds more than exp(709).
            value = math.exp(min(ratio.value, 700.0))
            # To first order, the error of an exponential is the error times the value.
            error = None if ratio.standard_error is None else value * ratio.standard_error
            figures.append(
                dataclasses.replace(
                    ratio,
                    name=f"PPL per {unit}, {of}",
                    value=value,
                    unit=f"perplexity per {unit}",
                    estimator=f"exp of the sum of {of} over {int(counts.sum())} {unit}s",
                    standard_error=error,
                )
            )
        return figures


def measure_likelihood(
    opened: OpenedRun,
    rows: RowSelection,
    *,
    baselines: Baselines,
    seed: int,
    iw_rows: int | None,
    iw_samples: int,
    progress: Callable[[str], None],
    encoded: EncodedRows | None = None,
) -> FigureGroup:
    """Measure how likely held-out texts are, in nats, bits per byte and perplexities.

    opened: the run.
    rows: of which -ELBO and NLL are measured.
    baselines: runs without a latent, measured on the same rows.
    seed: of every draw, and of the rows that are chosen for IW-NLL.
    iw_rows: rows of IW-NLL, chosen at random; None for all.
    iw_samples: K.
    progress: told a line as work goes on.
    encoded: the same rows with the same seed, where they are encoded already.

    A model without a latent has an NLL alone. Raises ValueError for an empty split, other data than
    the tokenizer's, and for iw_rows or iw_samples below 1.
    """
    _check(iw_rows, iw_samples)
    encoded = encoded or encode_rows(opened, rows, seed=seed, progress=progress)
    counts = TextCounts.of(encoded, opened.tokenizer.decode)
    figures, series, notes = counts.figures(), {}, []
    # What the model itself says of every row.
    progress(f"likelihood of {encoded.num_rows} rows")
    nll = encoded.own_nll
    total, title, chosen, weighted = nll, "NLL", None, None
    if encoded.model.latent.reads_text:
        kl = encoded.kl()
        title = "NLL from z ~ q" if kl is None else "-ELBO"
        total = nll if kl is None else nll + kl
        figures += _bound_figures(encoded, nll, kl)
        # IW-NLL on some of them, next to -ELBO of the same.
        chosen = encoded.choose(iw_rows, seed=seed)
        weights = row_log_weights(
            encoded.select(chosen), seed=seed, samples=iw_samples, progress=progress
        )
        if weights is None:
            notes.append("IW-NLL is left out: the latent family has no density log q(z|x)")
        else:
            running = -running_log_mean(weights)
            weighted = running[:, -1]
            figures += _weighted_figures(weights, total[chosen])
            figures += counts.select(chosen).rates("IW-NLL", weighted)
            # How far the estimate still falls says whether k is large enough.
            steps = _steps(iw_samples)
            series["IW-NLL by samples: samples"] = [float(k) for k in steps]
            series["IW-NLL by samples"] = [float(running[:, k - 1].mean()) for k in steps]
    else:
        figures.append(mean_figure("NLL", nll, NATS, "exact"))
        notes.append(NO_LATENT)
    bound = "an upper bound" if title == "-ELBO" else ""
    figures += counts.rates(title, total, bound)
    # The same rows without z, by decoders that read all else that this one reads.
    progress("likelihood without z")
    reads = encoded.model.config.decoder_reads
    kinds = [kind for kind in NAMES if kind == reads or baselines.that_reads(kind) is not None]
    rivals = {kind: rivals_of(kind, opened, baselines, rows, encoded) for kind in kinds}
    if baselines.that_reads(reads) is None:
        notes.append(f"no baseline: train one with {HOW_TO_TRAIN[reads]} to judge these figures")
    figures += [
        mean_figure(name, value, NATS, "exact")
        for kind in kinds
        for name, value in rivals[kind].items()
    ]
    best, without = _better(rivals[reads])
    figures += counts.rates("NLL without z", without, f"{best}, the better one")
    pairs = {title: total - without}
    if weighted is not None:
        pairs["IW-NLL"] = weighted - without[chosen]
    figures += [
        mean_figure(
            f"{what} minus NLL without z",
            gap,
            NATS,
            "paired by row",
            note=f"without z: {best}; below 0: z helps",
        )
        for what, gap in pairs.items()
    ]
    # What a whole instruction is worth to a decoder, and how much of that z is.
    if baselines.nothing is not None and baselines.instruction is not None:
        figures += _worth_figures(encoded, rivals, nll, seed)
    elif baselines.instruction is not None:
        notes.append(f"{WORTH} needs a second baseline, {HOW_TO_TRAIN['nothing']}")
    return FigureGroup(name="likelihood", figures=figures, series=series, notes=notes)


def _better(rivals: Mapping[str, Tensor]) -> tuple[str, Tensor]:
    """Return whose NLL is lower on average, and that NLL: a weak baseline would flatter z."""
    best = min(rivals, key=lambda name: float(rivals[name].mean()))
    return best.removeprefix("NLL of "), rivals[best]


def _worth_figures(
    encoded: EncodedRows,
    rivals: Mapping[DecoderReads, Mapping[str, Tensor]],
    nll: Tensor,
    seed: int,
) -> list[Figure]:
    """Return what reading the instruction saves a decoder without z, and the share that z is of it.

    encoded: the rows.
    rivals: NLL without z by what is read, both kinds.
    nll (N,): from z ~ q.
    seed: of the other rows that z is taken from, as in the group `use`.
    """
    best, without = _better(rivals["nothing"])
    worth = without - rivals["instruction"][NAMES["instruction"][1]]
    figures = [mean_figure(WORTH, worth, NATS, "paired by row", note=f"without z: {best}")]
    # A decoder that reads the instruction needs z for other things.
    config = encoded.model.config
    uses_z = encoded.model.latent.reads_text and not config.reads_instruction
    if uses_z and encoded.num_rows > 1 and float(worth.sum()) > 0:
        donor = other_rows(encoded.num_rows, seed=seed)
        figures.append(
            ratio_figure(
                f"cost of z shuffled as a share of {WORTH}",
                encoded.nll(encoded.z[donor]) - nll,
                worth,
                "share",
                "sum of costs over sum of worth, the same rows",
                note="1: z is worth to the decoder what the text that it encodes is",
            )
        )
    return figures


def row_log_weights(
    encoded: EncodedRows, *, seed: int, samples: int, progress: Callable[[str], None]
) -> Tensor | None:
    """Return the log importance weights of every row -> (N, K) fp64; None without a density.

    encoded: the rows; their codes are not computed again.
    seed: of the draws.
    samples: K.
    progress: told a line for every tenth of the rows.
    """
    # Weights are ratios of densities; not every family has them.
    latent = encoded.model.latent
    if latent.log_q(encoded.z[:1], encoded.code.rows(0, 1)) is None:
        return None
    # Row by row: copies of one row have one length, so that packing them wastes nothing.
    every, weights = max(1, encoded.num_rows // 10), []
    for row in range(encoded.num_rows):
        if row % every == 0:
            progress(f"IW-NLL: row {row} of {encoded.num_rows}, {samples} draws each")
        index = encoded.sample_index[row : row + 1]

        def nll(z: Tensor, row: int = row) -> Tensor:
            return encoded.nll_of_draws(row, z)

        weights.append(
            log_weights(
                latent,
                encoded.code.rows(row, row + 1),
                nll,
                noise=KeyedNoise(seed, Stream.NOISE, index, WEIGHTS_EPOCH),
                samples=samples,
            )
        )
    return torch.stack(weights)


def _bound_figures(encoded: EncodedRows, nll: Tensor, kl: Tensor | None) -> list[Figure]:
    """Return -ELBO, the two NLLs and the KL of every row; nll (N,) is that from z ~ q."""
    # Without noise: what the decoder makes of the single best z.
    mean = encoded.nll(encoded.model.latent.mean(encoded.code))
    figures = [
        mean_figure("NLL from z ~ q", nll, NATS, "one draw a row"),
        mean_figure("NLL from mu", mean, NATS, "no draw", note="no bound on -log p(x)"),
    ]
    if kl is None:
        return figures
    bound = mean_figure("-ELBO", nll + kl, NATS, "one draw a row, KL in closed form")
    return [bound, *figures, mean_figure("KL", kl, NATS, "closed form")]


def _weighted_figures(weights: Tensor, bound: Tensor) -> list[Figure]:
    """Return IW-NLL of weights (N, K), beside the bound (N,) of the same rows."""
    # The bound is measured on the same rows, so that the gap is not one between rows.
    samples = weights.shape[1]
    value = -running_log_mean(weights)[:, -1]
    how = f"importance weighted, k = {samples} (Burda et al. 2016)"
    return [
        mean_figure(
            "IW-NLL", value, NATS, how, note="an upper bound in expectation, tighter as k grows"
        ),
        mean_figure("-ELBO on the rows of IW-NLL", bound, NATS, "one draw a row"),
        mean_figure("-ELBO minus IW-NLL", bound - value, NATS, "paired by row"),
        mean_figure(
            "effective samples of IW-NLL",
            effective_samples(weights),
            "draws",
            "(sum w)^2 / sum w^2",
            cap=float(samples),
            note="near 1, one draw decides and IW-NLL lies far above -log p(x): raise k",
        ),
    ]


def _steps(samples: int) -> list[int]:
    """Return 1, 2, 5, 10, ... below the number of samples, and that number itself."""
    ladder = [digit * 10**power for power in range(7) for digit in (1, 2, 5)]
    return [step for step in ladder if step < samples] + [samples]


def _check(iw_rows: int | None, iw_samples: int) -> None:
    """Raise ValueError for what cannot be measured."""
    # Before anything is computed.
    if iw_samples < 1 or (iw_rows is not None and iw_rows < 1):
        raise ValueError(
            f"iw_rows={iw_rows} and iw_samples={iw_samples} must be at least 1; IW-NLL is a mean"
        )
