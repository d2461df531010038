"""Inputs with something of everything, and reading back what preprocessing wrote."""

from __future__ import annotations

import json
import random
from pathlib import Path

from datasets import load_from_disk

# What judges real text is off: the records are words drawn at random.
MIXED = {
    "language_filter": False,
    "quality_filter": False,
    "min_instruction_tokens": 3,
    "min_response_tokens": 3,
    "validation_fraction": 0.2,
}
WORDS = (
    "amber basin cedar delta ember fjord grove heron inlet juniper knoll lagoon meadow north "
    "orchard prairie quarry ridge summit thicket upland valley willow yonder zephyr bridge"
).split()


def mixed_records(directory: Path, count: int, seed: int = 0) -> tuple[str, ...]:
    """Two JSONL files of `count` records each: pairs, conversations, exact and near duplicates,
    broken lines, records too short. Every kind occurs in both files.
    """
    draw = random.Random(seed)
    pairs: list[tuple[str, str]] = []
    paths = []
    for number in range(2):
        path = directory / f"mixed-{number}.jsonl"
        with path.open("w") as file:
            for _ in range(count):
                file.write(_line(draw, pairs) + "\n")
        paths.append(str(path))
    return tuple(paths)


def _line(draw: random.Random, pairs: list[tuple[str, str]]) -> str:
    kind = draw.random()
    if kind < 0.05:
        return '{"instruction": "cut'
    if kind < 0.08:
        return json.dumps({"title": "no pair"})
    if kind < 0.10:
        return json.dumps({"instruction": "a", "output": "b"})
    if pairs and kind < 0.25:
        instruction, response = draw.choice(pairs)
        if kind < 0.18:  # one word of about sixty: Jaccard above 0.85
            response += " " + draw.choice(WORDS)
    else:
        instruction = " ".join(draw.choices(WORDS, k=20))
        response = " ".join(draw.choices(WORDS, k=40))
    if kind < 0.5:
        turns = [("human", instruction), ("gpt", response)]
        for _ in range(draw.randrange(3)):
            turns += [("human", "And then " + draw.choice(WORDS) + "?"), ("gpt", response[:80])]
        return json.dumps({"conversations": [{"from": a, "value": b} for a, b in turns]})
    pairs.append((instruction, response))
    return json.dumps({"instruction": instruction, "output": response})


def rows_of(path: Path) -> list[dict]:
    """Every row of every split, in reading order."""
    rows = [row for split in ("train", "validation") if (path / split).exists()
            for row in load_from_disk(str(path / split))]  # fmt: skip
    return sorted(rows, key=lambda row: row["record_id"])


def files_of(path: Path) -> dict[str, bytes]:
    """Every file's bytes; of the manifest all but `run`, which tells when and how long."""
    found = {str(p.relative_to(path)): p.read_bytes() for p in path.rglob("*") if p.is_file()}
    manifest = json.loads(found.pop("manifest.json"))
    del manifest["run"]
    return {**found, "manifest": json.dumps(manifest).encode()}
