"""From the bytes of one JSON value to a record.

What other readers let pass is a problem here where it would lose something: a key that occurs
twice in an object (others keep the last), numbers of more digits than Python reads. `NaN` and
`Infinity`, which pandas writes for missing numbers, are read as null.
"""

from __future__ import annotations

import json
from collections.abc import Iterable
from typing import Any

from cdpvae.preprocessing.readers.lines import decode
from cdpvae.preprocessing.readers.record import RawRecord, excerpt

# Beyond any record of a data set, and far below where Python's recursion ends.
MAX_DEPTH = 100
TOO_DEEP = f"record is nested deeper than {MAX_DEPTH} levels"
NOT_JSON = "record is not valid JSON"
DUPLICATE_KEY = "an object has the same key twice"
NUMBER_TOO_LONG = "a number has too many digits"


def parse_json(raw: RawRecord) -> RawRecord:
    """Bytes of a JSON value -> the record, or the problem."""
    if raw.problem:
        return raw
    text = decode(raw)
    if isinstance(text, RawRecord):
        return text
    try:
        value = _DECODER.decode(text)
    except _DuplicateKey as error:
        return RawRecord(raw.position, problem=DUPLICATE_KEY, detail=f"{error}: {excerpt(text)}")
    except json.JSONDecodeError as error:
        return RawRecord(raw.position, problem=NOT_JSON, detail=f"{error}: {excerpt(text)}")
    except RecursionError:
        return RawRecord(raw.position, problem=TOO_DEEP, detail=excerpt(text))
    except ValueError as error:
        return RawRecord(raw.position, problem=NUMBER_TOO_LONG, detail=f"{error}: {excerpt(text)}")
    # Counting brackets first: nearly every record has too few of them to be deep.
    if text.count("{") + text.count("[") > MAX_DEPTH and _deeper(value, MAX_DEPTH):
        return RawRecord(raw.position, problem=TOO_DEEP, detail=excerpt(text))
    return RawRecord(raw.position, value)


class _DuplicateKey(ValueError):
    pass


def _object(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    made = dict(pairs)
    if len(made) < len(pairs):
        seen: set[str] = set()
        twice = next(key for key, _ in pairs if key in seen or seen.add(key))
        raise _DuplicateKey(f"key {twice!r}")
    return made


_DECODER = json.JSONDecoder(object_pairs_hook=_object, parse_constant=lambda name: None)


def _deeper(value: Any, limit: int) -> bool:
    """Whether more than `limit` containers lie in each other. Level by level, not recursive."""
    level = _containers([value])
    for _ in range(limit):
        level = _containers(
            item
            for container in level
            for item in (container.values() if isinstance(container, dict) else container)
        )
    return bool(level)


def _containers(values: Iterable[Any]) -> list[dict[str, Any] | list[Any]]:
    return [value for value in values if isinstance(value, dict | list)]
