"""What the model writes from the prior, beside real texts of the same number.

Texts are drawn at temperature 1 and top-p 1: anything else measures the sampling, not the model.
"""

from __future__ import annotations

import importlib
import importlib.util
import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import replace
from statistics import fmean

import torch
from torch import Tensor
from torch.nn import functional as F

from cdpvae.batch import PackedText
from cdpvae.evaluation.checkpoint import OpenedRun, RowSelection
from cdpvae.evaluation.figures import Figure, FigureGroup
from cdpvae.evaluation.groups.reverse_perplexity import reverse_perplexity
from cdpvae.evaluation.scorer import TextScorer
from cdpvae.evaluation.statistics import mean_and_error
from cdpvae.latents import GeneratorNoise
from cdpvae.metrics import distinct, seen_shares, self_bleu

ORDERS = (1, 2, 3, 4)
SEEN_ORDER = 4
SHOWN = 20


def measure_samples(
    opened: OpenedRun,
    rows: RowSelection,
    *,
    scorer: TextScorer,
    training_texts: Iterable[str],
    features: Callable[[], TextScorer],
    reverse_texts: int,
    seed: int,
    num_texts: int,
    max_length: int,
    progress: Callable[[str], None],
) -> FigureGroup:
    """Draw texts from the prior and measure them beside real ones.

    opened: the run.
    rows: real texts, the first `num_texts` of them.
    scorer: the language model that judges.
    training_texts: what the model was trained to write, as far as it is compared.
    features: opens the language model whose states are MAUVE's features.
    reverse_texts: samples that the model of the reverse perplexity learns from; 0 for none.
    seed: of prior draws and sampling.
    num_texts: how many to draw.
    max_length: tokens per text.
    progress: told what is under way.

    Raises ValueError for fewer than two texts.
    """
    if num_texts < 2:
        raise ValueError(f"--num-texts {num_texts}: at least 2, as texts are compared")
    # A decoder that reads the instruction gets those of the real texts.
    batches = opened.rows(replace(rows, limit=num_texts))
    real = [response for batch in batches for _, response in opened.texts(batch)]
    reads, instructions = opened.model.config.reads_instruction, None
    if reads:
        instructions = [ids.tolist() for batch in batches for ids in batch.instruction.rows()]
        num_texts = len(instructions)
    # Draw twice from every z: whether both texts agree says what z decides.
    progress(f"drawing {num_texts} texts from the prior, twice")
    generator = torch.Generator(device=opened.model.device).manual_seed(seed)
    z = _prior(opened, num_texts, generator)

    def draw(z: Tensor) -> list[str]:
        size = rows.rows_per_batch
        return write(opened, z, size, max_length, instructions=instructions, generator=generator)

    started = time.perf_counter()
    first, again = draw(z), draw(z)
    seconds_a_text = (time.perf_counter() - started) / (2 * num_texts)
    # Score both kinds of text alike.
    progress("scoring samples and real texts")
    corpus = list(training_texts)
    figures, notes = [], [scorer.note]
    if reads:
        notes.append("the decoder reads the instructions of the real texts, z is from the prior")
    for kind, texts in (("samples", first), ("real texts", real)):
        figures += _text_figures(kind, texts, corpus, scorer)
    if len(real) != len(first):
        notes.append(
            f"{len(real)} real texts beside {len(first)} samples: self-BLEU and distinct-n depend "
            "on the number and are not comparable"
        )
    # What z decides, and whether the encoder finds it again.
    if opened.model.latent.reads_text:
        progress("consistency and round trip")
        # A text of another z, under the same instruction where one is read.
        apart = draw(z.roll(-1, 0)) if reads else [*again[1:], again[0]]
        greedy = write(opened, z, rows.rows_per_batch, max_length, instructions=instructions)
        figures += _latent_figures(opened, z, (first, again, apart), greedy, rows.rows_per_batch)
        notes.append(
            "consistency compares two draws from one z with draws from two z: equal values mean "
            "that z decides nothing"
        )
        if opened.settings.data.target != "reconstruction":
            notes.append(
                "round trip: the encoder was trained on instructions and reads responses here"
            )
    else:
        notes.append("no latent: consistency and round trip are left out")
    figures += _mauve(first, real, features, seed, notes)
    # Last, so that its draws change no other figure.
    if not reverse_texts:
        notes.append("reverse PPL is not measured: it trains a language model (--reverse-ppl N)")
    elif reads:
        notes.append("reverse PPL is left out: the decoder reads instructions, which no sample has")
    elif len(corpus) < 2:
        notes.append("reverse PPL is left out: there are no training texts to compare with")
    else:
        figures += reverse_perplexity(
            lambda count: draw(_prior(opened, count, generator)),
            corpus,
            real,
            samples=reverse_texts,
            seconds_a_text=seconds_a_text,
            device=opened.model.device,
            seed=seed,
            progress=progress,
        )
    shown = [
        {"sample": text, "same z again": other} for text, other in zip(first, again, strict=True)
    ]
    return FigureGroup(name="samples", figures=figures, texts=shown[:SHOWN], notes=notes)


