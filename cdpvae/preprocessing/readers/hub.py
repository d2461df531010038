"""Data sets of the hub, streamed: nothing is stored, so they may be larger than the disk."""

from __future__ import annotations

from collections.abc import Iterator

from cdpvae.preprocessing.records import RawRecord

# Other splits of a data set are for evaluation.
SPLIT = "train"


def read_hub(name: str, start: int = 0) -> Iterator[RawRecord]:
    """Stream the rows of the split `train` from number `start` on, counted from 0.

    Raises ValueError when the hub does not answer, at the start or in between: running again
    continues. Going on with only a part of the data is no option.
    """
    rows_read = start
    # The library lets errors of its HTTP clients, file formats and caches through as they are.
    try:
        from datasets import load_dataset

        rows = load_dataset(name, split=SPLIT, streaming=True)
        for row in rows.skip(start) if start else rows:
            rows_read += 1
            yield RawRecord(row)
    except Exception as error:
        where = f"stopped after row {rows_read:,}" if rows_read > start else "cannot be loaded"
        raise ValueError(
            f"hub data set {name}: {where}: {_one_line(error)}; try again, or give local files "
            "with --input"
        ) from error


def _one_line(error: Exception) -> str:
    return " ".join(str(error).split()) or type(error).__name__
