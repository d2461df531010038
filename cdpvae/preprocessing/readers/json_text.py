"""From the bytes of one JSON value to a record.

Where other parsers lose something in silence, this one reports a problem: a key that occurs twice
in an object (others keep the last), numbers of more digits than Python reads. `NaN` and `Infinity`,
which pandas writes for missing numbers, are read as null.
"""

from __future__ import annotations

import json
from collections.abc import Iterable
from typing import Any

from cdpvae.preprocessing.readers.lines import decode
from cdpvae.preprocessing.records import RawRecord, excerpt

# Beyond any record of a data set, and far below where Python's recursion ends.
MAX_DEPTH = 100
TOO_DEEP = f"record is nested deeper than {MAX_DEPTH} levels"
NOT_JSON = "record is not valid JSON"
DUPLICATE_KEY = "an object has the same key twice"
NUMBER_TOO_LONG = "a number has too many digits"


def parse_json(raw: RawRecord) -> RawRecord:
    """Parse the bytes of a JSON value to the record, or to the problem with it."""
    if raw.problem:
        return raw
    # What is no text cannot be JSON.
    text = decode(raw)
    if isinstance(text, RawRecord):
        return text
    # Each way to fail is a problem with its own name.
    problem, detail = None, ""
    try:
        value = _DECODER.decode(text)
    except _DuplicateKey as error:
        problem, detail = DUPLICATE_KEY, f"{error}: {excerpt(text)}"
    except json.JSONDecodeError as error:
        problem, detail = NOT_JSON, f"{error}: {excerpt(text)}"
    except RecursionError:
        problem, detail = TOO_DEEP, excerpt(text)
    except ValueError as error:
        problem, detail = NUMBER_TOO_LONG, f"{error}: {excerpt(text)}"
    if problem:
        return RawRecord(line=raw.line, problem=problem, detail=detail)
    # Counting brackets first: nearly every record has too few of them to be deep.
    if text.count("{") + text.count("[") > MAX_DEPTH and _is_deeper(value, MAX_DEPTH):
        return RawRecord(line=raw.line, problem=TOO_DEEP, detail=excerpt(text))
    return RawRecord(value, raw.line)


class _DuplicateKey(ValueError):
    """An object of the value has a key twice."""


def _object(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """Build an object from its keys and values. Raises _DuplicateKey."""
    made = dict(pairs)
    if len(made) == len(pairs):
        return made
    # Name the first key that comes twice.
    seen: set[str] = set()
    for key, _ in pairs:
        if key in seen:
            raise _DuplicateKey(f"key {key!r}")
        seen.add(key)
    raise AssertionError("fewer keys than pairs, and none twice")


_DECODER = json.JSONDecoder(object_pairs_hook=_object, parse_constant=lambda name: None)


def _is_deeper(value: Any, max_depth: int) -> bool:
    """Say whether more than `max_depth` containers lie inside each other.

    Works level by level: a recursive walk would end where the recursion of Python ends.
    """
    level = _containers([value])
    for _ in range(max_depth):
        level = _containers(
            item
            for container in level
            for item in (container.values() if isinstance(container, dict) else container)
        )
    return bool(level)


def _containers(values: Iterable[Any]) -> list[dict[str, Any] | list[Any]]:
    return [value for value in values if isinstance(value, dict | list)]
