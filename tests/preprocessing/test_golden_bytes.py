"""The bytes that version 0.1.0 wrote for five public files, written again."""

from __future__ import annotations

import hashlib

import pyarrow
import pytest

from cdpvae.config import DataConfig
from cdpvae.preprocessing.pipeline import preprocess
from support.rows import SHARED

# SHA-256 of each split's Arrow file, all exchanges of every record, the tokenizer `tok_mistral_v1`.
# A JSON array with conversations that do not convert and exact duplicates; JSON lines with a
# near-duplicate; conversations of several exchanges; questions; programs.
GOLDEN = {
    "llama_factory/glaive_toolcall_en_demo.json": {
        "train": "31660ba6f88677020b59bf9c1d6d6e9cb127ca1b81b1d7b99b29de049eca3b0e",
        "validation": "be6df16737167956a7e28b7d74149aedfe9247c64787bdd33c77f5d0612b6c58",
    },
    "mbpp/mbpp.jsonl": {
        "train": "efac72f576161b7402c6fd860ac767c0af116b9a26657bb89f05dd40a7cd7f52",
        "validation": "7580e54fd1f6d867d62405435ee473b0925fa39e355a0c539fad2fa919a370e2",
    },
    "fastchat/dummy_conversation.json": {
        "train": "ee6aedf4a97197573621d5cf35f15045d7ffdf93a288a9feaaa0f0e768b419e9",
        "validation": "45f98cfc27734db399e40702bcb532d1171eceb008dff9fc659515e64b2e86f0",
    },
    "gsm8k_alpaca/gsm_8k_train.json": {
        "train": "05e23064d334269b5bc6855fefff78fd29bd65b9607970daadbd21038c3c35a0",
        "validation": "2528c977c256d3cab03c16c7bc8b47f914668250f90d3bdb0a954887c9911d7a",
    },
    "gpteacher/codegen-instruct.json": {
        "train": "c7bb0e6a5ffc5da33a193b28beda6717cb49682914997c66ff458ea3dd732b6b",
        "validation": "13baa276d8220e59daaa3744f48c544356db5f6e744352542412be219a91a4c0",
    },
}


@pytest.mark.parametrize("name", GOLDEN)
def test_arrow_files_are_byte_for_byte_those_of_0_1_0(tmp_path, real_wrapper, name):
    if not (SHARED / name).exists():
        pytest.skip(f"{SHARED / name} is missing: real data lies beside the repository, not in it")
    config = DataConfig(
        input=(str(SHARED / name),),
        processed_dir=str(tmp_path / "out"),
        turns="all",
        validation_fraction=0.2,
        workers=1,
    )
    path = preprocess(config, real_wrapper, progress=False).path
    found = {
        file.parent.name: hashlib.sha256(file.read_bytes()).hexdigest()
        for file in sorted(path.glob("*/*.arrow"))
    }
    assert found == GOLDEN[name], f"pyarrow {pyarrow.__version__}; written with 26.0.1"
