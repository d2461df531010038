"""Runs without a latent that a run is measured against, and the NLL of the same rows by them.

Two kinds, by what their decoder reads. What z has to beat is a decoder that reads all that the
run's own decoder reads beside z: of a run that reads nothing else, one that reads nothing; of a run
that reads the instruction, one that reads it. The other kind answers another question: a decoder
that reads the whole instruction shows what a code of it could be worth at most.

Legend: N rows.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from cdpvae.config.text_vae import DecoderReads
from cdpvae.evaluation.checkpoint import OpenedRun, RowSelection, open_run
from cdpvae.evaluation.encoded import EncodedRows, encode_rows

# The figures of both kinds: the backbone before it was tuned, and the tuned decoder.
NAMES: Mapping[DecoderReads, tuple[str, str]] = {
    "nothing": ("NLL of the backbone itself", "NLL of the decoder without z"),
    "instruction": (
        "NLL when the backbone itself reads the instruction",
        "NLL when the decoder reads the instruction",
    ),
}
HOW_TO_TRAIN: Mapping[DecoderReads, str] = {
    "nothing": "--latent none",
    "instruction": "--latent none --decoder-reads instruction",
}


@dataclass(frozen=True)
class Baselines:
    """A run without a latent of each kind, or None.

    nothing: its decoder reads the response alone. instruction: its decoder reads the instruction.
    """

    nothing: OpenedRun | None = None
    instruction: OpenedRun | None = None

    @classmethod
    def of(cls, runs: Iterable[OpenedRun]) -> Baselines:
        """Sort runs by kind. Raises ValueError for one with a latent and for two of a kind."""
        found: dict[DecoderReads, OpenedRun] = {}
        for run in runs:
            check_baseline(run)
            kind = run.model.config.decoder_reads
            if kind in found:
                raise ValueError(
                    f"baseline={str(found[kind].checkpoint)!r} and {str(run.checkpoint)!r} both "
                    f"have decoder_reads={kind!r}; give one of each kind"
                )
            found[kind] = run
        return cls(**found)

    def that_reads(self, reads: DecoderReads) -> OpenedRun | None:
        """Return the run of a kind."""
        return self.instruction if reads == "instruction" else self.nothing


def open_baselines(
    checkpoints: Iterable[str], opened: OpenedRun, *, backbone: str | None = None
) -> Baselines:
    """Open runs without a latent where the run itself is. backbone: as in `open_run`.

    Raises ValueError for one with a latent and for two of a kind.
    """
    device = str(opened.model.device)
    return Baselines.of(open_run(c, backbone=backbone, device=device) for c in checkpoints)


def check_baseline(baseline: OpenedRun) -> None:
    """Raise ValueError for a baseline with a latent: it is to show what a decoder does without."""
    if baseline.model.latent.reads_text:
        raise ValueError(
            f"baseline={str(baseline.checkpoint)!r} was trained with a latent; give a run of "
            "--latent none"
        )


def rows_of_run(opened: OpenedRun, rows: RowSelection) -> RowSelection:
    """Name the data of `rows`, the run's own by default, so that a baseline reads the same."""
    directory = rows.processed_dir or opened.settings.data.processed
    return dataclasses.replace(rows, processed_dir=str(directory))


def rivals_of(
    reads: DecoderReads,
    opened: OpenedRun,
    baselines: Baselines,
    rows: RowSelection,
    encoded: EncodedRows,
) -> dict[str, Tensor]:
    """Return the NLL of the same rows by decoders without z, by the names of figures, (N,) each.

    reads: what they read before the response.
    opened: the run that is measured.
    baselines: the tuned decoders that there are.
    rows: which rows.
    encoded: the same rows, encoded by the run.
    """
    of_backbone, of_decoder = NAMES[reads]
    found = {of_backbone: encoded.backbone_nll(reads == "instruction")}
    baseline = baselines.that_reads(reads)
    if baseline is not None:
        # The run's own data, whatever data the baseline was trained on.
        same = rows_of_run(opened, rows)
        other = encode_rows(baseline, same, seed=0, progress=lambda line: None)
        assert torch.equal(other.sample_index, encoded.sample_index), "the same rows of one split"
        found[of_decoder] = other.nll(other.z)
    return found
