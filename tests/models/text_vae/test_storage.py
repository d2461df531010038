"""Models on disk, and backbones that must be refused."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch
from peft import PeftModel
from safetensors.torch import load_file, save_file
from transformers import LlamaForCausalLM

from cdpvae.batch import SpecialTokens
from cdpvae.compatibility import forward
from cdpvae.config import ModelConfig, NoLatentConfig
from cdpvae.models.text_vae import Backbone, LlamaSoftPromptVAE, check_vocabulary
from support.runs import REPOSITORY

SHARED = REPOSITORY.parent / "shared" / "data"
needs_shared = pytest.mark.skipif(
    not SHARED.is_dir(), reason="../shared/data is not here: real third-party files"
)


@pytest.fixture
def saved(make_llama, make_model, tmp_path):
    """-> a model of fp32, its backbone's directory, and the directory it was saved to."""
    make_llama().float().save_pretrained(tmp_path / "backbone")
    settings = {"backbone": str(tmp_path / "backbone"), "deep_prefix": True, "encoder_layer": "mix"}
    model = make_model(**settings).float()
    model.save_pretrained(tmp_path / "model")
    return model, tmp_path / "backbone", tmp_path / "model"


def test_round_trip_is_bitwise(saved, batch):
    model, _, directory = saved
    again = LlamaSoftPromptVAE.from_pretrained(directory)
    with torch.no_grad():
        a, b = forward(model, batch, return_logits=True), forward(again, batch, return_logits=True)
    assert torch.equal(a.logits, b.logits) and torch.equal(a.mu, b.mu)
    assert torch.equal(a.bow_logits, b.bow_logits)
    assert not again.training


def test_what_computes_belongs_to_the_machine_and_not_to_the_model(saved):
    """A model trained on a GPU with settings that only a GPU takes loads on a CPU."""
    path = saved[2] / "config.json"
    config = json.loads(path.read_text())
    config["model"] |= {"attention": "varlen", "kernels": "triton"}
    path.write_text(json.dumps(config))
    again = LlamaSoftPromptVAE.from_pretrained(saved[2])
    assert again.config.attention == again.config.kernels == "auto"


def test_only_safetensors_and_json(saved):
    suffixes = {p.suffix for p in saved[2].iterdir()}
    assert suffixes == {".safetensors", ".json", ".md"}
    config = json.loads((saved[2] / "config.json").read_text())
    assert config["lora_scaling"] == saved[0].config.lora_scaling
    assert sum(t.numel() for t in load_file(saved[2] / "heads.safetensors").values()) == sum(
        p.numel() for m in saved[0].head_modules().values() for p in m.parameters()
    )


def test_peft_reads_the_adapter(saved, batch):
    model, backbone, directory = saved
    theirs = PeftModel.from_pretrained(LlamaForCausalLM.from_pretrained(backbone), directory)
    ids = batch.response.rows()[0]
    with torch.no_grad():
        expected = theirs(ids[None]).logits[0]
        plain = LlamaSoftPromptVAE(
            model.config.model_copy(update={"latent": NoLatentConfig(), "deep_prefix": False}),
            model.backbone,
        )
        out = plain.decode(None, ids, type(batch.response).from_lists([ids.tolist()]))
        ours = out.hidden @ model.backbone.head_weight.T
    torch.testing.assert_close(ours, expected, rtol=1e-5, atol=1e-5)


def truncate(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:100])


def reshape_heads(directory: Path) -> None:
    state = load_file(directory / "heads.safetensors")
    state["bow_head.bias"] = state["bow_head.bias"][:-1].clone()
    save_file(state, directory / "heads.safetensors")


def foreign_adapter(directory: Path) -> None:
    """What a GPT-NeoX LoRA looks like."""
    path = directory / "adapter_config.json"
    content = json.loads(path.read_text())
    content |= {"target_modules": ["query_key_value"], "base_model_name_or_path": "open-calm"}
    path.write_text(json.dumps(content))


