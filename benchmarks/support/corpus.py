"""Inputs of `benchmarks/data.py`: real public records, and edited copies of them."""

from __future__ import annotations

import json
import random
import shutil
from collections.abc import Iterator
from pathlib import Path

from cdpvae.preprocessing.formats.convert import convert
from cdpvae.preprocessing.readers.source import Source

SOURCES = (
    "gpteacher/codegen-instruct.json",
    "gpteacher/toolformer-dedupe-only-dataset.json",
    "gsm8k_alpaca/gsm_8k_train.json",
    "llama_factory/dpo_en_demo.json",
    "llama_factory/kto_en_demo.json",
    "fastchat/dummy_conversation.json",
    "tinker/conversations.jsonl",
    "self_instruct/user_oriented_instructions.jsonl",
    "mbpp/mbpp.jsonl",
)
# The inputs of the run over all real files. Evaluation sets are among them to be counted only.
FILES = (
    *SOURCES,
    "llama_factory/glaive_toolcall_en_demo.json",
    "fireact/messages_hotpotqa.jsonl",
    "self_instruct/seed_tasks.jsonl",
    "humaneval/HumanEval.jsonl.gz",
    "imobench/proofbench.csv",
    *(f"mgsm/mgsm_{language}.tsv" for language in ("en", "de", "es", "fr", "ru", "zh", "ja")),
)


def real_pairs(shared: Path) -> list[tuple[str, str]]:
    """Return every pair of the real files."""
    pairs = []
    for name in SOURCES:
        for raw in Source.parse(str(shared / name)).records():
            converted = raw.problem or convert(raw.value)
            if not isinstance(converted, str):
                pairs += [(example.instruction, example.response) for example in converted]
    return pairs


def edited(pairs: list[tuple[str, str]], draw: random.Random) -> Iterator[tuple[str, str]]:
    """Yield pairs without end: each pair once as it is, then edited copies.

    Of a hundred copies 5 are exact, 15 differ in one word, and 80 have a third of their words from
    other records, which leaves few common shingles.
    """
    # Words of other records, to replace words with.
    words = [word for pair in draw.sample(pairs, min(len(pairs), 2000)) for word in pair[1].split()]

    def change(text: str, share: float) -> str:
        """Replace a share of the words, or one word for a share of 0."""
        pieces = text.split(" ")
        count = max(1, int(len(pieces) * share)) if share else 1
        for at in draw.sample(range(len(pieces)), min(count, len(pieces))):
            pieces[at] = draw.choice(words)
        return " ".join(pieces)

    # Each pair once, then copies.
    yield from draw.sample(pairs, len(pairs))
    while True:
        instruction, response = draw.choice(pairs)
        kind = draw.random()
        if kind < 0.2:
            yield instruction, response if kind < 0.05 else change(response, 0)
        else:
            yield change(instruction, 0.34), change(response, 0.34)


def write_corpus(shared: Path, work: Path, records: int, seed: int) -> Path:
    """Write an input and return its path; smaller inputs are beginnings of larger ones.

    shared: directory with the real data.
    work: directory to write to.
    records: how many records.
    seed: of the edits.
    """
    path = work / f"records-{records}.jsonl"
    work.mkdir(parents=True, exist_ok=True)
    stream = edited(real_pairs(shared), random.Random(seed))
    with path.open("w") as file:
        for _, (instruction, response) in zip(range(records), stream, strict=False):
            file.write(json.dumps({"instruction": instruction, "output": response}) + "\n")
    return path


def tokenizer_directory(shared: Path, work: Path) -> Path:
    """Copy the real tokenizer to a file with the usual name; return its directory."""
    path = work / "tokenizer"
    path.mkdir(parents=True, exist_ok=True)
    shutil.copy(shared / "tok_mistral_v1/tokenizer.model.v1", path / "tokenizer.model")
    return path
