"""The whole pipeline on real files that are not part of this repository, with a real tokenizer."""

from __future__ import annotations

import json

import pytest
from datasets import load_from_disk

from cdpvae.config import DataConfig
from cdpvae.preprocessing.pipeline import Processed, preprocess
from support.overlap import five_grams, pairs_by_brute_force
from support.processed import rows_of
from support.rows import SHARED


@pytest.fixture
def process(tmp_path, real_wrapper):
    """process("a/b.json", ..., **settings) -> Processed, with the default settings otherwise."""

    def run(*names: str, **settings) -> Processed:
        paths = [SHARED / name for name in names]
        missing = [path for path in paths if not path.exists()]
        if missing:
            pytest.skip(f"{missing[0]} is missing: real data lies beside the repository, not in it")
        if "decontaminate" in settings:
            settings["decontaminate"] = tuple(str(SHARED / n) for n in settings["decontaminate"])
        config = DataConfig(
            input=tuple(map(str, paths)), processed_dir=str(tmp_path / "out"), workers=1, **settings
        )
        return preprocess(config, real_wrapper, progress=False)

    return run


# What each file comes to under the default settings: in, converted, filtered, duplicates, kept.
# `python -m benchmarks.data --part files` prints the same with all reasons (docs/data.md).
EXPECTED = {
    "gpteacher/codegen-instruct.json": (4535, 4535, 191, 0, 4344),
    "gpteacher/toolformer-dedupe-only-dataset.json": (7673, 7673, 1743, 175, 5755),
    "gsm8k_alpaca/gsm_8k_train.json": (7473, 7473, 3, 0, 7470),
    "fastchat/dummy_conversation.json": (500, 500, 425, 0, 75),
    "fireact/messages_hotpotqa.jsonl": (500, 500, 1, 0, 499),
    "llama_factory/dpo_en_demo.json": (300, 300, 70, 5, 225),
    "llama_factory/kto_en_demo.json": (300, 300, 72, 2, 226),
    "llama_factory/glaive_toolcall_en_demo.json": (300, 194, 18, 32, 144),
    "tinker/conversations.jsonl": (128, 128, 114, 0, 14),
    "self_instruct/seed_tasks.jsonl": (175, 175, 65, 0, 110),
    "self_instruct/user_oriented_instructions.jsonl": (252, 252, 73, 0, 179),
    "mbpp/mbpp.jsonl": (974, 974, 47, 1, 926),
    "humaneval/HumanEval.jsonl.gz": (164, 164, 23, 1, 140),
    "imobench/proofbench.csv": (60, 60, 21, 0, 39),
}


@pytest.mark.parametrize("name", EXPECTED)
def test_counts_of_a_real_file(process, name):
    done = process(name)
    counts = done.manifest["counts"]
    found = (
        counts["read"],
        counts["converted"],
        sum(counts["filtered"].values()),
        sum(counts["duplicates"].values()),
        counts["kept"],
    )
    assert found == EXPECTED[name]
    assert counts["read"] == counts["converted"] + sum(counts["not_converted"].values())
    assert counts["pairs"] == sum(found[2:])
    report = json.loads((done.path / "report.json").read_text())
    reasons = [*counts["not_converted"], *counts["filtered"], *counts["duplicates"]]
    assert len(report["examples"]) == len(reasons), "an example of every reason"
    assert len(rows_of(done.path)) == counts["kept"]


@pytest.mark.parametrize("language", ["en", "de", "es", "ru", "ja", "fr", "zh"])
def test_parallel_questions_are_known_by_their_language(process, language):
    """250 questions each; the answers are numbers, which no language has."""
    name = f"mgsm/mgsm_{language}.tsv"
    done = process(name, languages=(language,), min_response_tokens=1)
    counts = done.manifest["counts"]
    assert counts["read"] == counts["converted"] == 250
    # Right, and certain enough to keep.
    assert counts["filtered"].get(f"language is not {language}", 0) <= 5
    report = json.loads((done.path / "report.json").read_text())
    assert report["languages"][language] >= 248


def test_english_that_asks_for_code_is_english(process):
    counts = process("gpteacher/codegen-instruct.json").manifest["counts"]
    assert counts["filtered"]["language is not en"] <= 0.03 * counts["converted"]


def test_what_is_evaluated_on_is_not_trained_on(process):
    """Everything of the evaluation file that another filter has not dropped before."""
    names = ("tinker/conversations.jsonl", "mbpp/mbpp.jsonl")
    done = process(*names, decontaminate=names[1:])
    mbpp = done.manifest["sources"]["mbpp.jsonl"]
    other = {"language is not en", "special characters"}
    assert mbpp["kept"] == 0 and mbpp["duplicates"] == {}
    assert mbpp["filtered"]["in an evaluation file"] >= 930
    assert set(mbpp["filtered"]) == {"in an evaluation file", *other}
    rest = done.manifest["sources"]["conversations.jsonl"]
    assert "in an evaluation file" not in rest["filtered"]
    assert {row["source"] for row in rows_of(done.path)} == {"conversations.jsonl"}


def test_no_near_duplicate_pairs_are_left(process):
    """By brute force over what is kept: the pipeline's own index has no part in it."""
    short = {"min_instruction_tokens": 1, "min_response_tokens": 1}
    done = process("fastchat/dummy_conversation.json", language_filter=False, **short)
    counts = done.manifest["counts"]
    assert counts["duplicates"]["exact duplicate"] > 100
    assert counts["duplicates"]["near-duplicate"] > 0
    texts = [f"{row['instruction']}\n{row['response']}" for row in rows_of(done.path)]
    assert not pairs_by_brute_force([five_grams(text) for text in texts], 0.85)


@pytest.mark.parametrize(
    ("train", "validation"),
    [
        ("coco_captions/image_coco.txt", "coco_captions/test_coco.txt"),
        ("ptb/train.txt", "ptb/valid.txt"),
    ],
)
def test_a_corpus_with_a_validation_file_of_its_own(process, train, validation):
    """Rows are the distinct lines, those of validation first: as a set of lines counts them."""
    done = process(
        train,
        validation_input=(str(SHARED / validation),),
        format="text",
        target="reconstruction",
        min_instruction_tokens=1,
        min_response_tokens=3,
        language_filter=False,
        quality_filter=False,
        deduplication="exact",
    )
    lines = {
        split: [line for line in (SHARED / name).read_text().split("\n") if line.strip()]
        for split, name in (("train", train), ("validation", validation))
    }
    assert not done.manifest["counts"]["filtered"]
    held_out = dict.fromkeys(lines["validation"])
    rest = dict.fromkeys(line for line in lines["train"] if line not in held_out)
    for split, expected in (("train", rest), ("validation", held_out)):
        stored = load_from_disk(str(done.path / split))["response"]
        assert list(stored) == list(expected)
    repeated = sum(line in held_out for line in lines["train"])
    counts = done.manifest["counts"]
    assert counts["duplicates"].get("duplicate of a validation row", 0) == repeated
    within = sum(map(len, lines.values())) - repeated - len(held_out) - len(rest)
    assert counts["duplicates"].get("exact duplicate", 0) == within
