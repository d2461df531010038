"""Every data set of the folder `data` beside the repository: what is read and what converts.

The folder is not part of the repository; without it these tests skip. `auto` and `first`, as by
default. `python tests/preprocessing/formats/test_shared_data.py` prints the table.
"""

import json
from collections import Counter
from dataclasses import dataclass, field

import pytest

from cdpvae.preprocessing.formats.convert import convert, detect
from cdpvae.preprocessing.readers.source import Source
from support.runs import REPOSITORY

SHARED = REPOSITORY.parent / "shared" / "data"
MGSM = ("bn", "de", "en", "es", "fr", "ja", "ru", "sw", "te", "th", "zh")
TOOL = "the user turn is answered by a tool call"


@dataclass(frozen=True)
class Expected:
    """records: raw records. pairs: examples under turns=all, where they differ from converted."""

    records: int
    format: str | None
    not_converted: dict[str, int] = field(default_factory=dict)
    pairs: int | None = None

    @property
    def converted(self) -> int:
        return self.records - sum(self.not_converted.values())


EXPECTED = {
    # key `response`
    "gpteacher/toolformer-dedupe-only-dataset.json": Expected(7673, "alpaca"),
    "gpteacher/codegen-instruct.json": Expected(4535, "alpaca"),
    "gsm8k_alpaca/gsm_8k_train.json": Expected(7473, "alpaca"),
    # ends on the user in every row
    "fireact/messages_hotpotqa.jsonl": Expected(500, "messages", pairs=1385),
    # roles function_call and observation; 106 of 300 call a tool at once, 43 of these talk later
    "llama_factory/glaive_toolcall_en_demo.json": Expected(300, "sharegpt", {TOOL: 106}, 535),
    "llama_factory/kto_en_demo.json": Expected(300, "messages", pairs=487),
    # 194 rows have no answer but `chosen`, 80 a system turn
    "llama_factory/dpo_en_demo.json": Expected(300, "sharegpt", pairs=563),
    "fastchat/dummy_conversation.json": Expected(500, "sharegpt", pairs=1000),
    "tinker/conversations.jsonl": Expected(128, "messages"),
    # instances
    "self_instruct/seed_tasks.jsonl": Expected(175, "alpaca"),
    "self_instruct/user_oriented_instructions.jsonl": Expected(252, "alpaca"),
    # text and code
    "mbpp/mbpp.jsonl": Expected(974, "magicoder"),
    # prompt and canonical_solution, in gz
    "humaneval/HumanEval.jsonl.gz": Expected(164, "magicoder"),
    # Problem and Solution, rows of many lines
    "imobench/proofbench.csv": Expected(60, "magicoder"),
    # question and number without a header
    **{f"mgsm/mgsm_{language}.tsv": Expected(250, "magicoder") for language in MGSM},
    # three columns without a header: no instruction, no answer
    "sts_images/2014.images.test.tsv": Expected(750, None, {"unknown format": 750}),
    "sts_images/2015.images.test.tsv": Expected(1500, None, {"unknown format": 1500}),
    "coco_captions/image_coco.txt": Expected(10000, "text"),
    "coco_captions/test_coco.txt": Expected(10000, "text"),
    "wikitext2/test.txt": Expected(2891, "text"),
    # columns mr and ref belong to no format
    "e2e_nlg/testset_w_refs.csv": Expected(4693, None, {"unknown format": 4693}),
}


def shared(name):
    path = SHARED / name
    if not path.exists():
        pytest.skip(f"{path} is missing: real data lies beside the repository, not in it")
    return path


def summary_of(path):
    """(records, formats found, reasons, pairs under turns=all)."""
    formats, reasons, pairs, records = set(), Counter(), 0, 0
    for raw in Source.parse(str(path)).records():
        records += 1
        converted = raw.problem or convert(raw.value)
        if isinstance(converted, str):
            reasons[converted] += 1
        else:
            assert len(converted) == 1
        formats.add(None if raw.problem else detect(raw.value))
        everything = convert(raw.value, turns="all")
        pairs += len(everything) if isinstance(everything, list) else 0
    return records, formats, dict(reasons), pairs


@pytest.mark.parametrize("name", EXPECTED)
def test_every_record_is_converted_or_counted(name):
    expected = EXPECTED[name]
    assert summary_of(shared(name)) == (
        expected.records,
        {expected.format},
        expected.not_converted,
        expected.converted if expected.pairs is None else expected.pairs,
    )


def test_every_data_set_of_the_index_is_expected():
    """INDEX.md's own row counts, for all but models and tokenizers."""
    rows = [line.split(" | ") for line in shared("INDEX.md").read_text().splitlines()]
    counts = {row[0].removeprefix("| "): row[1] for row in rows if len(row) > 5}
    listed = {name: int(count) for name, count in counts.items() if count.isdigit()}
    assert listed == {name: expected.records for name, expected in EXPECTED.items()}


def first_pair(name):
    raw = next(Source.parse(str(shared(name))).records())
    return raw.value, convert(raw.value)[0]


def test_texts_arrive_unaltered():
    """The first record of each kind against the fields that hold its two sides."""
    record, pair = first_pair("llama_factory/dpo_en_demo.json")
    assert [turn["from"] for turn in record["conversations"]] == ["human"]
    assert pair.response == record["chosen"]["value"]
    record, pair = first_pair("mbpp/mbpp.jsonl")
    assert (pair.instruction, pair.response) == (record["text"], record["code"])
    assert "\r\n" in pair.response
    record, pair = first_pair("imobench/proofbench.csv")
    assert (pair.instruction, pair.response) == (record["Problem"], record["Solution"])
    assert pair.instruction.startswith(r"Determine all functions $f: \mathbb{Z}")
    record, pair = first_pair("gpteacher/codegen-instruct.json")
    assert pair.instruction == f"{record['instruction']}\n\n{record['input']}"
    _, pair = first_pair("mgsm/mgsm_en.tsv")
    assert pair.instruction.startswith("Janet’s ducks lay 16 eggs") and pair.response == "18"


def test_the_array_reader_agrees_with_json():
    for name in EXPECTED:
        if name.endswith(".json"):
            path = shared(name)
            found = [raw.value for raw in Source.parse(str(path)).records()]
            assert found == json.loads(path.read_bytes()), name


if __name__ == "__main__":
    for name in EXPECTED:
        records, formats, reasons, pairs = summary_of(SHARED / name)
        converted = records - sum(reasons.values())
        print(f"| {name} | {records} | {converted} | {pairs} | {reasons or ''} |")
