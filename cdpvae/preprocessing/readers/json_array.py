"""A JSON array, element by element: what is damaged costs its element, not the file.

The scanner below only finds where elements end, by brackets and quotes; `parse_json` reads each.
So an element with a wrong byte or a bad escape is one problem, and the array may be of any size.
(`json.load` and `ijson` both give up on the whole rest of the file.) A quote that is missing shifts
all that follows: then the rest is one or more problems, but nothing passes unnoticed.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path

from cdpvae.preprocessing.readers import record
from cdpvae.preprocessing.readers.json_text import parse_json
from cdpvae.preprocessing.readers.lines import CHUNK, DAMAGE, open_file
from cdpvae.preprocessing.readers.record import DAMAGED, TOO_LONG, RawRecord, excerpt

NOT_CLOSED = "file ends inside the array"
AFTER_THE_END = "data after the end of the array"

# Possessive repeats keep the matcher from remembering every step of a long text.
_REST_OF_STRING = re.compile(rb'[^"\\]*+(?:\\.[^"\\]*+)*+', re.DOTALL)
_WHOLE_STRING = rb'"[^"\\]*+(?:\\.[^"\\]*+)*+"'
_INSIDE = re.compile(rb'(?:[^"\[\]{}]++|' + _WHOLE_STRING + rb")*+", re.DOTALL)
_BETWEEN = re.compile(rb'(?:[^"\[\]{,]++|' + _WHOLE_STRING + rb")*+", re.DOTALL)


def read_array(path: Path) -> Iterator[RawRecord]:
    """Every element as bytes, not yet parsed; the position is its running number.

    The file must begin with `[`. A file that breaks off, or has more after the array, ends with one
    problem that says so.
    """
    splitter = _Splitter()
    problem, detail = NOT_CLOSED, ""
    with open_file(path) as file:
        try:
            # read1 hands on what a damaged gz file still gives; read would lose it.
            while chunk := file.read1(CHUNK):
                yield from splitter.feed(chunk)
        except DAMAGE as error:
            problem, detail = DAMAGED, str(error)
    yield from splitter.end(problem, detail)


class _Splitter:
    """Bytes in, elements out. depth: brackets open, the array's own included."""

    def __init__(self) -> None:
        self.depth = 0
        self.position = 0
        self.in_string = False
        self.escaped = False  # the last chunk ended after a backslash
        self.closed = False
        self.after = b""  # the beginning of what follows the array
        self._start_element()

    def feed(self, chunk: bytes) -> Iterator[RawRecord]:
        """The elements that end in this chunk."""
        at = 0
        if self.depth == 0 and not self.closed:
            at = chunk.find(b"[") + 1
            if not at:
                return
            self.depth = 1
        start = at
        while at < len(chunk) and not self.closed:
            if self.in_string:
                at = self._through_string(chunk, at)
                continue
            at = (_BETWEEN if self.depth == 1 else _INSIDE).match(chunk, at).end()
            if at == len(chunk):
                break
            mark = chunk[at : at + 1]
            at += 1
            if mark == b'"':
                self.in_string = True
            elif mark in b"[{":
                self.depth += 1
            elif mark == b",":
                yield self._element(chunk[start : at - 1])
                start = at
            else:
                self.depth -= 1
                if self.depth == 0:
                    yield from self._last(chunk[start : at - 1])
                    start = at
        if self.closed:
            self.after += chunk[start:].lstrip()[: record.EXCERPT - len(self.after)]
        else:
            self._hold(chunk[start:])

    def end(self, problem: str, detail: str) -> Iterator[RawRecord]:
        """What the end of the file, or the damage in it, means. Nothing after a whole array."""
        if self.closed:
            if self.after or problem == DAMAGED:
                problem = problem if problem == DAMAGED else AFTER_THE_END
                yield self._problem(problem, detail or excerpt(self.after))
            return
        held = b"".join(self.held).strip()
        # An element that only lacks the comma or the bracket after it is whole.
        element = RawRecord(self.position + 1, held)
        if self.size <= record.MAX_RECORD_BYTES and parse_json(element).problem is None:
            self.position += 1
            yield element
            held = b""
        yield self._problem(problem, f"{detail}: {excerpt(held)}" if detail else excerpt(held))

    def _start_element(self) -> None:
        self.held: list[bytes] = []
        self.size = 0

    def _hold(self, piece: bytes) -> None:
        """Keep a piece of the element, or, above the limit, only its beginning."""
        self.size += len(piece)
        self.held.append(piece)
        if self.size > record.MAX_RECORD_BYTES:
            self.held = [b"".join(self.held)[: record.EXCERPT]]

    def _element(self, piece: bytes) -> RawRecord:
        self._hold(piece)
        self.position += 1
        content, size = b"".join(self.held).strip(), self.size
        self._start_element()
        if size > record.MAX_RECORD_BYTES:
            detail = f"{size:,} bytes: {excerpt(content)}"
            return RawRecord(self.position, problem=TOO_LONG, detail=detail)
        return RawRecord(self.position, content)

    def _last(self, piece: bytes) -> Iterator[RawRecord]:
        """The element before the closing bracket; none after a comma, nor in an empty array."""
        self.closed = True
        if piece.strip() or any(held.strip() for held in self.held):
            yield self._element(piece)

    def _problem(self, problem: str, detail: str) -> RawRecord:
        return RawRecord(self.position + 1, problem=problem, detail=detail)

    def _through_string(self, chunk: bytes, at: int) -> int:
        """Behind the end of the string that is open at `at`, or the end of the chunk."""
        if self.escaped:
            at, self.escaped = at + 1, False
        at = _REST_OF_STRING.match(chunk, at).end()
        if at == len(chunk):
            return at
        self.escaped = chunk[at : at + 1] == b"\\"
        self.in_string = self.escaped
        return at + 1
