"""A trained checkpoint, opened for evaluation: model, tokenizer, and the data it belongs to."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import torch

from cdpvae.batch import VAEBatch
from cdpvae.config import Settings, load_settings
from cdpvae.data import LlamaTokenizerWrapper, PreprocessedDataset, VAECollator, evaluation_batches
from cdpvae.evaluation.options import EvaluationOptions, Split
from cdpvae.models.text_vae import LlamaSoftPromptVAE


@dataclass(frozen=True)
class RowSelection:
    """Which rows of which data.

    split: of the processed data. processed_dir: other data than the run was trained on.
    limit: the first so many rows; None for all. rows_per_batch: packed together.
    """

    split: Split
    processed_dir: str | None
    limit: int | None
    rows_per_batch: int

    @classmethod
    def of(cls, options: EvaluationOptions) -> RowSelection:
        """Select the rows that a command's flags name."""
        return cls(options.split, options.processed_dir, options.num_rows, options.rows_per_batch)


@dataclass(frozen=True)
class OpenedRun:
    """What a checkpoint holds, on a device, in eval mode."""

    checkpoint: Path
    settings: Settings
    model: LlamaSoftPromptVAE
    tokenizer: LlamaTokenizerWrapper

    def rows(self, selection: RowSelection) -> list[VAEBatch]:
        """Return packed batches of a split. Raises ValueError for other data or an empty split."""
        # Tokens of another tokenizer would be read as other words.
        directory = selection.processed_dir or self.settings.data.processed
        dataset = PreprocessedDataset(Path(directory), selection.split)
        dataset.check_tokenizer(self.tokenizer)
        if self.model.config.reads_instruction:
            dataset.check_may_be_read()
        batches = evaluation_batches(
            dataset, VAECollator(), selection.rows_per_batch, limit=selection.limit
        )
        return list(batches)

    def texts(self, batch: VAEBatch) -> Iterator[tuple[str, str]]:
        """Yield (instruction, response) of every row, decoded."""
        rows = zip(batch.instruction.rows(), batch.response.rows(), strict=True)
        for instruction, response in rows:
            yield (
                self.tokenizer.decode(instruction.tolist()),
                self.tokenizer.decode(response.tolist()),
            )


def open_run(
    checkpoint: str, *, backbone: str | None = None, device: str | None = None
) -> OpenedRun:
    """Load checkpoint-N of a training run, fp32 on CPU and its own precision elsewhere.

    backbone: the base weights, where they moved since training.
    Raises ValueError naming what is missing.
    """
    path = Path(checkpoint)
    if not (path / "settings.json").exists():
        raise ValueError(
            f"checkpoint={checkpoint!r}: no settings.json; give a checkpoint-N directory of a "
            "training run"
        )
    settings = load_settings(path / "settings.json")
    # On a CPU evaluation is fp32: half precision is slower there, and less exact.
    target = torch.device(device or ("cuda" if torch.cuda.is_available() else "cpu"))
    half = settings.training.precision == "bf16" and target.type != "cpu"
    dtype = torch.bfloat16 if half else torch.float32
    model = LlamaSoftPromptVAE.from_pretrained(path, backbone=backbone, dtype=dtype)
    tokenizer = LlamaTokenizerWrapper.from_pretrained(str(path / "tokenizer"))
    return OpenedRun(path, settings, model.to(target), tokenizer)


def refuse_without_instruction(opened: OpenedRun, what: str) -> None:
    """Raise ValueError for a decoder that reads the instruction, where `what` gives it none."""
    if opened.model.config.reads_instruction:
        raise ValueError(
            f"checkpoint={str(opened.checkpoint)!r} was trained with decoder_reads='instruction': "
            f"{what} gives its decoder no instruction; use generate --text, or a run with "
            "decoder_reads='nothing'"
        )
