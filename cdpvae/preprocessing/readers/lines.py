"""Lines of a file, plain or gz, in bounded memory."""

from __future__ import annotations

import gzip
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import BinaryIO

from cdpvae.preprocessing.readers import record
from cdpvae.preprocessing.readers.record import (
    DAMAGED,
    NOT_UTF8,
    NUL_BYTES,
    TOO_LONG,
    RawRecord,
    Unreadable,
    excerpt,
)

BOM = b"\xef\xbb\xbf"
CHUNK = 2**20
# What a disk and a damaged gz file raise in the middle of reading.
DAMAGE = (OSError, EOFError, zlib.error)


def open_file(path: Path) -> BinaryIO:
    """The file's bytes, decompressed if its name ends in .gz."""
    return gzip.open(path, "rb") if path.name.lower().endswith(".gz") else path.open("rb")


def read_lines(path: Path) -> Iterator[RawRecord]:
    """Every line as bytes with its end, blank ones too; the position is the line's number.

    A line ends at a newline byte and nothing else. A byte order mark at the start is passed over.
    A line above the limit is a problem, and so is damage on the way, which ends the stream; damage
    before the first line raises what the file raises.
    """
    with open_file(path) as file:
        position = 0
        while True:
            try:
                line = _next_line(file, position + 1)
            except DAMAGE as error:
                if position == 0:
                    raise
                yield RawRecord(position + 1, problem=DAMAGED, detail=str(error))
                return
            if line is None:
                return
            position += 1
            yield line


def filled_lines(path: Path) -> Iterator[RawRecord]:
    """`read_lines` without blank lines."""
    return (line for line in read_lines(path) if line.problem or line.value.strip())


def parse_text(line: RawRecord) -> RawRecord:
    """A line of bytes -> its text without the line end, or the problem."""
    if line.problem:
        return line
    text = decode(line)
    if isinstance(text, RawRecord):
        return text
    return RawRecord(line.position, {"text": text.rstrip("\r\n")})


def decode(raw: RawRecord) -> str | RawRecord:
    """The bytes as text, or the problem: a NUL byte belongs to no text."""
    if b"\0" in raw.value:
        return RawRecord(raw.position, problem=NUL_BYTES, detail=excerpt(raw.value))
    try:
        return raw.value.decode("utf-8")
    except UnicodeDecodeError as error:
        detail = f"{error.reason} at byte {error.start}: {excerpt(raw.value)}"
        return RawRecord(raw.position, problem=NOT_UTF8, detail=detail)


def first_line(path: Path) -> bytes:
    """The first line that is not blank, at most CHUNK of it, to tell kinds of files apart by.

    Raises Unreadable when not even that can be read.
    """
    try:
        with open_file(path) as file:
            head = b""
            while not head and (chunk := file.read1(CHUNK)):
                head = chunk.removeprefix(BOM).lstrip()
            return head.split(b"\n", 1)[0].rstrip()
    except DAMAGE as error:
        raise Unreadable(f"cannot be read: {error}") from None


def _next_line(file: BinaryIO, position: int) -> RawRecord | None:
    limit = record.MAX_RECORD_BYTES
    line = file.readline(limit + 1)
    if not line:
        return None
    if len(line) <= limit:
        return RawRecord(position, line.removeprefix(BOM) if position == 1 else line)
    detail, length = excerpt(line), len(line)
    while not line.endswith(b"\n") and (line := file.readline(CHUNK)):
        length += len(line)
    return RawRecord(position, problem=TOO_LONG, detail=f"{length:,} bytes: {detail}")
