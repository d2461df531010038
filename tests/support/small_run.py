"""A small but real training set-up: backbone directory, tokenizer, processed data."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from support.runs import sentences


@pytest.fixture(scope="session")
def backbone_dir(tmp_path_factory) -> Path:
    """A random Llama of a few thousand parameters with a byte-level BPE tokenizer."""
    path = tmp_path_factory.mktemp("backbone")
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=400,
        special_tokens=["<s>", "</s>", "<pad>", "<unk>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
    )
    texts = [" ".join(row.values()) for row in sentences(200)]
    tokenizer.train_from_iterator(texts, trainer)
    fast = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        bos_token="<s>",
        eos_token="</s>",
        pad_token="<pad>",
        unk_token="<unk>",
    )
    fast.save_pretrained(path)
    torch.manual_seed(0)
    config = LlamaConfig(
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        vocab_size=len(fast),
        max_position_embeddings=256,
        bos_token_id=0,
        eos_token_id=1,
        pad_token_id=2,
    )
    LlamaForCausalLM(config).save_pretrained(path)
    return path


@pytest.fixture(scope="session")
def processed_dir(tmp_path_factory, backbone_dir) -> Path:
    """220 pairs through the real preprocessing."""
    from cdpvae import preprocess

    root = tmp_path_factory.mktemp("data")
    source = root / "pairs.jsonl"
    source.write_text("".join(json.dumps(row) + "\n" for row in sentences(220)))
    arguments = ["--input", str(source), "--tokenizer", str(backbone_dir)]
    arguments += ["--processed-dir", str(root / "processed"), "--validation-fraction", "0.1"]
    arguments += ["--min-instruction-tokens", "3", "--min-response-tokens", "5"]
    # Two templates with words filled in: near-duplicates by construction, and hardly English.
    arguments += ["--deduplication", "exact", "--no-language-filter", "--no-quality-filter"]
    assert preprocess.main(arguments) == 0
    return root / "processed"


@pytest.fixture(scope="session")
def small_settings(backbone_dir, processed_dir) -> dict:
    """Nested settings of a run that takes a fraction of a second per step."""
    return {
        "model": {
            "backbone": str(backbone_dir),
            "latent": {"kind": "gaussian", "latent_dim": 8},
            "vae_hidden_dim": 16,
            "num_soft_tokens": 4,
            "pooling_heads": 4,
            "lora_r": 4,
            "lora_alpha": 8,
        },
        "loss": {"beta_cycles": 2, "free_bits": 0.05},
        "data": {"processed_dir": str(processed_dir)},
        "training": {
            "precision": "fp32",
            "per_device_batch_size": 4,
            "gradient_accumulation_steps": 2,
            "max_steps": 8,
            "learning_rate": 1e-2,
            "eta_min": 1e-3,
            "save_steps": 100,
            "logging_steps": 4,
            "eval_steps": 100,
            "eval_rows": 8,
            "sample_rows": 1,
            "sample_max_length": 8,
            "num_threads": 1,
        },
    }
