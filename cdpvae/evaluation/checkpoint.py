"""A trained checkpoint, opened for evaluation: model, tokenizer, and the data it belongs to."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import torch

from cdpvae.batch import VAEBatch
from cdpvae.config import Settings, load_settings
from cdpvae.data import LlamaTokenizerWrapper, PreprocessedDataset, VAECollator, evaluation_batches
from cdpvae.models.text_vae import LlamaSoftPromptVAE


@dataclass
class OpenedRun:
    """What a checkpoint holds, on a device, in eval mode."""

    checkpoint: Path
    settings: Settings
    model: LlamaSoftPromptVAE
    tokenizer: LlamaTokenizerWrapper

    def rows(
        self, processed_dir: str | None, split: str, limit: int | None, rows_per_batch: int
    ) -> list[VAEBatch]:
        """Packed batches of a split. Raises ValueError for other data or an empty split."""
        directory = Path(processed_dir) if processed_dir else self.settings.data.processed
        dataset = PreprocessedDataset(directory, split)
        dataset.check_tokenizer(self.tokenizer)
        return list(evaluation_batches(dataset, VAECollator(), rows_per_batch, limit=limit))

    def texts(self, batch: VAEBatch) -> Iterator[tuple[str, str]]:
        """(instruction, response) of every row, decoded."""
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
    target = torch.device(device or ("cuda" if torch.cuda.is_available() else "cpu"))
    half = settings.training.precision == "bf16" and target.type != "cpu"
    dtype = torch.bfloat16 if half else torch.float32
    model = LlamaSoftPromptVAE.from_pretrained(path, backbone=backbone, dtype=dtype)
    tokenizer = LlamaTokenizerWrapper.from_pretrained(str(path / "tokenizer"))
    return OpenedRun(path, settings, model.to(target), tokenizer)
