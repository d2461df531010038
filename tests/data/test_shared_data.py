"""Conversion of real files that are not part of this repository."""

from pathlib import Path

import pytest

from cdpvae.data.formats import Example, convert
from cdpvae.data.readers import Source

SHARED = Path(__file__).parents[3] / "shared" / "data"

# (records, converted); what does not convert in glaive is a tool call in the answer's place.
EXPECTED = {
    "coco_captions/image_coco.txt": (10000, 10000),
    "fastchat/dummy_conversation.json": (500, 500),
    "fireact/messages_hotpotqa.jsonl": (500, 500),
    "gpteacher/codegen-instruct.json": (4535, 4535),
    "gpteacher/toolformer-dedupe-only-dataset.json": (7673, 7673),
    "gsm8k_alpaca/gsm_8k_train.json": (7473, 7473),
    "humaneval/HumanEval.jsonl.gz": (164, 164),
    "llama_factory/dpo_en_demo.json": (300, 300),
    "llama_factory/glaive_toolcall_en_demo.json": (300, 194),
    "llama_factory/kto_en_demo.json": (300, 300),
    "mbpp/mbpp.jsonl": (974, 974),
    "tinker/conversations.jsonl": (128, 128),
}


@pytest.mark.parametrize("name", EXPECTED)
def test_real_files_convert(name):
    path = SHARED / name
    if not path.exists():
        pytest.skip(f"{path} is missing: real data lies beside the repository, not in it")
    outcomes = [convert(raw.value) for raw in Source.parse(str(path)).records()]
    converted = sum(isinstance(outcome, Example) for outcome in outcomes)
    assert (len(outcomes), converted) == EXPECTED[name]
    reasons = {outcome for outcome in outcomes if isinstance(outcome, str)}
    assert reasons <= {"the first user turn is answered by a tool or another role"}
