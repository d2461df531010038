"""From a raw record to exchanges: instructions and their responses. `docs/formats.md` in full.

Every converter is a pure function from a record to a list of `Example`, which is not empty, or to
the reason why the record cannot be converted, short and constant so that reasons can be counted.
Nothing is guessed beyond the rules below, and no text is altered.

- Keys are found in any case. A key whose value is null or blank counts as absent where another
  one has a value: data sets put together from several, and CSV files, fill what is missing so.
- sharegpt: `conversations: [{from, value}]`; messages: `messages: [{role, content}]`. Either
  spelling of the turns is read in either list; `conversations.py` has the rules of turns.
- alpaca: `instruction`, with `input` below it; the answer is `output` or one of its other names.
  With `instances: [{input, output}]` each of them is an exchange.
- magicoder: `problem`/`solution` and the other names of a task and its program.
- text: `text` is instruction and response at once, for reconstruction. So is a bare string.
- auto: the first of these formats, in this order, whose keys the record has.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from typing import Any

from cdpvae.data.example import Example
from cdpvae.preprocessing.formats.conversations import (
    TURNS,
    answer_text,
    example,
    exchanges,
    is_turns,
    select,
    text_of,
)

CONVERSATION_KEYS = ("conversations", "conversation")
INSTRUCTION_KEYS = ("instruction", "question", "prompt", "query")
INPUT_KEYS = ("input", "context")
ANSWER_KEYS = ("output", "response", "answer", "completion", "chosen")
PROBLEM_KEYS = (
    ("problem", "solution"),
    ("problem", "answer"),
    ("text", "code"),
    ("prompt", "code"),
    ("prompt", "canonical_solution"),
)
# A table of exactly two columns without a header: a text and what answers it.
HEADERLESS_PAIR = ("column_1", "column_2")
TEXT_KEYS = ("text", "content")

# What an error message tells who has data of another shape.
SHAPES = {
    "sharegpt": "conversations: [{from, value}]",
    "messages": "messages: [{role, content}]",
    "alpaca": f"{' | '.join(INSTRUCTION_KEYS)}, [{' | '.join(INPUT_KEYS)}], "
    + " | ".join(ANSWER_KEYS),
    "magicoder": " | ".join("/".join(pair) for pair in PROBLEM_KEYS),
    "text": " | ".join(TEXT_KEYS),
}

Outcome = list[Example] | str
Converter = Callable[[Mapping[str, Any], str], Outcome]
Fields = dict[str, Any]


def from_sharegpt(record: Mapping[str, Any], turns: str = "first") -> Outcome:
    """`conversations: [{from, value}]`."""
    fields = _fields(record)
    return _conversation(fields, _first(fields, CONVERSATION_KEYS), "conversations", turns)


def from_messages(record: Mapping[str, Any], turns: str = "first") -> Outcome:
    """`messages: [{role, content}]`; without them `chosen`, when it is a whole conversation."""
    fields = _fields(record)
    if fields.get("messages") is None and is_turns(fields.get("chosen")):
        return exchanges(fields["chosen"], turns)
    return _conversation(fields, "messages", "messages", turns)


def from_alpaca(record: Mapping[str, Any], turns: str = "first") -> Outcome:
    """`instruction, input, output` and their other names, or `instruction, instances`."""
    fields = _fields(record)
    instances = fields.get("instances")
    answer = _first(fields, ANSWER_KEYS)
    if isinstance(instances, list) and not (answer and _filled(fields[answer])):
        return _instances(fields, instances, turns)
    key, context_key = _first(fields, INSTRUCTION_KEYS), _first(fields, INPUT_KEYS)
    if key is None and context_key is None:
        return f"no key {_either(INSTRUCTION_KEYS)}"
    if answer is None:
        return f"no key {_either(ANSWER_KEYS)}"
    if key is not None and is_turns(fields[key]):
        return exchanges(fields[key], turns, fields[answer])
    instruction = text_of(fields[key]) if key is not None else ""
    if context_key is not None and _filled(fields[context_key]):
        context = text_of(fields[context_key])
        if context is None:
            return f"{context_key} is not text"
        if instruction is not None:
            instruction = f"{instruction}\n\n{context}" if instruction.strip() else context
    return _one(instruction, answer_text(fields[answer]))


def from_magicoder(record: Mapping[str, Any], turns: str = "first") -> Outcome:
    """`problem, solution` and the other names of a task and its program."""
    fields = _fields(record)
    pair = _pair(fields, _filled) or _pair(fields, _present)
    if pair is None:
        return f"no pair of keys {_either(tuple('/'.join(pair) for pair in PROBLEM_KEYS))}"
    return _one(text_of(fields[pair[0]]), text_of(fields[pair[1]]))


def from_text(record: Mapping[str, Any], turns: str = "first") -> Outcome:
    """`text`: read by the encoder and written by the decoder."""
    fields = _fields(record)
    key = _first(fields, TEXT_KEYS)
    if key is None:
        return f"no key {_either(TEXT_KEYS)}"
    text = text_of(fields[key])
    return _one(text, text)


CONVERTERS: dict[str, Converter] = {
    "sharegpt": from_sharegpt,
    "messages": from_messages,
    "alpaca": from_alpaca,
    "magicoder": from_magicoder,
    "text": from_text,
}


def detect(record: object) -> str | None:
    """The format whose keys the record has, or None. Filled keys go before empty ones."""
    if isinstance(record, str):
        return "text"
    if not isinstance(record, Mapping):
        return None
    fields = _fields(record)
    name = _detect(fields, _filled) or _detect(fields, _present)
    # Last: an instruction whose other half is missing must not pass for a text.
    return name or ("text" if _first(fields, TEXT_KEYS) else None)


def convert(record: object, format: str = "auto", turns: str = "first") -> Outcome:
    """One record -> its examples, at least one, or the reason why there is none.

    format: a key of CONVERTERS, or auto. turns: which exchanges of a conversation, or instances of
    an instruction, are taken: `first`, `all` or `last`.
    Never raises for any JSON value. Raises ValueError for an unknown format or turns.
    """
    if format != "auto" and format not in CONVERTERS:
        raise ValueError(f"format={format!r} must be auto or one of {', '.join(CONVERTERS)}")
    if turns not in TURNS:
        raise ValueError(f"turns={turns!r} must be one of {', '.join(TURNS)}")
    if isinstance(record, str):
        record = {"text": record}
    if not isinstance(record, Mapping):
        return "record is not an object"
    name = detect(record) if format == "auto" else format
    return "unknown format" if name is None else CONVERTERS[name](record, turns)


def _detect(fields: Fields, has: Callable[[Any], bool]) -> str | None:
    """One of the formats with two sides, where `has` says whether a key counts."""

    def any_of(keys: tuple[str, ...]) -> bool:
        return any(has(fields.get(key)) for key in keys)

    if any_of(CONVERSATION_KEYS):
        return "sharegpt"
    asked = any_of(INSTRUCTION_KEYS)
    if has(fields.get("messages")) or (not asked and is_turns(fields.get("chosen"))):
        return "messages"
    if (asked or any_of(INPUT_KEYS)) and any_of((*ANSWER_KEYS, "instances")):
        return "alpaca"
    if _pair(fields, has):
        return "magicoder"
    return "alpaca" if asked else None


def _conversation(fields: Fields, key: str | None, name: str, turns: str) -> Outcome:
    value = fields.get(key) if key else None
    if not isinstance(value, list | Mapping):
        return f"no list {name}"
    return exchanges(value, turns, fields.get("chosen"))


def _instances(fields: Fields, instances: list[Any], turns: str) -> Outcome:
    """self-instruct's tasks: one instruction, several inputs with their outputs."""
    outcomes: list[Outcome] = []
    for instance in instances:
        if not isinstance(instance, Mapping):
            outcomes.append("an instance is not an object")
            continue
        own = {key: value for key, value in _fields(instance).items() if key != "instances"}
        outcomes.append(from_alpaca({**_instruction_only(fields), **own}))
    found = [one for outcome in outcomes if isinstance(outcome, list) for one in outcome]
    return select(found, turns) if found else next(iter(outcomes), "no instance")


