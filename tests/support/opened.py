"""An opened run of a small model whose rows are given, not read."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from cdpvae.batch import PackedText, VAEBatch
from cdpvae.config import Settings
from cdpvae.evaluation.checkpoint import OpenedRun, RowSelection

ROWS = RowSelection("validation", "data", None, 4)


class NumberTokenizer:
    """A token is a word, its number; special ids are left out."""

    def decode(self, ids) -> str:
        return " ".join(str(number) for number in ids if number > 3)


@dataclass(frozen=True)
class GivenRun(OpenedRun):
    """An opened run with batches of its own."""

    batches: list[VAEBatch] = field(default_factory=list)

    def rows(self, selection: RowSelection) -> list[VAEBatch]:
        return self.batches


def given_run(model, batches) -> OpenedRun:
    """Open a model on batches."""
    tokenizer: Any = NumberTokenizer()
    return GivenRun(Path("runs/x"), Settings(), model, tokenizer, batches)


def random_batches(count: int = 3, rows: int = 4) -> list[VAEBatch]:
    """Batches of rows of unequal length, numbered through."""
    generator = torch.Generator().manual_seed(9)

    def text(end: list[int]) -> list[int]:
        length = int(torch.randint(2, 9, (), generator=generator))
        return [1, *torch.randint(4, 64, (length,), generator=generator).tolist(), *end]

    return [
        VAEBatch.build(
            PackedText.from_lists([text([]) for _ in range(rows)]),
            PackedText.from_lists([text([2]) for _ in range(rows)]),
            torch.arange(rows * number, rows * (number + 1)),
        )
        for number in range(count)
    ]
