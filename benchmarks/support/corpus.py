"""Inputs of `benchmarks/data.py`: real public records, and as many edited ones as are wanted."""

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
# What a run of all real files takes: the evaluation sets among them are for counting only.
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
    """Every pair of the real files."""
    pairs = []
    for name in SOURCES:
        for raw in Source.parse(str(shared / name)).records():
            outcome = raw.problem or convert(raw.value)
            if not isinstance(outcome, str):
                pairs += [(example.instruction, example.response) for example in outcome]
    return pairs


def edited(pairs: list[tuple[str, str]], draw: random.Random) -> Iterator[tuple[str, str]]:
    """Without end: each pair once as it is, then copies. Of a hundred copies 5 are exact, 15 differ
    in one word, and 80 have a third of their words from other records, which leaves few shingles.
    """
    words = [word for pair in draw.sample(pairs, min(len(pairs), 2000)) for word in pair[1].split()]

    def change(text: str, share: float) -> str:
        pieces = text.split(" ")
        count = max(1, int(len(pieces) * share)) if share else 1
        for at in draw.sample(range(len(pieces)), min(count, len(pieces))):
            pieces[at] = draw.choice(words)
        return " ".join(pieces)

    yield from draw.sample(pairs, len(pairs))
    while True:
        instruction, response = draw.choice(pairs)
        kind = draw.random()
        if kind < 0.2:
            yield instruction, response if kind < 0.05 else change(response, 0)
        else:
            yield change(instruction, 0.34), change(response, 0.34)


def write_corpus(shared: Path, work: Path, records: int, seed: int) -> Path:
    """The input of one size, below `work`; smaller ones are beginnings of larger ones."""
    path = work / f"records-{records}.jsonl"
    work.mkdir(parents=True, exist_ok=True)
    stream = edited(real_pairs(shared), random.Random(seed))
    with path.open("w") as file:
        for _, (instruction, response) in zip(range(records), stream, strict=False):
            file.write(json.dumps({"instruction": instruction, "output": response}) + "\n")
    return path


def tokenizer_directory(shared: Path, work: Path) -> Path:
    """The real tokenizer, where a library finds it by its usual name."""
    path = work / "tokenizer"
    path.mkdir(parents=True, exist_ok=True)
    shutil.copy(shared / "tok_mistral_v1/tokenizer.model.v1", path / "tokenizer.model")
    return path
