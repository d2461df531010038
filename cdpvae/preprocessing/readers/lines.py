"""Lines of a file, plain or gz, in bounded memory."""

from __future__ import annotations

import gzip
import io
import zlib
from collections.abc import Iterator
from pathlib import Path

from cdpvae.preprocessing.readers import problems
from cdpvae.preprocessing.readers.problems import (
    DAMAGED,
    NOT_UTF8,
    NUL_BYTES,
    TOO_LONG,
    Unreadable,
)
from cdpvae.preprocessing.records import RawRecord, excerpt

BOM = b"\xef\xbb\xbf"
CHUNK = 2**20
# What a disk and a damaged gz file raise in the middle of reading.
DAMAGE = (OSError, EOFError, zlib.error)


def open_file(path: Path) -> gzip.GzipFile | io.BufferedReader:
    """Open the file's bytes, decompressed if its name ends in .gz."""
    return gzip.open(path, "rb") if path.name.lower().endswith(".gz") else path.open("rb")


def read_lines(path: Path) -> Iterator[RawRecord]:
    """Read every line as bytes with its line end, blank lines too.

    A line ends at a newline byte and nothing else. A byte order mark at the start is dropped.
    A line above MAX_RECORD_BYTES is a problem. Damage after the first line is a problem that ends
    the stream; damage before it raises what the file raises.
    """
    with open_file(path) as file:
        lines_read = 0
        while True:
            try:
                line = _next_line(file, lines_read + 1)
            except DAMAGE as error:
                # Nothing has been read: the whole input is unreadable.
                if lines_read == 0:
                    raise
                yield RawRecord(line=lines_read + 1, problem=DAMAGED, detail=str(error))
                return
            if line is None:
                return
            lines_read += 1
            yield line


def filled_lines(path: Path) -> Iterator[RawRecord]:
    """Read the lines that are not blank."""
    return (line for line in read_lines(path) if line.problem or line.value.strip())


def parse_text(line: RawRecord) -> RawRecord:
    """Decode a line of bytes to the record `{"text": ...}`, without the line end."""
    if line.problem:
        return line
    text = decode(line)
    if isinstance(text, RawRecord):
        return text
    return RawRecord({"text": text.rstrip("\r\n")}, line.line)


def decode(raw: RawRecord) -> str | RawRecord:
    """Decode bytes to text, or return the problem: not UTF-8, or a NUL byte, which no text has."""
    # UTF-16, and zeros that a crash leaves, show as NUL bytes.
    if b"\0" in raw.value:
        return RawRecord(line=raw.line, problem=NUL_BYTES, detail=excerpt(raw.value))
    try:
        return raw.value.decode("utf-8")
    except UnicodeDecodeError as error:
        detail = f"{error.reason} at byte {error.start}: {excerpt(raw.value)}"
        return RawRecord(line=raw.line, problem=NOT_UTF8, detail=detail)


def first_line(path: Path) -> bytes:
    """Read the first line that is not blank, at most CHUNK of it, which tells kinds of files apart.

    Raises Unreadable when not even that can be read.
    """
    try:
        with open_file(path) as file:
            # White space before the first record may fill whole chunks.
            head = b""
            while not head and (chunk := file.read1(CHUNK)):
                head = chunk.removeprefix(BOM).lstrip()
            return head.split(b"\n", 1)[0].rstrip()
    except DAMAGE as error:
        raise Unreadable(f"cannot be read: {error}") from None


def _next_line(file: gzip.GzipFile | io.BufferedReader, number: int) -> RawRecord | None:
    """Read line `number`, or return None at the end of the file."""
    max_bytes = problems.MAX_RECORD_BYTES
    line = file.readline(max_bytes + 1)
    if not line:
        return None
    if len(line) <= max_bytes:
        return RawRecord(line.removeprefix(BOM) if number == 1 else line, number)
    # Pass over the rest of a line that is too long, without holding it.
    detail, length = excerpt(line), len(line)
    while not line.endswith(b"\n") and (line := file.readline(CHUNK)):
        length += len(line)
    return RawRecord(line=number, problem=TOO_LONG, detail=f"{length:,} bytes: {detail}")
