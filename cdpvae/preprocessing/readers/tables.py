"""CSV and TSV: rows to records with the columns as keys, all values as text.

Quotes as RFC 4180 has them: a field in quotes may hold delimiters, line ends and doubled quotes;
inside a field that does not begin with one, a quote is a character. In TSV, where quotes usually
mean nothing, a row that cannot be read so is read again with quotes as characters.

One stray quote must not swallow the rest of a file. A row of several lines whose quotes do not
come out is a problem for its first line only, and reading goes on with the second. A row that is in
order but has another number of columns is one problem, however many lines it has.

Header: the first row of a CSV file always; the first row of a TSV file when its names make a known
format. Other TSV files have the columns `column_1`, `column_2` and so on.
"""

from __future__ import annotations

import csv
from collections import deque
from collections.abc import Callable, Iterator
from pathlib import Path

from cdpvae.preprocessing.readers import record
from cdpvae.preprocessing.readers.lines import read_lines
from cdpvae.preprocessing.readers.record import NOT_UTF8, NUL_BYTES, RawRecord, Unreadable, excerpt

# A quote that is not closed within so many lines is a stray one.
MAX_ROW_LINES = 10_000
BAD_ROW = "row is not valid CSV"
WRONG_COLUMNS = "row has another number of columns than the table"

IsHeader = Callable[[list[str]], bool]


def read_csv(path: Path) -> Iterator[RawRecord]:
    """Rows of a comma-separated file. Raises Unreadable when its header cannot be read."""
    return _read_table(path, ",", lambda names: True)


def read_tsv(path: Path, is_header: IsHeader) -> Iterator[RawRecord]:
    """Rows of a tab-separated file. is_header: whether the cells of the first row are names."""
    return _read_table(path, "\t", is_header)


def _read_table(path: Path, delimiter: str, is_header: IsHeader) -> Iterator[RawRecord]:
    rows = _Rows(read_lines(path), delimiter)
    names: list[str] | None = None
    for row in rows:
        if row.problem:
            if names is None and delimiter == ",":
                raise Unreadable(f"its header cannot be read: {row.problem}: {row.detail}")
            yield row
            continue
        if names is None:
            rows.width = len(row.value)
            if is_header(row.value):
                names = _column_names(row.value)
                continue
            names = _column_names([""] * rows.width)
        yield RawRecord(row.position, dict(zip(names, row.value, strict=True)))


def _column_names(cells: list[str]) -> list[str]:
    """The names, numbered where there is none. Raises Unreadable when one comes twice."""
    names = [cell.strip() or f"column_{number}" for number, cell in enumerate(cells, start=1)]
    twice = next((name for name in names if names.count(name) > 1), None)
    if twice is not None:
        raise Unreadable(f"its header has the column {twice!r} twice; rename one")
    return names


class _Rows:
    """Lines in, rows out: raw records whose value is a list of cells. width: cells, if known."""

    def __init__(self, lines: Iterator[RawRecord], delimiter: str) -> None:
        self.width: int | None = None
        self._supply = _Supply(lines)
        self._delimiter = delimiter
        self._reader = csv.reader(self._supply, delimiter=delimiter, strict=True)

    def __iter__(self) -> Iterator[RawRecord]:
        while (line := self._supply.peek()) is not None:
            if line.problem:
                yield self._supply.pop()
            elif not line.value.strip(b" \r\n"):
                self._supply.pop()
            else:
                yield self._row()

    def _row(self) -> RawRecord:
        self._supply.begin_row()
        cells, problem, detail = None, BAD_ROW, ""
        try:
            cells = self._next_cells()
        except (csv.Error, _Unfinished) as error:
            detail = str(error)
        first, *more = self._supply.taken
        if cells is not None and self._fits(cells):
            return _checked(first, cells)
        if self._delimiter == "\t":
            literal = _text(first.value).rstrip("\r\n").split("\t")
            if self._fits(literal):
                self._supply.give_back(more)
                return _checked(first, literal)
        if cells is None:
            self._supply.give_back(more)
        else:
            problem = WRONG_COLUMNS
            detail = f"{len(cells)} where the table has {self.width}"
            if more:
                detail += f", lines {first.position} to {more[-1].position}"
        detail = f"{detail}: {excerpt(first.value)}"
        return RawRecord(first.position, problem=problem, detail=detail)

    def _fits(self, cells: list[str]) -> bool:
        return self.width in (None, len(cells))

    def _next_cells(self) -> list[str]:
        # The module's limit is one for the process; what others set is put back at once.
        before = csv.field_size_limit(record.MAX_RECORD_BYTES)
        try:
            return next(self._reader)
        finally:
            csv.field_size_limit(before)


class _Unfinished(Exception):
    """A row goes on beyond what a row may hold."""


class _Supply:
    """Lines for the csv module, which takes as many as a row has. taken: those of this row."""

    def __init__(self, lines: Iterator[RawRecord]) -> None:
        self._lines = lines
        self._ahead: deque[RawRecord] = deque()
        self.begin_row()

    def begin_row(self) -> None:
        self.taken: list[RawRecord] = []
        self._size = 0

    def __iter__(self) -> _Supply:
        return self

    def __next__(self) -> str:
        line = self.peek()
        if line is None:
            raise StopIteration
        if len(self.taken) >= MAX_ROW_LINES or self._size > record.MAX_RECORD_BYTES:
            raise _Unfinished(f"no end of the row within {len(self.taken):,} lines")
        if line.problem:
            raise _Unfinished(f"the row goes on into a line that cannot be read: {line.problem}")
        self.taken.append(self.pop())
        self._size += len(line.value)
        return _text(line.value)

    def peek(self) -> RawRecord | None:
        """The next line, which stays; None at the end."""
        if not self._ahead and (line := next(self._lines, None)) is not None:
            self._ahead.append(line)
        return self._ahead[0] if self._ahead else None

    def pop(self) -> RawRecord:
        return self._ahead.popleft()

    def give_back(self, lines: list[RawRecord]) -> None:
        self._ahead.extendleft(reversed(lines))


def _text(line: bytes) -> str:
    """Bytes that are not UTF-8 stay, as surrogates, so that they cost their row only."""
    return line.decode("utf-8", "surrogateescape")


def _checked(line: RawRecord, cells: list[str]) -> RawRecord:
    """The row, or the problem with its characters."""
    text = "".join(cells)
    problem = NUL_BYTES if "\0" in text else None
    try:
        text.encode("utf-8")
    except UnicodeEncodeError:
        problem = NOT_UTF8
    if problem:
        return RawRecord(line.position, problem=problem, detail=excerpt(line.value))
    return RawRecord(line.position, cells)