def _prior(opened: OpenedRun, count: int, generator: torch.Generator) -> Tensor:
    """Draw latents from the prior -> (count, *shape) on the model's device."""
    z = opened.model.latent.prior.sample(count, GeneratorNoise(generator))
    return z.to(opened.model.device)


@torch.no_grad()
def write(
    opened: OpenedRun,
    z: Tensor,
    rows_per_batch: int,
    max_length: int,
    *,
    instructions: Sequence[list[int]] | None = None,
    generator: torch.Generator | None = None,
) -> list[str]:
    """Write a text for every latent: greedy, or at temperature 1 with a generator.

    opened: the run.
    z (rows, *shape): latents.
    rows_per_batch: written together.
    max_length: tokens per text.
    instructions: token ids for each latent, where the decoder reads them.
    generator: of the sampling.
    """
    texts: list[str] = []
    for part in z.split(rows_per_batch):
        given = None
        if instructions is not None:
            given = PackedText.from_lists(list(instructions[len(texts) :][: len(part)]))
            given = given.to(opened.model.device)
        ids = opened.model.generate(
            part,
            max_length=max_length,
            temperature=0.0 if generator is None else 1.0,
            top_p=1.0,
            instruction=given,
            generator=generator,
        )
        texts += [opened.tokenizer.decode(row) for row in ids.tolist()]
    return texts


def _text_figures(
    kind: str, texts: Sequence[str], corpus: Sequence[str], scorer: TextScorer
) -> list[Figure]:
    """Return what needs nothing but texts.

    kind: which texts.
    texts: what is measured.
    corpus: training texts.
    scorer: the language model that judges.
    """
    # How likely they are to a language model.
    value, error, scored = scorer.perplexity(texts)
    figures = [
        Figure(
            name=f"forward PPL, {kind}",
            value=value,
            unit="perplexity per token of the scorer",
            estimator="exp of nats over tokens, end of text not counted; error by linearisation",
            rows=scored,
            standard_error=error,
            note="" if scored == len(texts) else f"{len(texts) - scored} texts have no token",
        )
    ]
    # How much they repeat each other. Texts share references, so their spread is no error.
    if len(texts) > 1:
        figures.append(
            Figure(
                name=f"self-BLEU-4, {kind}",
                value=fmean(self_bleu(texts)),
                unit="share",
                estimator="mean of BLEU-4 against all others, words by white space",
                rows=len(texts),
                cap=1.0,
                note="depends on the number of texts",
            )
        )
    figures += [
        Figure(
            name=f"distinct-{n}, {kind}",
            value=distinct(texts, n),
            unit="share",
            estimator=f"different over all {n}-grams of words",
            rows=len(texts),
            cap=1.0,
            note="depends on the amount of text",
        )
        for n in ORDERS
    ]
    # How much of them was read in training.
    shares = seen_shares(texts, corpus, SEEN_ORDER)
    if shares and corpus:
        value, error = mean_and_error(shares)
        figures.append(
            Figure(
                name=f"4-grams seen in training, {kind}",
                value=value,
                unit="share",
                estimator=f"mean over texts, against {len(corpus)} training texts",
                rows=len(shares),
                standard_error=error,
                cap=1.0,
            )
        )
    return figures


