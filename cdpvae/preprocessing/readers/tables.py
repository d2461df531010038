"""CSV and TSV: rows to records with the columns as keys, all values as text.

Quotes follow RFC 4180: a field in quotes may hold delimiters, line ends and doubled quotes; inside
a field that does not begin with a quote, a quote is a character. In TSV, where quotes usually mean
nothing, a row that these rules cannot read is read again with quotes as characters.

One stray quote must not swallow the rest of a file. A row of several lines whose quotes are not
closed is a problem for its first line only, and reading goes on with the second. A valid row with
another number of columns is one problem, however many lines it has.

Header: the first row of a CSV file always; the first row of a TSV file when its names make a known
format. Other TSV files have the columns `column_1`, `column_2` and so on.
"""

from __future__ import annotations

import csv
from collections import deque
from collections.abc import Callable, Iterator
from pathlib import Path

from cdpvae.preprocessing.readers import problems
from cdpvae.preprocessing.readers.lines import read_lines
from cdpvae.preprocessing.readers.problems import NOT_UTF8, NUL_BYTES, Unreadable
from cdpvae.preprocessing.records import RawRecord, excerpt

# A quote that is not closed within so many lines is a stray quote.
MAX_ROW_LINES = 10_000
BAD_ROW = "row is not valid CSV"
WRONG_COLUMNS = "row has another number of columns than the table"

IsHeader = Callable[[list[str]], bool]


def read_csv(path: Path) -> Iterator[RawRecord]:
    """Read the rows of a comma-separated file. Raises Unreadable when its header cannot be read."""
    return _read_table(path, ",", lambda names: True)


def read_tsv(path: Path, is_header: IsHeader) -> Iterator[RawRecord]:
    """Read the rows of a tab-separated file.

    is_header: says whether the cells of the first row are names.
    """
    return _read_table(path, "\t", is_header)


def _read_table(path: Path, delimiter: str, is_header: IsHeader) -> Iterator[RawRecord]:
    """Read rows as objects whose keys are the columns' names."""
    rows = _Rows(read_lines(path), delimiter)
    names: list[str] | None = None
    for row in rows:
        if row.problem:
            # Without its header a CSV file has no names for any row.
            if names is None and delimiter == ",":
                raise Unreadable(f"its header cannot be read: {row.problem}: {row.detail}")
            yield row
            continue
        # The first row decides the number of columns, and is the header or a record.
        if names is None:
            rows.width = len(row.value)
            if is_header(row.value):
                names = _column_names(row.value)
                continue
            names = _column_names([""] * rows.width)
        yield RawRecord(dict(zip(names, row.value, strict=True)), row.line)


def _column_names(cells: list[str]) -> list[str]:
    """Strip the names and number the empty ones. Raises Unreadable when a name comes twice."""
    names = [cell.strip() or f"column_{number}" for number, cell in enumerate(cells, start=1)]
    twice = next((name for name in names if names.count(name) > 1), None)
    if twice is not None:
        raise Unreadable(f"its header has the column {twice!r} twice; rename one")
    return names


class _Rows:
    """Turns lines into rows: raw records whose value is a list of cells.

    width: the number of columns, None until the first row has been read.
    """

    def __init__(self, lines: Iterator[RawRecord], delimiter: str) -> None:
        self.width: int | None = None
        self._supply = _Supply(lines)
        self._delimiter = delimiter
        self._reader = csv.reader(self._supply, delimiter=delimiter, strict=True)

    def __iter__(self) -> Iterator[RawRecord]:
        # Blank lines between rows are no rows; inside a quoted field they belong to it.
        while (line := self._supply.peek()) is not None:
            if line.problem:
                yield self._supply.pop()
            elif not line.value.strip(b" \r\n"):
                self._supply.pop()
            else:
                yield self._row()

    def _row(self) -> RawRecord:
        """Read the row that begins with the next line, or the problem with it."""
        # Let the csv module take as many lines as it needs.
        self._supply.begin_row()
        cells, problem, detail = None, BAD_ROW, ""
        try:
            cells = self._next_cells()
        except (csv.Error, _Unfinished) as error:
            detail = str(error)
        first, *more = self._supply.taken
        if cells is not None and self._fits(cells):
            return _checked(first, cells)
        # A row of a TSV file may fit when its quotes are read as characters.
        if self._delimiter == "\t":
            literal = _text(first.value).rstrip("\r\n").split("\t")
            if self._fits(literal):
                self._supply.give_back(more)
                return _checked(first, literal)
        # Unclosed quotes cost the first line only; a wrong number of columns costs all lines.
        if cells is None:
            self._supply.give_back(more)
        else:
            problem = WRONG_COLUMNS
            detail = f"{len(cells)} where the table has {self.width}"
            if more:
                detail += f", lines {first.line} to {more[-1].line}"
        detail = f"{detail}: {excerpt(first.value)}"
        return RawRecord(line=first.line, problem=problem, detail=detail)

    def _fits(self, cells: list[str]) -> bool:
        return self.width in (None, len(cells))

    def _next_cells(self) -> list[str]:
        # The csv module has one limit for the whole process; the former one is restored at once.
        before = csv.field_size_limit(problems.MAX_RECORD_BYTES)
        try:
            return next(self._reader)
        finally:
            csv.field_size_limit(before)


class _Unfinished(Exception):
    """A row goes on beyond MAX_ROW_LINES, MAX_RECORD_BYTES or a line that can be read."""


class _Supply:
    """Hands lines to the csv module, which takes as many as a row has.

    taken: the lines of the current row.
    """

    def __init__(self, lines: Iterator[RawRecord]) -> None:
        self._lines = lines
        self._ahead: deque[RawRecord] = deque()
        self.begin_row()

    def begin_row(self) -> None:
        """Forget the lines of the row before."""
        self.taken: list[RawRecord] = []
        self._size = 0

    def __iter__(self) -> _Supply:
        return self

    def __next__(self) -> str:
        # Each check ends a row that a stray quote would let grow without end.
        line = self.peek()
        if line is None:
            raise StopIteration
        if len(self.taken) >= MAX_ROW_LINES or self._size > problems.MAX_RECORD_BYTES:
            raise _Unfinished(f"no end of the row within {len(self.taken):,} lines")
        if line.problem:
            raise _Unfinished(f"the row goes on into a line that cannot be read: {line.problem}")
        self.taken.append(self.pop())
        self._size += len(line.value)
        return _text(line.value)

    def peek(self) -> RawRecord | None:
        """Return the next line without taking it; None at the end."""
        if not self._ahead and (line := next(self._lines, None)) is not None:
            self._ahead.append(line)
        return self._ahead[0] if self._ahead else None

    def pop(self) -> RawRecord:
        """Take the line that `peek` has returned."""
        return self._ahead.popleft()

    def give_back(self, lines: list[RawRecord]) -> None:
        """Put lines back in front of those that have not been taken."""
        self._ahead.extendleft(reversed(lines))


def _text(line: bytes) -> str:
    """Decode a line. Bytes that are not UTF-8 become surrogates, which cost their row only."""
    return line.decode("utf-8", "surrogateescape")


def _checked(line: RawRecord, cells: list[str]) -> RawRecord:
    """Return the row, or the problem with its characters. line: the first line of the row."""
    # What the csv module lets pass must be text that can be stored.
    text = "".join(cells)
    problem = NUL_BYTES if "\0" in text else None
    try:
        text.encode("utf-8")
    except UnicodeEncodeError:
        problem = NOT_UTF8
    if problem:
        return RawRecord(line=line.line, problem=problem, detail=excerpt(line.value))
    return RawRecord(cells, line.line)
