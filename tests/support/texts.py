"""A tokenizer small enough to train on the spot, and records to process."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast

from cdpvae.data import LlamaTokenizerWrapper
from support.rows import TOKENIZER

SENTENCES = [
    "Write a short story about a quiet painter who keeps a brown horse near the village square.",
    "The old sailor sold fresh bread at the market hall on a rainy morning.",
    "def add(a, b):\n    return a + b",
]


def train_tokenizer(specials: tuple[str, ...] = (), **roles: str) -> PreTrainedTokenizerFast:
    """Byte-level BPE: every text survives encoding and decoding."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=320,
        special_tokens=[*roles.values(), *specials],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(SENTENCES, trainer)
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, **roles)


@pytest.fixture(scope="session")
def build_tokenizer():
    """build_tokenizer(("<other special>",), bos_token="<s>", ...)"""
    return train_tokenizer


@pytest.fixture(scope="session")
def wrapper() -> LlamaTokenizerWrapper:
    return LlamaTokenizerWrapper(train_tokenizer(bos_token="<s>", eos_token="</s>"))


@pytest.fixture(scope="session")
def tokenizer_dir(tmp_path_factory, wrapper) -> Path:
    path = tmp_path_factory.mktemp("tokenizer")
    wrapper.save_pretrained(path)
    return path


@pytest.fixture(scope="session")
def real_wrapper(tmp_path_factory) -> LlamaTokenizerWrapper:
    """A real tokenizer: SentencePiece, 32,000 pieces."""
    if not TOKENIZER.exists():
        pytest.skip(f"{TOKENIZER} is missing: real data lies beside the repository, not in it")
    pytest.importorskip("sentencepiece", reason="reads the tokenizer.model of the real data")
    directory = tmp_path_factory.mktemp("real_tokenizer")
    shutil.copy(TOKENIZER, directory / "tokenizer.model")
    return LlamaTokenizerWrapper.from_pretrained(str(directory))


@pytest.fixture
def write_records(tmp_path):
    """write_records("a.jsonl", [...]) -> path as text; .json is written as an array."""

    def write(name: str, records: list) -> str:
        path = tmp_path / name
        if name.endswith(".json"):
            path.write_text(json.dumps(records))
        else:
            path.write_text("".join(json.dumps(record) + "\n" for record in records))
        return str(path)

    return write


@pytest.fixture(scope="session")
def alpaca_records():
    """alpaca_records(n) -> n distinct records long enough for the default length filter."""

    def make(count: int) -> list[dict[str, str]]:
        return [
            {
                "instruction": f"Write story number {i} about a quiet painter and a brown horse.",
                "output": f"On morning {i} the old sailor, who keeps a horse, sold fresh bread.",
            }
            for i in range(count)
        ]

    return make
