"""Llama-3.1-8B without weights: parameter counts by name, one forward and backward on fake tensors.

The dimensions come from `llama_3_1_8b.json`, the expected counts from the specification.
"""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import LlamaConfig, LlamaForCausalLM

from cdpvae import SoftPromptVAELoss, StepPlan
from cdpvae.batch import PackedText, VAEBatch
from cdpvae.compatibility import forward
from cdpvae.config import ModelConfig
from cdpvae.models.text_vae import Backbone, LlamaSoftPromptVAE

DIMENSIONS = json.loads(Path(__file__).with_name("llama_3_1_8b.json").read_text())
ROWS, INSTRUCTION, RESPONSE = 8, 40, 600


def build(config: ModelConfig) -> LlamaSoftPromptVAE:
    """The whole model on the meta device, base in bf16."""
    with torch.device("meta"):
        llama = LlamaForCausalLM(LlamaConfig(**DIMENSIONS)).to(torch.bfloat16)
        return LlamaSoftPromptVAE(config, Backbone(llama, config)).to(torch.bfloat16)


@pytest.fixture(scope="module")
def model() -> LlamaSoftPromptVAE:
    return build(ModelConfig())


def count(parameters) -> int:
    return sum(p.numel() for p in parameters)


def test_parameter_counts_by_name(model):
    named = dict(model.named_parameters())
    assert count(p for n, p in named.items() if "lora_" in n) == 167_772_160
    assert count(model.projector.parameters()) == 545_667_072
    assert count(model.pooling.parameters()) == 67_137_536
    assert count(model.latent.encoder.parameters()) == 12_849_280
    assert count(model.bow_head.parameters()) == 8_336_640
    assert count(p for p in named.values() if p.requires_grad) == 801_762_688
    assert count(p for p in named.values() if not p.requires_grad) == 8_030_261_248


def test_dimensions_follow_the_backbone(model):
    assert model.projector.norm.normalized_shape == (4096,)
    assert model.pooling.num_heads == 8
    assert ModelConfig().lora_scaling == 16.0


class LargestLogits(TorchDispatchMode):
    """The most rows that a (rows, vocabulary) tensor has had, transposed weights left out."""

    def __init__(self, vocab_size: int, hidden_size: int):
        super().__init__()
        self.vocab_size, self.hidden_size, self.rows = vocab_size, hidden_size, 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        for tensor in out if isinstance(out, tuple | list) else (out,):
            if isinstance(tensor, torch.Tensor) and tensor.dim() == 2:
                rows, columns = tensor.shape
                if columns == self.vocab_size and rows != self.hidden_size:
                    self.rows = max(self.rows, rows)
        return out


def fake_batch() -> VAEBatch:
    instruction = PackedText.from_lists([[128000] + [7] * (INSTRUCTION - 1)] * ROWS)
    response = PackedText.from_lists([[128000] + [9] * (RESPONSE - 2) + [128001]] * ROWS)
    return VAEBatch.build(instruction, response, torch.arange(ROWS))


@pytest.mark.parametrize(
    "settings",
    [{}, {"deep_prefix": True, "encoder_layer": "mix"}],
    ids=["description", "deep prefix and mix"],
)
def test_forward_and_backward(settings):
    """Activation checkpointing on, word dropout on, categorical BoW, per-token loss."""
    model = build(ModelConfig(**settings))
    model.set_gradient_checkpointing(True)
    model.train()
    batch = fake_batch()
    targets = batch.targets.numel()
    loss_fn = SoftPromptVAELoss(latent_dim=64, bow_reduction="categorical")
    plan = StepPlan(0, 0, 1.0, 1.5, 0.1, 0.4, float(targets), False)
    with FakeTensorMode(allow_non_fake_inputs=True) as mode:
        materialise(model, mode)
        fake = VAEBatch(
            *(_fake_text(mode, text) for text in (batch.instruction, batch.response)),
            None,
            mode.from_tensor(batch.sample_index),
            mode.from_tensor(batch.target_positions),
            mode.from_tensor(batch.targets),
        )
        with LargestLogits(DIMENSIONS["vocab_size"], DIMENSIONS["hidden_size"]) as logits:
            output = forward(model, fake, plan, loss_fn=loss_fn)
            output.loss.backward()
    assert 0 < logits.rows < targets / 4, "the decoder's logits were made whole"
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            assert parameter.grad is not None and parameter.grad.shape == parameter.shape, name
        else:
            assert parameter.grad is None, name


def materialise(model: torch.nn.Module, mode: FakeTensorMode) -> None:
    """Meta parameters and buffers become fake CPU tensors of the same shape and dtype."""
    for module in model.modules():
        for name, parameter in list(module._parameters.items()):
            if parameter is not None:
                fake = torch.empty(parameter.shape, dtype=parameter.dtype, device="cpu")
                module._parameters[name] = torch.nn.Parameter(fake, parameter.requires_grad)
        for name, buffer in list(module._buffers.items()):
            if buffer is not None:
                module._buffers[name] = torch.empty(buffer.shape, dtype=buffer.dtype, device="cpu")


def _fake_text(mode: FakeTensorMode, text: PackedText) -> PackedText:
    return PackedText(mode.from_tensor(text.ids), mode.from_tensor(text.cu_seqlens), text.max_len)
