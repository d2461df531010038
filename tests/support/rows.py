"""Make rows of token ids in memory, compare steps, and read the lengths of real data."""

from __future__ import annotations

import functools
import shutil
import tempfile
from pathlib import Path

import numpy as np
import pytest

from cdpvae.data import LlamaTokenizerWrapper, RowCountSampler, StepBatch
from cdpvae.data.dataset import TokenColumn, TokenDataset
from cdpvae.preprocessing.formats.convert import convert
from cdpvae.preprocessing.readers.source import Source
from support.runs import REPOSITORY

SHARED = REPOSITORY.parent / "shared" / "data"
TOKENIZER = SHARED / "tok_mistral_v1" / "tokenizer.model.v1"


def make_dataset(rows: int) -> TokenDataset:
    """Make rows of varying length; row i is filled with the token i."""
    rng = np.random.default_rng(rows)
    lengths = rng.integers(2, 40, (2, rows)).tolist()
    columns = [TokenColumn.from_lists([[i] * n for i, n in enumerate(side)]) for side in lengths]
    return TokenDataset(*columns, "name", "fingerprint")


def make_sampler(dataset, batch=2, accum=3, world=2, seed=0) -> RowCountSampler:
    """Sample `batch` rows of each rank a micro-batch."""
    return RowCountSampler(
        dataset.response_lengths,
        dataset.instruction_lengths,
        rows_per_micro_batch=batch,
        grad_accum=accum,
        world_size=world,
        seed=seed,
    )


def described(step_batch: StepBatch) -> tuple:
    """Turn everything in a step batch into values that can be compared."""
    batches = [
        (b.sample_index.tolist(), b.instruction.ids.tolist(), b.response.ids.tolist())
        for b in step_batch.micro_batches
    ]
    counts = (step_batch.target_divisor, step_batch.tokens, step_batch.rows, step_batch.row_divisor)
    return (step_batch.epoch, step_batch.step_in_epoch, counts, batches)


@functools.cache
def real_lengths(name: str) -> tuple[np.ndarray, np.ndarray]:
    """Count response and instruction tokens of the records of a real file of default lengths.

    Skips the test where the file or what reads its tokenizer is missing.
    """
    path = SHARED / name
    if not path.exists() or not TOKENIZER.exists():
        pytest.skip(f"{path} is missing: real data lies beside the repository, not in it")
    pytest.importorskip("sentencepiece", reason="reads the tokenizer.model of the real data")
    with tempfile.TemporaryDirectory() as directory:
        shutil.copy(TOKENIZER, Path(directory) / "tokenizer.model")
        wrapper = LlamaTokenizerWrapper.from_pretrained(directory)
    # Convert and tokenise as preprocessing does.
    outcomes = [convert(raw.value) for raw in Source.parse(str(path)).records()]
    pairs = [example for outcome in outcomes if not isinstance(outcome, str) for example in outcome]
    instruction, response = (
        np.array([len(ids) for ids in encode(texts, truncate=False)])
        for encode, texts in (
            (wrapper.encode_instructions, [pair.instruction for pair in pairs]),
            (wrapper.encode_responses, [pair.response for pair in pairs]),
        )
    )
    # Keep what the length filters keep by default.
    kept = (instruction >= 10) & (instruction <= 512) & (response >= 20) & (response <= 1024)
    return response[kept], instruction[kept]
