"""Tiny Llamas of several shapes, in fp64 so that parity is exact."""

from __future__ import annotations

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from cdpvae.batch import PackedText, VAEBatch
from cdpvae.config import GaussianConfig, ModelConfig
from cdpvae.models.text_vae import Backbone, LlamaSoftPromptVAE

# Each shape is here for what differs: grouped keys; head_dim apart from hidden/heads; tied head.
SHAPES = {
    "grouped": {"num_key_value_heads": 2},
    "wide heads": {"num_key_value_heads": 1, "head_dim": 24},
    "tied": {"num_key_value_heads": 4, "tie_word_embeddings": True},
}


def llama_config(shape: str = "grouped") -> LlamaConfig:
    return LlamaConfig(
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=3,
        num_attention_heads=4,
        vocab_size=64,
        max_position_embeddings=128,
        initializer_range=0.2,
        bos_token_id=1,
        eos_token_id=2,
        pad_token_id=3,
        **SHAPES[shape],
    )


@pytest.fixture
def make_llama():
    """shape -> a fresh LlamaForCausalLM, the same weights every time, fp64."""

    def make(shape: str = "grouped") -> LlamaForCausalLM:
        torch.manual_seed(0)
        return LlamaForCausalLM(llama_config(shape)).double().eval()

    return make


@pytest.fixture
def make_model(make_llama):
    """(shape, settings) -> a LlamaSoftPromptVAE in fp64 with LoRA that does something."""

    def make(shape: str = "grouped", dropout: float = 0.0, **settings) -> LlamaSoftPromptVAE:
        settings = {"latent": GaussianConfig(latent_dim=6), **settings}
        config = ModelConfig(
            vae_hidden_dim=16,
            num_soft_tokens=4,
            pooling_heads=4,
            prefix_hidden_dim=16,
            prefix_bottleneck_dim=8,
            lora_r=4,
            lora_dropout=dropout,
            pooling_dropout=dropout,
            encoder_dropout=dropout,
            projector_dropout=dropout,
            **settings,
        )
        backbone = Backbone(make_llama(shape), config)
        torch.manual_seed(1)
        model = LlamaSoftPromptVAE(config, backbone).double()
        for name, parameter in model.named_parameters():
            if "lora_B" in name:
                torch.nn.init.normal_(parameter, std=0.1)
        return model.eval()

    return make


@pytest.fixture
def batch() -> VAEBatch:
    """Four rows of unequal length."""
    generator = torch.Generator().manual_seed(2)

    def ids(length: int) -> list[int]:
        return torch.randint(4, 64, (length,), generator=generator).tolist()

    instruction = PackedText.from_lists([[1, *ids(n)] for n in (5, 9, 3, 7)])
    response = PackedText.from_lists([[1, *ids(n), 2] for n in (6, 2, 8, 5)])
    return VAEBatch.build(instruction, response, torch.arange(4))