def _latent_figures(
    opened: OpenedRun,
    z: Tensor,
    drawn: tuple[Sequence[str], Sequence[str], Sequence[str]],
    greedy: Sequence[str],
    rows_per_batch: int,
) -> list[Figure]:
    """Return consistency of two draws of one z, and the cosine of the round trip.

    opened: the run.
    z (rows, *shape): what the texts were drawn from.
    drawn: two texts of every z, and a text of another z.
    greedy: texts without sampling.
    rows_per_batch: rows that go through the model together.
    """
    # Two texts of one z, beside a text of another one.
    first, again, other = drawn
    same = [sentence_bleu(*pair) for pair in zip(first, again, strict=True)]
    apart = [sentence_bleu(*pair) for pair in zip(first, other, strict=True)]
    # The round trip is greedy: it asks for z, not for the sampling.
    cosines = _round_trip(opened, z, greedy, rows_per_batch)
    how = "mean BLEU-4 of two texts at temperature 1"
    return [
        Figure(
            name=name,
            value=mean_and_error(values)[0],
            unit=unit,
            estimator=estimator,
            rows=len(values),
            standard_error=mean_and_error(values)[1],
            cap=1.0,
        )
        for name, values, unit, estimator in (
            ("consistency, one z", same, "share", how),
            ("consistency, two z", apart, "share", how),
            (
                "round trip",
                cosines,
                "cosine",
                "mean cos(mu(decode(z)), z), z from the prior, greedy",
            ),
        )
    ]


@torch.no_grad()
def _round_trip(
    opened: OpenedRun, z: Tensor, texts: Sequence[str], rows_per_batch: int
) -> list[float]:
    """Return cos(mu(text), z) of each row.

    opened: the run.
    z (rows, *shape): latents.
    texts: what was written from them.
    rows_per_batch: encoded together.
    """
    model, cosines = opened.model, []
    for start in range(0, len(texts), rows_per_batch):
        part = slice(start, start + rows_per_batch)
        ids = [opened.tokenizer.encode_instruction(text) for text in texts[part]]
        with model.evaluating():
            means = model.latent.flat(model.infer(PackedText.from_lists(ids).to(model.device)))
        cosines += F.cosine_similarity(means, z[part].flatten(1), dim=1).tolist()
    return cosines


def sentence_bleu(hypothesis: str, reference: str) -> float:
    """Return sacreBLEU's sentence score, 0 to 1; equal texts have 1, also without a word."""
    from sacrebleu.metrics import BLEU

    if hypothesis == reference:
        return 1.0
    # Short texts have no n-grams of the higher orders.
    score = BLEU(effective_order=True).sentence_score(hypothesis, [reference]).score
    return min(float(score) / 100, 1.0)


def _mauve(
    samples: Sequence[str],
    real: Sequence[str],
    features: Callable[[], TextScorer],
    seed: int,
    notes: list[str],
) -> list[Figure]:
    """Return MAUVE where its package is installed, else a note.

    samples, real: the two sets of texts.
    features: opens the language model whose last hidden states are the features.
    seed: of the clustering.
    notes: gets what a reader must know.
    """
    if importlib.util.find_spec("mauve") is None:
        notes.append("MAUVE is not measured: the package mauve-text is not installed")
        return []
    # The package has no types, and is optional.
    mauve = importlib.import_module("mauve")
    # Features of both sets come from one model, or their distance means nothing.
    model = features()
    states = [model.features(texts).numpy() for texts in (samples, real)]
    result = mauve.compute_mauve(p_features=states[0], q_features=states[1], seed=seed)
    return [
        Figure(
            name="MAUVE",
            value=float(result.mauve),
            unit="share",
            estimator=f"mauve-text with its defaults, features of {model.name}",
            rows=len(samples),
            cap=1.0,
            note="comparable only with the same features and numbers of texts",
        )
    ]
