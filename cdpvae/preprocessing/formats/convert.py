"""From a raw record to examples: instructions and their responses. `docs/formats.md` in full.

Every converter is a pure function from a record to a list of `Example`, which is not empty, or to
the reason why the record cannot be converted, short and constant so that reasons can be counted.
Nothing is guessed beyond the rules below, and no text is altered.

- Keys are found in any case. A key whose value is null or blank counts as absent where another key
  has a value: CSV files, and data sets put together from several, fill missing values with these.
- sharegpt: `conversations: [{from, value}]`; messages: `messages: [{role, content}]`. Either
  spelling of the turns is read in either list; `conversations.py` has the rules of turns.
- alpaca: `instruction`, with `input` below it; the answer is `output` or one of its other names.
  With `instances: [{input, output}]` each instance is an example.
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
    Reason,
    answer_text,
    exchanges,
    is_turns,
    make_example,
    select,
    text_of,
)

# Names of the same thing in data sets of different origin; the first with a value counts.
CONVERSATION_KEYS = ("conversations", "conversation")
INSTRUCTION_KEYS = ("instruction", "question", "prompt", "query")
INPUT_KEYS = ("input", "context")
ANSWER_KEYS = ("output", "response", "answer", "completion", "chosen")
# A task and its program, as pairs: `text` alone is no task.
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

# Shown in the error message when no record of an input converts.
SHAPES = {
    "sharegpt": "conversations: [{from, value}]",
    "messages": "messages: [{role, content}]",
    "alpaca": f"{' | '.join(INSTRUCTION_KEYS)}, [{' | '.join(INPUT_KEYS)}], "
    + " | ".join(ANSWER_KEYS),
    "magicoder": " | ".join("/".join(pair) for pair in PROBLEM_KEYS),
    "text": " | ".join(TEXT_KEYS),
}

# A record's examples, at least one, or why it gives none.
Converted = list[Example] | Reason
Converter = Callable[[Mapping[str, Any], str], Converted]
Fields = dict[str, Any]


def from_sharegpt(record: Mapping[str, Any], turns: str) -> Converted:
    """Convert `conversations: [{from, value}]`."""
    fields = _fields(record)
    return _conversation(fields, _first(fields, CONVERSATION_KEYS), "conversations", turns)


def from_messages(record: Mapping[str, Any], turns: str) -> Converted:
    """Convert `messages: [{role, content}]`, or else `chosen` when it is a whole conversation."""
    fields = _fields(record)
    if fields.get("messages") is None and is_turns(fields.get("chosen")):
        return exchanges(fields["chosen"], turns)
    return _conversation(fields, "messages", "messages", turns)


def from_alpaca(record: Mapping[str, Any], turns: str) -> Converted:
    """Convert `instruction, input, output` or their other names, or `instruction, instances`."""
    # Find the keys: instances, or an instruction (or only its input) and an answer.
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
    # A prompt may be a whole conversation, which the answer ends.
    if key is not None and is_turns(fields[key]):
        return exchanges(fields[key], turns, fields[answer])
    # Put the input below the instruction.
    instruction = text_of(fields[key]) if key is not None else ""
    if context_key is not None and _filled(fields[context_key]):
        context = text_of(fields[context_key])
        if context is None:
            return f"{context_key} is not text"
        if instruction is not None:
            instruction = f"{instruction}\n\n{context}" if instruction.strip() else context
    return _one(instruction, answer_text(fields[answer]))


def from_magicoder(record: Mapping[str, Any], turns: str) -> Converted:
    """Convert `problem, solution` or the other names of a task and its program."""
    fields = _fields(record)
    # A pair with both texts goes before a pair that is only there.
    pair = _pair(fields, _filled) or _pair(fields, _present)
    if pair is None:
        return f"no pair of keys {_either(tuple('/'.join(pair) for pair in PROBLEM_KEYS))}"
    return _one(text_of(fields[pair[0]]), text_of(fields[pair[1]]))


def from_text(record: Mapping[str, Any], turns: str) -> Converted:
    """Convert `text`, which the encoder reads and the decoder writes."""
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
    """Return the format whose keys the record has, or None. Filled keys go before empty ones."""
    if isinstance(record, str):
        return "text"
    if not isinstance(record, Mapping):
        return None
    fields = _fields(record)
    name = _detect(fields, _filled) or _detect(fields, _present)
    # Last: an instruction whose other half is missing must not pass for a text.
    return name or ("text" if _first(fields, TEXT_KEYS) else None)


def convert(record: object, format: str = "auto", turns: str = "first") -> Converted:
    """Convert one record to its examples, at least one, or to the reason why it gives none.

    format: a key of CONVERTERS, or auto. turns: which exchanges of a conversation, or instances of
    an instruction, are taken: `first`, `all` or `last`.
    Raises ValueError for an unknown format or turns, and never for a record that is a JSON value.
    """
    if format != "auto" and format not in CONVERTERS:
        raise ValueError(f"format={format!r} must be auto or one of {', '.join(CONVERTERS)}")
    if turns not in TURNS:
        raise ValueError(f"turns={turns!r} must be one of {', '.join(TURNS)}")
    if isinstance(record, str):
        record = {"text": record}
    if not isinstance(record, Mapping):
        return "record is not an object"
    # A named format is taken as it is, so that its reasons are those of this format.
    name = detect(record) if format == "auto" else format
    return "unknown format" if name is None else CONVERTERS[name](record, turns)


def _detect(fields: Fields, has: Callable[[Any], bool]) -> str | None:
    """Return one of the formats with two sides. has: says whether the value of a key counts."""

    def any_of(keys: tuple[str, ...]) -> bool:
        return any(has(fields.get(key)) for key in keys)

    # The order decides for a record with the keys of several formats.
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


def _conversation(fields: Fields, key: str | None, name: str, turns: str) -> Converted:
    """Convert the list of turns under a key, the record's `chosen` answering its last turn.

    fields: the record with lower-case keys.
    key: the key that holds the turns; None when the record has none.
    name: the key's usual name, for the reason.
    turns: first, all or last.
    """
    value = fields.get(key) if key else None
    if not isinstance(value, list | Mapping):
        return f"no list {name}"
    return exchanges(value, turns, fields.get("chosen"))


def _instances(fields: Fields, instances: list[Any], turns: str) -> Converted:
    """Convert a task of self-instruct: one instruction, several inputs with their outputs."""
    examples: list[Example] = []
    reasons: list[Reason] = []
    # An instance may have an instruction of its own, which replaces that of the task.
    for instance in instances:
        if not isinstance(instance, Mapping):
            reasons.append("an instance is not an object")
            continue
        own = {key: value for key, value in _fields(instance).items() if key != "instances"}
        converted = from_alpaca({**_instruction_only(fields), **own}, turns="first")
        if isinstance(converted, str):
            reasons.append(converted)
        else:
            examples += converted
    return select(examples, turns) if examples else next(iter(reasons), "no instance")


def _instruction_only(fields: Fields) -> Fields:
    return {key: fields[key] for key in INSTRUCTION_KEYS if key in fields}


def _one(instruction: str | None, response: str | None) -> Converted:
    """Make the only example of a record, or return why there is none."""
    example = make_example(instruction, response)
    return [example] if isinstance(example, Example) else example


def _fields(record: Mapping[str, Any]) -> Fields:
    """Return the record with lower-case keys; of equal keys the first that is filled counts."""
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
    """Say whether a value is neither null (NaN in number columns), blank text nor an empty list."""
    if isinstance(value, str):
        return bool(value.strip())
    if isinstance(value, list | Mapping):
        return bool(value)
    return value is not None and not (isinstance(value, float) and math.isnan(value))


def _first(fields: Fields, keys: tuple[str, ...]) -> str | None:
    """Return the first of `keys` that is filled, or else the first that is present, or None."""
    return next((key for has in (_filled, _present) for key in keys if has(fields.get(key))), None)


def _pair(fields: Fields, has: Callable[[Any], bool]) -> tuple[str, str] | None:
    """Return the first pair of PROBLEM_KEYS of which both count, or the pair without a header."""
    if fields.keys() == set(HEADERLESS_PAIR):
        return HEADERLESS_PAIR
    return next((pair for pair in PROBLEM_KEYS if all(has(fields.get(key)) for key in pair)), None)


def _either(names: tuple[str, ...]) -> str:
    return f"{', '.join(names[:-1])} or {names[-1]}"
