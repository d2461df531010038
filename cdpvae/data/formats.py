"""From a raw record to one exchange: an instruction and a response.

Every converter is a pure function `record -> Example | str`; the string is the reason why the
record cannot be converted, short and constant so that reasons can be counted. Nothing is guessed
beyond the rules below, and no text is altered.

- sharegpt: `conversations: [{from, value}]`; messages: `messages: [{role, content}]`. Either
  spelling of the turns is read in either list. System turns are passed over, and so are turns
  before the first user turn. The exchange is the first user turn and the assistant turn right
  after it; a tool call or a second user turn in its place is a reason. When the conversation ends
  on that user turn, the record's `chosen` (preference data) answers it.
- alpaca: `instruction` (or `question`), a non-empty `input` appended after an empty line; the
  answer is the first present of `output`, `response`, `answer`, `chosen`.
- magicoder: `problem`/`solution`, also `text`/`code` and `prompt`/`canonical_solution`.
- text: `text` is instruction and response at once, for reconstruction.
- auto: the first of these formats, in this order, whose keys the record has.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

USER_ROLES = frozenset({"human", "user", "prompter"})
ASSISTANT_ROLES = frozenset({"gpt", "assistant", "model", "chatgpt", "bot"})
SYSTEM_ROLES = frozenset({"system", "developer"})
ALPACA_INSTRUCTION_KEYS = ("instruction", "question")
ALPACA_ANSWER_KEYS = ("output", "response", "answer", "chosen")
PROBLEM_KEYS = (("problem", "solution"), ("text", "code"), ("prompt", "canonical_solution"))


@dataclass(frozen=True)
class Example:
    """One exchange, as text. Neither side is empty."""

    instruction: str
    response: str


Converter = Callable[[Mapping[str, Any]], Example | str]


def from_sharegpt(record: Mapping[str, Any]) -> Example | str:
    """`conversations: [{from, value}]`."""
    return _first_exchange(record, "conversations")


def from_messages(record: Mapping[str, Any]) -> Example | str:
    """`messages: [{role, content}]`."""
    return _first_exchange(record, "messages")


def from_alpaca(record: Mapping[str, Any]) -> Example | str:
    """`instruction, input, output` and the answer's other names."""
    key = _first_present(record, ALPACA_INSTRUCTION_KEYS)
    if key is None:
        return "no key instruction or question"
    answer = _first_present(record, ALPACA_ANSWER_KEYS)
    if answer is None:
        return "no key " + ", ".join(ALPACA_ANSWER_KEYS[:-1]) + f" or {ALPACA_ANSWER_KEYS[-1]}"
    instruction, context = _text(record[key]), _text(record.get("input") or "")
    if context is None:
        return "input is not text"
    if instruction is not None and context.strip():
        instruction = f"{instruction}\n\n{context}" if instruction.strip() else context
    return _example(instruction, _answer_text(record[answer]))


def from_magicoder(record: Mapping[str, Any]) -> Example | str:
    """`problem, solution` and the other names of a task and its program."""
    pair = _problem_pair(record)
    if pair is not None:
        return _example(_text(record[pair[0]]), _text(record[pair[1]]))
    return "no pair of keys " + ", ".join("/".join(pair) for pair in PROBLEM_KEYS)


def from_text(record: Mapping[str, Any]) -> Example | str:
    """`text`: read by the encoder and written by the decoder."""
    if record.get("text") is None:
        return "no key text"
    return _example(_text(record["text"]), _text(record["text"]))


CONVERTERS: dict[str, Converter] = {
    "sharegpt": from_sharegpt,
    "messages": from_messages,
    "alpaca": from_alpaca,
    "magicoder": from_magicoder,
    "text": from_text,
}


