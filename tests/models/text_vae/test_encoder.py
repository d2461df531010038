"""An encoder that learns: a LoRA of its own on the same weights, trained through z."""

from __future__ import annotations

import pytest
import torch
from peft.tuners.lora import LoraLayer

from cdpvae.config import ModelConfig, NoLatentConfig
from cdpvae.models.text_vae import LlamaSoftPromptVAE
from cdpvae.models.text_vae.packing import Packing
from cdpvae.profiling import training_flops


def lora_parameters(model, adapter):
    return {
        name: parameter
        for name, parameter in model.backbone.named_parameters()
        if "lora_" in name and f".{adapter}." in name
    }


def disturb(model, adapter):
    """Give a LoRA other weights, so that it does something."""
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in lora_parameters(model, adapter).values():
            noise = torch.randn(parameter.shape, generator=generator, dtype=torch.float64)
            parameter.add_(0.03 * noise)


def packing_of(text):
    return Packing.of(text.cu_seqlens, text.ids.numel(), text.max_len)


def means(model, batch):
    return model.infer(batch.instruction).mu


@torch.no_grad()
def hidden(model, batch, z):
    return model.decode(z, batch.response.ids, batch.response).hidden


def test_each_pass_has_its_own_lora(make_model, batch):
    model = make_model(encoder="lora").eval()
    z = torch.ones(batch.num_rows, *model.latent.shape, dtype=torch.float64)
    codes, states = means(model, batch).detach(), hidden(model, batch, z)
    disturb(model, "encoder")
    moved = means(model, batch).detach()
    assert (moved - codes).abs().max() > 1e-3
    assert torch.equal(hidden(model, batch, z), states)
    disturb(model, "default")
    assert torch.equal(means(model, batch), moved)
    assert (hidden(model, batch, z) - states).abs().max() > 1e-3


def test_a_new_encoder_is_the_frozen_one(make_model, batch):
    """LoRA starts at B = 0: the first step is that of a frozen encoder with the same heads."""
    frozen, learning = make_model(), make_model(encoder="lora")
    # The base alone is compared: the further adapter draws from the generator before the heads.
    for name, tensor in lora_parameters(learning, "encoder").items():
        if "lora_B" in name:
            torch.nn.init.zeros_(tensor)
    learning.pooling.load_state_dict(frozen.pooling.state_dict())
    learning.latent.load_state_dict(frozen.latent.state_dict())
    torch.testing.assert_close(means(learning.eval(), batch), means(frozen.eval(), batch))


@pytest.mark.parametrize("layer", ["last", 2, "mix"])
def test_gradients_are_those_of_finite_differences(make_model, batch, layer):
    model = make_model(encoder="lora", encoder_layer=layer).eval()
    disturb(model, "encoder")
    target = lora_parameters(model, "encoder")
    name = next(name for name in target if "layers.1." in name and "q_proj.lora_B" in name)
    weight = target[name]

    # Of the states themselves. Llama's norms compute in fp32, hence the step and the tolerance.
    packing = packing_of(batch.instruction)
    direction = torch.randn(32, generator=torch.Generator().manual_seed(3), dtype=torch.float64)

    def loss():
        states = model.backbone.encode(batch.instruction, packing)
        return sum((state @ direction).sum() for state in states)

    loss().backward()
    assert weight.grad is not None and weight.grad[0, 0] != 0
    with torch.no_grad():
        values = []
        for move in (1e-4, -2e-4):
            weight[0, 0] += move
            values.append(loss())
    numeric = (values[0] - values[1]) / 2e-4
    torch.testing.assert_close(weight.grad[0, 0], numeric, rtol=1e-2, atol=1e-3)


def test_recomputed_layers_run_with_their_own_lora(make_model, batch):
    """Checkpointing runs the encoder's layers again when the decoder's LoRA is the active one."""
    grads = []
    for recompute in (False, True):
        model = make_model(encoder="lora")
        for adapter in ("encoder", "default"):
            disturb(model, adapter)
        model.set_gradient_checkpointing(recompute)
        output = model.train()(batch)
        (output.decoded.hidden.square().sum() + output.code.mu.sum()).backward()
        named = model.backbone.named_parameters()
        grads.append({n: p.grad for n, p in named if p.requires_grad})
    assert any(".encoder." in name for name in grads[0])
    for name, plain in grads[0].items():
        assert plain is not None and plain.abs().sum() > 0, name
        torch.testing.assert_close(grads[1][name], plain, msg=name)


def test_a_frozen_encoder_has_no_second_lora(make_model, batch):
    model = make_model()
    assert not lora_parameters(model, "encoder")
    text = batch.instruction
    assert not model.backbone.encode(text, packing_of(text))[0].requires_grad


def test_an_error_inside_leaves_the_decoders_lora_active(make_model):
    model = make_model(encoder="lora")
    with pytest.raises(RuntimeError), model.backbone.encoder_lora():
        raise RuntimeError
    layers = [m for m in model.backbone.peft.modules() if isinstance(m, LoraLayer)]
    assert {tuple(layer.active_adapters) for layer in layers} == {("default",)}


def test_both_are_stored(make_model, batch, tmp_path):
    model = make_model(encoder="lora").eval()
    disturb(model, "encoder")
    disturb(model, "default")
    model.save_pretrained(tmp_path)
    assert (tmp_path / "encoder" / "adapter_model.safetensors").exists()
    # The same base weights; everything trained comes from the files.
    other = make_model(encoder="lora")
    loaded = LlamaSoftPromptVAE.from_pretrained(tmp_path, backbone=other.backbone)
    loaded = loaded.double().eval()
    assert torch.equal(means(loaded, batch), means(model, batch))
    z = torch.ones(batch.num_rows, *model.latent.shape, dtype=torch.float64)
    assert torch.equal(hidden(loaded, batch, z), hidden(model, batch, z))
    (tmp_path / "encoder" / "adapter_config.json").unlink()
    with pytest.raises(ValueError, match="encoder: no adapter_config.json"):
        LlamaSoftPromptVAE.from_pretrained(tmp_path, backbone=make_model(encoder="lora").backbone)


def test_it_is_refused_without_a_latent():
    with pytest.raises(ValueError, match="encoder='lora' has no effect with latent.kind=none"):
        ModelConfig(encoder="lora", latent=NoLatentConfig())


def test_its_backward_is_counted():
    class Shape:
        hidden_size, intermediate_size, num_attention_heads = 8, 16, 2
        num_key_value_heads, head_dim, num_hidden_layers, vocab_size = 2, 4, 3, 10

    def flops(**changes):
        return training_flops(
            Shape(),
            encoder_tokens=100,
            decoder_tokens=0,
            target_tokens=0,
            encoder_layers=3,
            recompute=True,
            **changes,
        )

    assert flops(trains_encoder=True) == 3 * flops()
