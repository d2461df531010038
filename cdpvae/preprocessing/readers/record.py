"""A record as read, and the problems that can take its place.

The problems are constants, so that they can be counted. An input that gives nothing at all is an
`Unreadable` instead, whose message `readers.Source` completes with the name of the file.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

# A line, an element of an array or a row of a table above this is passed over, without being held.
MAX_RECORD_BYTES = 64 * 2**20
EXCERPT = 200

TOO_LONG = f"record is longer than the limit of {MAX_RECORD_BYTES // 2**20} MiB"
NOT_UTF8 = "record is not UTF-8"
NUL_BYTES = "record holds NUL bytes"
DAMAGED = "file is damaged from here on"


class Unreadable(ValueError):
    """Nothing of the input can be read, and why."""


@dataclass(frozen=True)
class RawRecord:
    """One record as read. position: from 1; the line where it begins (JSONL, text, CSV, TSV), or
    its running number (JSON array, Parquet, hub).

    value: the parsed record. problem: why there is none (a constant reason), with `detail`.
    """

    position: int
    value: Any = None
    problem: str | None = None
    detail: str = ""


def excerpt(content: bytes | str) -> str:
    """The beginning, for a `detail`. Never fails."""
    if isinstance(content, str):
        content = content[:EXCERPT].encode("utf-8", "surrogateescape")
    return content[:EXCERPT].decode("utf-8", "backslashreplace")
