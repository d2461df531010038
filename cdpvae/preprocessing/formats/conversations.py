"""From a list of turns to exchanges: a user turn and the assistant turn right after it.

Rules, none of which looks at what a turn says:

1. A turn is an object with a role (`from` or `role`) and a content (`value`, `content` or `text`):
   text, or a list of parts whose text parts count, one a line. Turns given as columns
   (`{"from": [...], "value": [...]}`) are read as rows.
2. System turns are left out. Turns of one side that follow each other are one turn, joined by an
   empty line.
3. An exchange is a user turn directly followed by an assistant turn. An assistant turn that calls
   a tool is a tool turn. So what the assistant says after a tool's result is no answer to the
   user's turn, whose text does not hold that result; nor is what it says before the first user.
4. A conversation that ends on a user turn is answered by the record's `chosen`, if it has that key.
5. `first` is the exchange of the first user turn, which needs nothing before it to be understood.
   `all` are all exchanges, `last` is the last of them. A conversation without any exchange has the
   reason of its first user turn.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from cdpvae.data.example import Example

# Names of roles in data sets of different origin, compared in lower case.
USER_ROLES = frozenset({"human", "user", "prompter"})
ASSISTANT_ROLES = frozenset(
    {"gpt", "assistant", "model", "chatgpt", "bot", "ai", "bard", "bing", "claude"}
)
SYSTEM_ROLES = frozenset({"system", "developer"})
TOOL_ROLES = frozenset(
    {
        "function_call",
        "tool_call",
        "tool_calls",
        "function",
        "tool",
        "observation",
        "ipython",
        "function_response",
        "tool_response",
    }
)
TURNS = ("first", "all", "last")

# Why a record, or a part of it, gives no example: short and constant, so that it can be counted.
Reason = str

NO_USER_TURN = "no user turn"
NOT_ALL_OBJECTS = "a turn is not an object"
ENDS_ON_USER = "ends on the user turn"
TOOL_ANSWERS = "the user turn is answered by a tool call"
OTHER_ANSWERS = "the user turn is answered by an unknown role"


def exchanges(value: Any, turns: str, answer: Any = None) -> list[Example] | Reason:
    """Return the exchanges of a list of turns that `turns` asks for, or why there are none.

    answer: what replies to a user turn at the end: text, a turn, or a list of turns.
    """
    # Bring the turns into one form, each side's neighbours merged.
    rows = _rows(value)
    if rows is None:
        return NOT_ALL_OBJECTS
    merged = _merge_sides(rows)
    user_turns = [at for at, (side, _) in enumerate(merged) if side == "user"]
    if turns == "first":
        user_turns = user_turns[:1]
    # Each user turn begins an exchange, or has a reason why not.
    examples: list[Example] = []
    reasons: list[Reason] = []
    for at in user_turns:
        exchange = _exchange(merged, at, answer)
        if isinstance(exchange, Example):
            examples.append(exchange)
        else:
            reasons.append(exchange)
    return select(examples, turns) if examples else next(iter(reasons), NO_USER_TURN)


def select(examples: list[Example], turns: str) -> list[Example]:
    """Return the examples that `turns` asks for, of a list that is not empty."""
    if turns == "all":
        return examples
    return examples[:1] if turns == "first" else examples[-1:]


def is_turns(value: Any) -> bool:
    """Say whether a value is a list of turns; in a list of parts the objects have no role."""
    return (
        isinstance(value, list)
        and bool(value)
        and all(isinstance(turn, Mapping) and _role_value(turn) is not None for turn in value)
    )


def answer_text(value: Any) -> str | None:
    """Return the text of an answer: a text, a turn, or the last assistant turn of a list."""
    if is_turns(value):
        answers = [turn for turn in value if _side(turn) == "assistant"]
        return _content(answers[-1]) if answers else None
    return _content(value) if isinstance(value, Mapping) else text_of(value)


def text_of(value: Any) -> str | None:
    """Return a text, or the text parts of a list of parts, one a line. None for anything else."""
    if isinstance(value, str):
        return value
    if not isinstance(value, list):
        return None
    parts = [part.get("text") for part in value if isinstance(part, Mapping)]
    texts = [part for part in parts if isinstance(part, str)]
    return "\n".join(texts) if texts else None


def make_example(instruction: str | None, response: str | None) -> Example | Reason:
    """Make an example of two texts, or return what is wrong with the first bad one.

    A side is wrong when it is not text, empty, or cannot be written as UTF-8.
    """
    fault = _text_fault("instruction", instruction) or _text_fault("response", response)
    if fault is not None:
        return fault
    assert instruction is not None and response is not None
    return Example(instruction, response)


def _text_fault(name: str, text: str | None) -> Reason | None:
    if text is None:
        return f"{name} is not text"
    if not text.strip():
        return f"{name} is empty"
    return None if _is_unicode(text) else f"{name} is not valid Unicode"


def _rows(value: Any) -> list[Mapping[str, Any]] | None:
    """Return the turns as rows, also those given as columns. None when not all are objects."""
    if isinstance(value, Mapping):
        # Columns of equal length are read as rows.
        columns = list(value.values())
        if not columns or not all(isinstance(column, list) for column in columns):
            return None
        if len({len(column) for column in columns}) > 1:
            return None
        return [dict(zip(value, row, strict=True)) for row in zip(*columns, strict=True)]
    if not isinstance(value, list) or not all(isinstance(turn, Mapping) for turn in value):
        return None
    return value


def _merge_sides(turns: list[Mapping[str, Any]]) -> list[tuple[str, str | None]]:
    """Return (side, text) of each turn; neighbours of the user or the assistant become one turn.

    System turns are left out.
    """
    merged: list[tuple[str, str | None]] = []
    for turn in turns:
        side = _side(turn)
        if side == "system":
            continue
        text = _content(turn)
        # Tool turns stay apart: each of them answers a call of its own.
        if merged and merged[-1][0] == side and side in ("user", "assistant"):
            text = _joined(merged.pop()[1], text)
        merged.append((side, text))
    return merged


def _joined(before: str | None, after: str | None) -> str | None:
    """Join the texts of two turns by an empty line; a text that is blank or None adds nothing."""
    filled = [text for text in (before, after) if text is not None and text.strip()]
    return "\n\n".join(filled) if filled else before if after is None else after


def _exchange(merged: list[tuple[str, str | None]], at: int, answer: Any) -> Example | Reason:
    """Return the exchange that the user turn at `at` begins, or why it begins none."""
    # The last turn of a conversation can be answered from outside.
    instruction = merged[at][1]
    if at + 1 == len(merged):
        return ENDS_ON_USER if answer is None else make_example(instruction, answer_text(answer))
    side, response = merged[at + 1]
    if side == "assistant":
        return make_example(instruction, response)
    return TOOL_ANSWERS if side == "tool" else OTHER_ANSWERS


def _side(turn: Mapping[str, Any]) -> str:
    """Return who speaks in a turn: user, assistant, system, tool, or other."""
    # Roles are compared in lower case; a role that is not text is unknown.
    value = _role_value(turn)
    role = value.strip().lower() if isinstance(value, str) else ""
    if role in USER_ROLES:
        return "user"
    if role in ASSISTANT_ROLES:
        calls = turn.get("tool_calls") or turn.get("function_call")
        return "tool" if calls else "assistant"
    if role in SYSTEM_ROLES:
        return "system"
    return "tool" if role in TOOL_ROLES else "other"


def _role_value(turn: Mapping[str, Any]) -> Any:
    role = turn.get("from")
    return turn.get("role") if role is None else role


def _content(turn: Mapping[str, Any]) -> str | None:
    """Return the text of a turn. Parts may be plain text here, as there is only one content."""
    value = next(
        (turn[key] for key in ("value", "content", "text") if turn.get(key) is not None), None
    )
    if isinstance(value, list):
        value = [{"text": part} if isinstance(part, str) else part for part in value]
    return text_of(value)


def _is_unicode(text: str) -> bool:
    """Say whether a text has no lone surrogates, which JSON can spell and UTF-8 cannot."""
    try:
        text.encode("utf-8")
    except UnicodeEncodeError:
        return False
    return True
