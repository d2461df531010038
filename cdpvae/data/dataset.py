"""Read rows of token ids from the Arrow files that `cdpvae.preprocess` wrote.

A data set holds two `TokenColumn`s, numpy views that make reading a row a slice. Those of a
`PreprocessedDataset` are memory-mapped, so that ranks on one machine share the pages and nothing is
copied at start.
"""

from __future__ import annotations

import json
from bisect import bisect_right
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any, Literal

import numpy as np
import pyarrow as pa

from cdpvae.data.tokenizer import LlamaTokenizerWrapper

MANIFEST = "manifest.json"
# Version of the columns and of the manifest.
SCHEMA = 2
SPLITS = ("train", "validation")
TOKEN_COLUMNS = ("instruction_ids", "response_ids")


class TokenColumn:
    """Hold rows of token ids as slices of a few flat int32 arrays.

    chunks: (values (tokens,), offsets (rows+1,)) pairs; offsets index into values.
    """

    def __init__(self, chunks: Sequence[tuple[np.ndarray, np.ndarray]]) -> None:
        self._chunks = [chunk for chunk in chunks if len(chunk[1]) > 1]
        sizes = [len(offsets) - 1 for _, offsets in self._chunks]
        self._starts = np.concatenate([[0], np.cumsum(sizes, dtype=np.int64)]).tolist()

    @classmethod
    def from_lists(cls, rows: Sequence[Sequence[int]]) -> TokenColumn:
        """Flatten lists of ids."""
        # int64 offsets: a data set may have more than 2**31 tokens.
        offsets = np.zeros(len(rows) + 1, dtype=np.int64)
        np.cumsum([len(row) for row in rows], out=offsets[1:])
        flat = [token for row in rows for token in row]
        return cls([(np.array(flat, dtype=np.int32), offsets)])

    @classmethod
    def from_arrow(cls, column: pa.ChunkedArray) -> TokenColumn:
        """Make views of a list<int32> column; nothing is copied."""
        return cls(
            [
                (chunk.values.to_numpy(zero_copy_only=True), chunk.offsets.to_numpy())
                for chunk in column.chunks
            ]
        )

    def __len__(self) -> int:
        return self._starts[-1]

    def __getitem__(self, index: int) -> np.ndarray:
        """Read row `index` as an int32 view."""
        # Find the last chunk that starts at or before the row.
        chunk = bisect_right(self._starts, index) - 1
        values, offsets = self._chunks[chunk]
        row = index - self._starts[chunk]
        return values[offsets[row] : offsets[row + 1]]

    @property
    def lengths(self) -> np.ndarray:
        """Count the tokens of every row -> (rows,) int32."""
        parts = [np.diff(offsets).astype(np.int32) for _, offsets in self._chunks]
        return np.concatenate(parts) if parts else np.zeros(0, dtype=np.int32)


class TokenDataset:
    """Give a loader rows, their lengths, and the name of the tokenizer that made them.

    instruction, response: the token ids of every row.
    tokenizer_name, tokenizer_fingerprint: of the tokenizer that made them.

    `instruction_lengths`, `response_lengths`: (rows,) int32 tokens, BOS and EOS counted.
    """

    def __init__(
        self,
        instruction: TokenColumn,
        response: TokenColumn,
        tokenizer_name: str,
        tokenizer_fingerprint: str,
    ) -> None:
        self._instruction = instruction
        self._response = response
        # Computed once: it takes a pass over all offsets.
        self.instruction_lengths = instruction.lengths
        self.response_lengths = response.lengths
        self.tokenizer_name = tokenizer_name
        self.tokenizer_fingerprint = tokenizer_fingerprint

    def __len__(self) -> int:
        return len(self._response)

    def __getitem__(self, index: int) -> dict[str, list[int]]:
        """Read instruction_ids and response_ids of one row. Raises IndexError beyond the last."""
        if not -len(self) <= index < len(self):
            raise IndexError(f"row {index}: the data set has {len(self)} rows")
        # The modulus lets negative indices count from the end.
        row = self.rows([index % len(self)])[0]
        return {name: ids.tolist() for name, ids in row.items()}

    def rows(self, indices: Iterable[int]) -> list[dict[str, np.ndarray]]:
        """Read instruction_ids and response_ids of many rows, as int32 views to read only."""
        return [
            {"instruction_ids": self._instruction[i], "response_ids": self._response[i]}
            for i in indices
        ]

    def check_tokenizer(self, wrapper: LlamaTokenizerWrapper) -> None:
        """Raise ValueError when the rows were tokenised by another tokenizer."""
        if wrapper.fingerprint() != self.tokenizer_fingerprint:
            raise ValueError(
                f"the data was tokenised by {self.tokenizer_name} "
                f"({self.tokenizer_fingerprint[:12]}), this is {wrapper.name} "
                f"({wrapper.fingerprint()[:12]}); preprocess again with this tokenizer"
            )