def detect(record: Mapping[str, Any]) -> str | None:
    """The format whose keys the record has, or None. Order as in the module's docstring."""
    if record.get("conversations") is not None:
        return "sharegpt"
    if record.get("messages") is not None:
        return "messages"
    if _first_present(record, ALPACA_INSTRUCTION_KEYS) is not None:
        return "alpaca"
    if _problem_pair(record) is not None:
        return "magicoder"
    return "text" if record.get("text") is not None else None


def convert(record: object, format: str = "auto") -> Example | str:
    """One record -> Example, or the reason why not. `format`: a key of CONVERTERS, or auto.

    Never raises for any JSON value. Raises ValueError for an unknown format.
    """
    if format != "auto" and format not in CONVERTERS:
        raise ValueError(f"format={format!r} must be auto or one of {', '.join(CONVERTERS)}")
    if not isinstance(record, Mapping):
        return "record is not an object"
    name = detect(record) if format == "auto" else format
    return "unknown format" if name is None else CONVERTERS[name](record)


def _first_exchange(record: Mapping[str, Any], key: str) -> Example | str:
    turns = record.get(key)
    if not isinstance(turns, list):
        return f"no list {key}"
    if not all(isinstance(turn, Mapping) for turn in turns):
        return "a turn is not an object"
    roles = [_role(turn) for turn in turns]
    spoken = [i for i, role in enumerate(roles) if role not in SYSTEM_ROLES]
    first = next((at for at, i in enumerate(spoken) if roles[i] in USER_ROLES), None)
    if first is None:
        return "no user turn"
    instruction = _turn_text(turns[spoken[first]])
    if first + 1 < len(spoken):
        answer = spoken[first + 1]
        if roles[answer] in USER_ROLES:
            return "two user turns before an answer"
        if roles[answer] not in ASSISTANT_ROLES:
            return "the first user turn is answered by a tool or another role"
        return _example(instruction, _turn_text(turns[answer]))
    if record.get("chosen") is None:
        return "ends on the user turn"
    return _example(instruction, _answer_text(record["chosen"]))


def _role(turn: Mapping[str, Any]) -> str:
    role = turn.get("from", turn.get("role"))
    return role.strip().lower() if isinstance(role, str) else ""


def _turn_text(turn: Mapping[str, Any]) -> str | None:
    return _text(turn.get("value", turn.get("content")))


def _answer_text(value: Any) -> str | None:
    """An answer is text, a turn, or a list of turns of which the last assistant turn counts."""
    if isinstance(value, list) and all(isinstance(turn, Mapping) for turn in value):
        answers = [turn for turn in value if _role(turn) in ASSISTANT_ROLES]
        return _turn_text(answers[-1]) if answers else _text(value)
    return _turn_text(value) if isinstance(value, Mapping) else _text(value)


def _text(value: Any) -> str | None:
    """Text, or the text parts of a list of parts, one a line. None for anything else."""
    if isinstance(value, str):
        return value
    if isinstance(value, list) and value and all(isinstance(part, Mapping) for part in value):
        texts = [part["text"] for part in value if isinstance(part.get("text"), str)]
        return "\n".join(texts) if texts else None
    return None


def _first_present(record: Mapping[str, Any], keys: tuple[str, ...]) -> str | None:
    """The first of `keys` whose value is not null (hub data fills absent columns with null)."""
    return next((key for key in keys if record.get(key) is not None), None)


def _problem_pair(record: Mapping[str, Any]) -> tuple[str, str] | None:
    return next(
        (pair for pair in PROBLEM_KEYS if all(record.get(key) is not None for key in pair)), None
    )


def _example(instruction: str | None, response: str | None) -> Example | str:
    for name, text in (("instruction", instruction), ("response", response)):
        if text is None:
            return f"{name} is not text"
        if not text.strip():
            return f"{name} is empty"
        if not _is_unicode(text):
            return f"{name} is not valid Unicode"
    return Example(instruction, response)


def _is_unicode(text: str) -> bool:
    """False for lone surrogates, which JSON can spell and UTF-8 cannot."""
    try:
        text.encode("utf-8")
    except UnicodeEncodeError:
        return False
    return True
