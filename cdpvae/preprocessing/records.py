"""Every form of a record between the input file and the row that training reads.

    form      type                          made by                   holds
    raw       RawRecord                     readers/                  a value, or what is wrong
    example   cdpvae.data.example.Example   formats/                  instruction and response
    record    Record                        process.RecordProcessor   example, tokens and place
    row       ROW_SCHEMA, StreamedRow       stages/write.py,          what training reads
                                            streaming/records.py

A raw record gives one example, several (a conversation under `turns: all`) or a reason why it gives
no example. Each example becomes a record, unless a filter drops it. A record that waits on disk
for deduplication is called a candidate (`stages/candidates.py`).

Three numbers say where a record comes from:

- `record_number`: number of the raw record within its input, from 0. Every input has it.
- `line`: number of the line where the raw record begins, from 1, as an editor counts. None where
  the container has no lines of its own: a JSON array, Parquet, the hub.
- `record_id`: number of the raw record among those of all inputs, from 0. A column of the rows.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import pyarrow as pa

EXCERPT_CHARACTERS = 300


@dataclass(frozen=True)
class RawRecord:
    """One record as a reader gives it.

    value: the parsed record; between the parts of a reader, its bytes or its cells.
    line: see the module. problem: why there is no value, a constant that can be counted.
    detail: what exactly is wrong, with the beginning of the record.
    """

    value: Any = None
    line: int | None = None
    problem: str | None = None
    detail: str = ""


@dataclass(frozen=True)
class Record:
    """One instruction-response pair: what filters judge and deduplication compares.

    record_number: number of the raw record within its input, from 0.
    line: its line from 1, or None (see the module).
    split: the split that the raw record declares (train or validation), or None.
    instruction: the text that the encoder reads.
    response: the text that the decoder writes.
    instruction_ids: [BOS] tokens; empty before tokenisation.
    response_ids: [BOS] tokens [EOS]; empty before tokenisation.
    """

    record_number: int
    line: int | None
    split: str | None
    instruction: str
    response: str
    instruction_ids: list[int]
    response_ids: list[int]


# The columns of a processed data set on disk.
ROW_SCHEMA = pa.schema(
    {
        "record_id": pa.int64(),
        "source": pa.string(),
        "instruction": pa.string(),
        "response": pa.string(),
        "instruction_ids": pa.list_(pa.int32()),
        "response_ids": pa.list_(pa.int32()),
    }
)


@dataclass(frozen=True)
class StreamedRow:
    """A row of a streaming run, which is never on disk.

    index: number among the kept rows of the epoch, from 0. Both ids: (tokens,) int32.
    """

    index: int
    instruction_ids: np.ndarray
    response_ids: np.ndarray

    @property
    def columns(self) -> dict[str, np.ndarray]:
        """Return the two columns of ids under the names that the collator reads."""
        return {"instruction_ids": self.instruction_ids, "response_ids": self.response_ids}


# Returns None to keep a record. To drop it, a filter returns a short reason that is constant under
# given settings.
Filter = Callable[[Record], str | None]


def compared_text(instruction: str, response: str) -> str:
    """Join both sides to the one text by which records are compared."""
    return f"{instruction}\n{response}"


def excerpt(content: Any) -> str:
    """Return the beginning of bytes, a text or a parsed record, safe to print, store and show.

    At most EXCERPT_CHARACTERS of the content, in which whatever cannot be printed is escaped.
    """
    # Of bytes only the beginning is decoded: they may be a line of 64 MiB.
    if isinstance(content, bytes):
        text = content[:EXCERPT_CHARACTERS].decode("utf-8", "backslashreplace")
    elif isinstance(content, str):
        text = content
    else:
        text = json.dumps(content, ensure_ascii=False, default=str)
    # Lone surrogates, which JSON can spell, have no UTF-8.
    text = text[:EXCERPT_CHARACTERS].encode("utf-8", "backslashreplace").decode()
    return "".join(c if c.isprintable() or c == "\n" else f"\\x{ord(c):02x}" for c in text)
