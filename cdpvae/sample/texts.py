"""The texts that a small backbone is trained on: read as preprocessing reads them, and split.

A text is a pair (instruction, response), or plain text that stands alone. Whatever
`cdpvae.preprocess` reads can be used, such as `.jsonl` pairs or `.txt` lines, converted by the
same code.
"""

from __future__ import annotations

import random
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from cdpvae.preprocessing.formats.convert import convert, detect
from cdpvae.preprocessing.readers.source import Source

# Without marks, this share of the texts is kept out of training; at most so many are evaluated.
VALIDATION_SHARE, VALIDATION_ROWS = 0.02, 1_000

Parts = tuple[str, ...]
"""(instruction, response), or (text,)"""


@dataclass(frozen=True)
class Text:
    """One text as read. parts: see `Parts`. split: the record's own mark, or None."""

    parts: Parts
    split: str | None = None


def read_texts(source: str) -> tuple[list[Text], dict[str, int]]:
    """Read what `cdpvae.preprocess` would convert, in order, and count what it would skip, by why.

    source: file or hub id. Raises ValueError for an input that cannot be read or has fewer than
    two usable records.
    """
    # Skipped records are counted by reason, and training goes on without them.
    texts: list[Text] = []
    skipped: dict[str, int] = {}
    for record in Source.parse(source).records():
        outcome = record.problem or convert(record.value)
        if isinstance(outcome, str):
            skipped[outcome] = skipped.get(outcome, 0) + 1
            continue
        # Of a conversation only the first exchange is converted. A text has no instruction.
        [example] = outcome
        is_text = detect(record.value) == "text"
        parts = (example.response,) if is_text else (example.instruction, example.response)
        split = record.value.get("split") if isinstance(record.value, Mapping) else None
        texts.append(Text(parts, split))
    if len(texts) < 2:
        why = "".join(f"; {count} skipped: {reason}" for reason, count in skipped.items())
        raise ValueError(
            f"{source}: {len(texts)} usable texts, at least 2 are needed, one to validate on{why}"
        )
    return texts, skipped


def split_texts(texts: Sequence[Text], seed: int) -> tuple[list[Parts], list[Parts]]:
    """Split into (training, validation): by the records' marks if there are any, else at random.

    At most VALIDATION_ROWS validation texts are kept. Raises ValueError when no text is left to
    train on.
    """
    # One marked record is enough: the data then says itself what is held out.
    if any(text.split == "validation" for text in texts):
        train = [text.parts for text in texts if text.split != "validation"]
        held_out = [text.parts for text in texts if text.split == "validation"]
    else:
        order = [text.parts for text in texts]
        random.Random(seed).shuffle(order)
        count = max(1, round(VALIDATION_SHARE * len(order)))
        train, held_out = order[count:], order[:count]
    if not train:
        raise ValueError("every record is marked as validation; nothing is left to train on")
    return train, held_out[:VALIDATION_ROWS]
