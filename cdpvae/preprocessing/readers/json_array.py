"""A JSON array, element by element: what is damaged costs its element, not the file.

The scanner below only finds where elements end, by brackets and quotes; `parse_json` reads each.
So an element with a wrong byte or a bad escape is one problem, and the array may be of any size.
(`json.load` and `ijson` both give up on the whole rest of the file.) A missing quote shifts all
that follows: then the rest is one or more problems, but nothing passes unnoticed.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path

from cdpvae.preprocessing.readers import problems
from cdpvae.preprocessing.readers.json_text import parse_json
from cdpvae.preprocessing.readers.lines import CHUNK, DAMAGE, open_file
from cdpvae.preprocessing.readers.problems import DAMAGED, TOO_LONG
from cdpvae.preprocessing.records import EXCERPT_CHARACTERS, RawRecord, excerpt

NOT_CLOSED = "file ends inside the array"
AFTER_THE_END = "data after the end of the array"

# Possessive repeats keep the matcher from remembering every step of a long text. As each of these
# patterns may match nothing, each of them always matches.
_REST_OF_STRING = re.compile(rb'[^"\\]*+(?:\\.[^"\\]*+)*+', re.DOTALL)
_WHOLE_STRING = rb'"[^"\\]*+(?:\\.[^"\\]*+)*+"'
_INSIDE = re.compile(rb'(?:[^"\[\]{}]++|' + _WHOLE_STRING + rb")*+", re.DOTALL)
_BETWEEN = re.compile(rb'(?:[^"\[\]{,]++|' + _WHOLE_STRING + rb")*+", re.DOTALL)


def read_array(path: Path) -> Iterator[RawRecord]:
    """Read every element as bytes, not yet parsed.

    The file must begin with `[`. A file that breaks off, or has more after the array, ends with one
    problem that says so.
    """
    # Without damage, an array that is still open at the end has not been closed.
    splitter = _Splitter()
    problem, detail = NOT_CLOSED, ""
    with open_file(path) as file:
        try:
            # read1 returns what a damaged gz file still gives; read would lose it.
            while chunk := file.read1(CHUNK):
                yield from splitter.feed(chunk)
        except DAMAGE as error:
            problem, detail = DAMAGED, str(error)
    yield from splitter.end(problem, detail)


class _Splitter:
    """Cuts a stream of bytes into the elements of the array.

    depth: open brackets, that of the array included. in_string: inside a text.
    escaped: the last chunk ended after a backslash. closed: the array has ended.
    after: the beginning of what follows the array.
    """

    def __init__(self) -> None:
        self.depth = 0
        self.in_string = False
        self.escaped = False
        self.closed = False
        self.after = b""
        self._start_element()

    def feed(self, chunk: bytes) -> Iterator[RawRecord]:
        """Yield the elements that end in this chunk, and keep the rest of it."""
        at = 0
        # Before the array only white space and a byte order mark can stand.
        if self.depth == 0 and not self.closed:
            at = chunk.find(b"[") + 1
            if not at:
                return
            self.depth = 1
        start = at
        while at < len(chunk) and not self.closed:
            # Go to the next byte that means something here: a quote, a bracket, a comma.
            if self.in_string:
                at = self._skip_string(chunk, at)
                continue
            at = _match_end(_BETWEEN if self.depth == 1 else _INSIDE, chunk, at)
            if at == len(chunk):
                break
            mark = chunk[at : at + 1]
            at += 1
            # A comma between elements, or the last bracket, ends an element.
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
                    yield from self._last_element(chunk[start : at - 1])
                    start = at
        # Keep what belongs to an element that goes on, or shows what follows the array.
        if self.closed:
            self.after += chunk[start:].lstrip()[: EXCERPT_CHARACTERS - len(self.after)]
        else:
            self._hold(chunk[start:])

    def end(self, problem: str, detail: str) -> Iterator[RawRecord]:
        """Yield what the end of the file leaves: a last element and a problem, or nothing.

        problem, detail: what to report when the array has not ended.
        """
        if self.closed:
            if self.after or problem == DAMAGED:
                problem = problem if problem == DAMAGED else AFTER_THE_END
                yield RawRecord(problem=problem, detail=detail or excerpt(self.after))
            return
        held = b"".join(self.held).strip()
        # An element that only lacks the comma or the bracket after it is whole.
        element = RawRecord(held)
        if self.size <= problems.MAX_RECORD_BYTES and parse_json(element).problem is None:
            yield element
            held = b""
        detail = f"{detail}: {excerpt(held)}" if detail else excerpt(held)
        yield RawRecord(problem=problem, detail=detail)

    def _start_element(self) -> None:
        self.held: list[bytes] = []
        self.size = 0

    def _hold(self, piece: bytes) -> None:
        """Keep a piece of the element, or, above MAX_RECORD_BYTES, only its beginning."""
        self.size += len(piece)
        self.held.append(piece)
        if self.size > problems.MAX_RECORD_BYTES:
            self.held = [b"".join(self.held)[:EXCERPT_CHARACTERS]]

    def _element(self, piece: bytes) -> RawRecord:
        """End the element with its last piece."""
        self._hold(piece)
        content, size = b"".join(self.held).strip(), self.size
        self._start_element()
        if size > problems.MAX_RECORD_BYTES:
            return RawRecord(problem=TOO_LONG, detail=f"{size:,} bytes: {excerpt(content)}")
        return RawRecord(content)

    def _last_element(self, piece: bytes) -> Iterator[RawRecord]:
        """Yield the element before the closing bracket; after a comma there is nothing to yield."""
        self.closed = True
        if piece.strip() or any(held.strip() for held in self.held):
            yield self._element(piece)

    def _skip_string(self, chunk: bytes, at: int) -> int:
        """Return where the text that is open at `at` has ended, or the end of the chunk."""
        if self.escaped:
            at, self.escaped = at + 1, False
        at = _match_end(_REST_OF_STRING, chunk, at)
        if at == len(chunk):
            return at
        self.escaped = chunk[at : at + 1] == b"\\"
        self.in_string = self.escaped
        return at + 1


def _match_end(pattern: re.Pattern[bytes], chunk: bytes, at: int) -> int:
    """Return the end of the match at `at`, for a pattern that always matches."""
    found = pattern.match(chunk, at)
    assert found is not None
    return found.end()