class PreprocessedDataset(TokenDataset):
    """Map one split of what `cdpvae.preprocess` wrote.

    path: the processed directory. split: train or validation.
    Raises ValueError when the directory or the split is missing or is something else.
    """

    def __init__(self, path: str | Path, split: Literal["train", "validation"] = "train") -> None:
        from datasets import load_from_disk

        if split not in SPLITS:
            raise ValueError(f"split={split!r} must be one of {', '.join(SPLITS)}")
        # Check the manifest before any file of the split is opened.
        self.path, self.split = Path(path), split
        self.manifest = read_manifest(self.path)
        if not self.manifest["counts"][split]:
            raise ValueError(f"processed data {self.path}: the {split} split has no rows")

        # Map the table, which holds further columns than the two that are read.
        try:
            table = load_from_disk(str(self.path / split)).data
        except OSError as error:
            raise ValueError(
                f"processed data {self.path / split}: cannot be read: {error}"
            ) from None
        missing = [name for name in TOKEN_COLUMNS if name not in table.column_names]
        if missing:
            raise ValueError(
                f"processed data {self.path / split}: no column {', '.join(missing)}; "
                f"found {', '.join(table.column_names)}"
            )
        # Keep the tokenizer's fingerprint: the caller compares it with the tokenizer of the run.
        instruction, response = (TokenColumn.from_arrow(table.column(n)) for n in TOKEN_COLUMNS)
        tokenizer = self.manifest["tokenizer"]
        super().__init__(instruction, response, tokenizer["name"], tokenizer["fingerprint"])

    def check_may_be_read(self) -> None:
        """Raise ValueError where a decoder that reads the instruction would read its own target."""
        if self.manifest["settings"].get("target") == "reconstruction":
            raise ValueError(
                f"processed data {self.path} has target='reconstruction': a decoder with "
                "decoder_reads='instruction' would read the text that it is to write; give data of "
                "target='response'"
            )


def read_manifest(path: Path) -> dict[str, Any]:
    """Read the manifest of a processed directory. Raises ValueError where this version cannot."""
    # A missing file most often means a wrong path, so the message says how to write one.
    try:
        manifest = json.loads((path / MANIFEST).read_text())
    except FileNotFoundError:
        raise ValueError(
            f"{path} holds no processed data ({MANIFEST} is missing); write it with "
            f"python -m cdpvae.preprocess --processed-dir {path}"
        ) from None
    except (OSError, ValueError) as error:
        raise ValueError(f"{path / MANIFEST}: cannot be read: {error}") from None
    # Any JSON value may stand in a file of this name.
    schema = manifest.get("schema") if isinstance(manifest, dict) else None
    if schema != SCHEMA:
        raise ValueError(
            f"{path / MANIFEST}: schema={schema!r}, this version reads {SCHEMA}; preprocess again "
            "into another directory"
        )
    return manifest