@pytest.mark.parametrize(
    ("damage", "match"),
    [
        (lambda d: (d / "config.json").unlink(), "config.json"),
        (lambda d: (d / "config.json").write_text("{"), "JSON"),
        (lambda d: (d / "config.json").write_text('{"model_type": "gpt2"}'), "gpt2"),
        (lambda d: (d / "heads.safetensors").unlink(), "heads.safetensors"),
        (lambda d: truncate(d / "adapter_model.safetensors"), "adapter_model.safetensors"),
        (reshape_heads, r"bow_head.bias.*shape"),
        (foreign_adapter, "query_key_value.*open-calm"),
    ],
)
def test_damage_is_one_clear_line(saved, damage, match):
    damage(saved[2])
    with pytest.raises(ValueError, match=match) as refused:
        LlamaSoftPromptVAE.from_pretrained(saved[2])
    assert "\n" not in str(refused.value)


def test_another_backbone_is_refused(saved, make_llama, tmp_path):
    make_llama("wide heads").float().save_pretrained(tmp_path / "other")
    with pytest.raises(ValueError, match="trained on another one"):
        LlamaSoftPromptVAE.from_pretrained(saved[2], backbone=str(tmp_path / "other"))


def write(directory: Path, **files: dict) -> str:
    directory.mkdir()
    for name, content in files.items():
        (directory / f"{name}.json").write_text(json.dumps(content))
    return str(directory)


@pytest.mark.parametrize(
    ("make", "match"),
    [
        (lambda d: str(d / "none"), "none"),
        (lambda d: write(d / "empty"), "no config.json"),
        (lambda d: write(d / "gpt", config={"model_type": "gpt2"}), "'gpt2', only 'llama'"),
        (
            lambda d: write(
                d / "lora",
                adapter_config={
                    "base_model_name_or_path": "open-calm",
                    "target_modules": ["query_key_value"],
                },
            ),
            "PEFT adapter for 'open-calm'",
        ),
    ],
    ids=["missing", "no config", "not a Llama", "adapter"],
)
def test_what_is_no_llama_backbone(tmp_path, make, match):
    with pytest.raises(ValueError, match=match) as refused:
        Backbone.load(ModelConfig(backbone=make(tmp_path)))
    assert "\n" not in str(refused.value)


@needs_shared
def test_a_real_adapter_of_another_architecture_is_refused(saved):
    with pytest.raises(ValueError, match="PEFT adapter"):
        Backbone.load(ModelConfig(backbone=str(SHARED / "lora_opencalm")))
    for name in ("adapter_config.json", "adapter_model.safetensors"):
        shutil.copy(SHARED / "lora_opencalm" / name, saved[2] / name)
    with pytest.raises(ValueError, match="query_key_value"):
        LlamaSoftPromptVAE.from_pretrained(saved[2])


@needs_shared
def test_a_real_llama_directory_loads():
    config = ModelConfig(backbone=str(SHARED / "llama_tiny_verl"), lora_r=2)
    backbone = Backbone.load(config)
    assert (backbone.config.num_hidden_layers, backbone.config.hidden_size) == (4, 128)
    tokens = SpecialTokens(1, 2, 0)
    model = LlamaSoftPromptVAE(config, backbone, tokens).eval()
    ids = torch.tensor([[1, 5, 6, 7]])
    z, _, _ = model.encode(ids, torch.ones_like(ids))
    assert torch.isfinite(z).all() and model.generate(z, max_length=3).max() < 16


def test_settings_that_do_not_fit_the_backbone(make_llama):
    for settings, match in (
        ({"pooling_heads": 5}, "pooling_heads=5 must divide .* 32"),
        ({"encoder_layer": 9}, "encoder_layer=9"),
        ({"lora_target_modules": ("query",)}, "query"),
    ):
        with pytest.raises(ValueError, match=match):
            Backbone(make_llama(), ModelConfig(**settings))


def test_a_tokenizer_that_does_not_fit():
    tokens = SpecialTokens(0, 1, 2, 3, (0, 1, 2, 3))
    check_vocabulary(100, tokens, 99, "good")
    with pytest.raises(ValueError, match="'bad' has ids up to 100.*0 to 99"):
        check_vocabulary(100, tokens, 100, "bad")


def test_two_models_of_one_config_keep_their_own_attention(make_llama):
    """transformers stores the attention implementation in the config both would share."""
    llama = make_llama()
    shared = llama.config
    Backbone(llama, ModelConfig(pooling_heads=4))
    assert shared._attn_implementation != llama.config._attn_implementation