def _instruction_only(fields: Fields) -> Fields:
    return {key: fields[key] for key in INSTRUCTION_KEYS if key in fields}


def _one(instruction: str | None, response: str | None) -> Outcome:
    outcome = example(instruction, response)
    return [outcome] if isinstance(outcome, Example) else outcome


def _fields(record: Mapping[str, Any]) -> Fields:
    """The record with lower-case keys; of equal ones the first that is filled."""
    fields: Fields = {}
    for key, value in record.items():
        if isinstance(key, str):
            name = key.strip().lower()
            if not _filled(fields.get(name)):
                fields[name] = value
    return fields


def _present(value: Any) -> bool:
    return value is not None


def _filled(value: Any) -> bool:
    """Neither null (NaN is the null of number columns), nor blank text, nor an empty list."""
    if isinstance(value, str):
        return bool(value.strip())
    if isinstance(value, list | Mapping):
        return bool(value)
    return value is not None and not (isinstance(value, float) and math.isnan(value))


def _first(fields: Fields, keys: tuple[str, ...]) -> str | None:
    """The first of `keys` that is filled, or else present, or None."""
    return next((key for has in (_filled, _present) for key in keys if has(fields.get(key))), None)


def _pair(fields: Fields, has: Callable[[Any], bool]) -> tuple[str, str] | None:
    if fields.keys() == set(HEADERLESS_PAIR):
        return HEADERLESS_PAIR
    return next((pair for pair in PROBLEM_KEYS if all(has(fields.get(key)) for key in pair)), None)


def _either(names: tuple[str, ...]) -> str:
    return f"{', '.join(names[:-1])} or {names[-1]}"
