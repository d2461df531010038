"""Pooling, encoder and projectors: parity with stock modules, initialisations, clamps."""

from __future__ import annotations

import math

import pytest
import torch

from cdpvae.batch import PackedText
from cdpvae.config import ModelConfig
from cdpvae.latents.gaussian import Gaussian, VariationalEncoder
from cdpvae.models.text_vae import AttentionPooling, DeepPrefixProjector, SoftPromptProjector
from cdpvae.models.text_vae.packing import Packing


def packing_of(lengths: list[int]) -> Packing:
    text = PackedText.from_lists([[1] * n for n in lengths])
    return Packing.of(text.cu_seqlens, text.ids.numel(), text.max_len)


def test_pooling_equals_multihead_attention():
    """The folded projections are nn.MultiheadAttention with a key padding mask, values and
    gradients."""
    torch.manual_seed(0)
    pooling = AttentionPooling(16, num_heads=4).double().eval()
    torch.nn.init.normal_(pooling.attention.in_proj_bias)
    lengths = [3, 7, 1, 5]
    packing = packing_of(lengths)
    hidden = torch.randn(16, 16).double()
    padded = packing.pad(hidden)
    mask = torch.arange(7)[None] >= torch.tensor(lengths)[:, None]
    query = pooling.query.expand(4, 1, 16)
    theirs, _ = pooling.attention(query, padded, padded, key_padding_mask=mask)
    theirs = pooling.norm(theirs.squeeze(1))
    ours = pooling(hidden, packing)
    torch.testing.assert_close(ours, theirs, rtol=1e-6, atol=1e-6)  # the softmax is fp32
    weights = torch.randn(4, 16).double()
    parameters = list(pooling.parameters())
    for a, b in zip(
        torch.autograd.grad((ours * weights).sum(), parameters, allow_unused=True),
        torch.autograd.grad((theirs * weights).sum(), parameters, allow_unused=True),
        strict=True,
    ):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("positions", [0, 4])
def test_several_queries_equal_multihead_attention(positions):
    """Three queries at once, with and without a table that says where a token stands."""
    torch.manual_seed(0)
    pooling = AttentionPooling(16, 4, num_queries=3, num_positions=positions).double().eval()
    lengths, width = [3, 7, 1, 5], 16
    packing, hidden = packing_of(lengths), torch.randn(16, 16).double()
    states = hidden
    if positions:
        # Rows are longer than the table: what lies beyond shares its last row.
        place = torch.cat([torch.arange(n) for n in lengths]).clamp(max=positions - 1)
        unit = hidden / hidden.square().mean(1, keepdim=True).sqrt()
        states = unit + pooling.positions[place]
    mask = torch.arange(7)[None] >= torch.tensor(lengths)[:, None]
    padded = packing.pad(states)
    query = pooling.query.expand(4, 3, width)
    theirs, _ = pooling.attention(query, padded, padded, key_padding_mask=mask)
    theirs = pooling.norm(theirs).flatten(1)
    # The softmax is fp32.
    torch.testing.assert_close(pooling(hidden, packing), theirs, rtol=1e-6, atol=1e-6)


def test_without_positions_the_order_of_states_is_lost():
    torch.manual_seed(0)
    hidden, packing = torch.randn(6, 16), packing_of([6])
    for positions in (0, 6):
        pooling = AttentionPooling(16, 4, num_positions=positions).eval()
        moved = (pooling(hidden, packing) - pooling(hidden.flip(0), packing)).abs().max()
        assert (moved > 1e-3) == bool(positions)


def test_pooling_heads_must_divide():
    with pytest.raises(ValueError, match="pooling_heads=5 must divide .* 16"):
        AttentionPooling(16, num_heads=5)


def within(sample: torch.Tensor, std: float) -> bool:
    """Sample standard deviation within five of its own standard errors."""
    return abs(float(sample.detach().std()) - std) < 5 * std / math.sqrt(2 * sample.numel())


def test_initialisations_of_the_description():
    torch.manual_seed(0)
    encoder = Gaussian.of(ModelConfig(), 4096).encoder
    assert within(encoder.logvar_head.weight, 0.01)
    assert (encoder.logvar_head.bias == -2.0).all()
    assert within(AttentionPooling(4096).query, 4096**-0.5)
    projector = SoftPromptProjector(64, 64, 128)
    assert within(projector.position, 0.02)
    assert projector.position.shape == (1, 32, 128)
    prefix = DeepPrefixProjector(64, num_layers=3, num_kv_heads=2, head_dim=4)
    assert (prefix.scale == 0.1).all() and prefix.scale.shape == (3,)


@pytest.mark.parametrize("bias", [-100.0, 100.0])
def test_logvar_is_clamped(bias):
    encoder = VariationalEncoder(8, latent_dim=4, hidden_dim=8, logvar_init_bias=bias)
    logvar = encoder(torch.randn(3, 8)).logvar
    assert (logvar == math.copysign(10.0, bias)).all()


def test_posterior_is_fp32_under_bf16():
    encoder = VariationalEncoder(8, latent_dim=4, hidden_dim=8).bfloat16()
    posterior = encoder(torch.randn(3, 8).bfloat16())
    assert posterior.mu.dtype == posterior.logvar.dtype == torch.float32


def test_deep_prefix_shapes_and_scale():
    prefix = DeepPrefixProjector(
        6, num_layers=3, num_kv_heads=2, head_dim=4, prefix_len=5, hidden_dim=8, bottleneck_dim=8
    )
    z = torch.randn(2, 6)
    layers = prefix(z)
    assert len(layers) == 3
    assert all(k.shape == v.shape == (2, 2, 5, 4) for k, v in layers)
    before = layers[1][0].clone()
    prefix.scale.data[1] *= 2
    torch.testing.assert_close(prefix(z)[1][0], 2 * before)


def test_z_is_mu_in_eval_and_keyed_by_sample_in_training(make_model, batch):
    from cdpvae import StepPlan

    model = make_model()
    assert torch.equal(model(batch).z, model(batch).code.mu)
    plan = StepPlan(0, 3, 1.0, 1.5, 0.1, 0.4, 20.0, False).to_schedule()
    model.train()
    first, second = model(batch, plan, seed=7), model(batch, plan, seed=7)
    assert torch.equal(first.z, second.z)
    assert not torch.equal(first.z, model(batch, plan, seed=8).z)
    noise = (first.z - first.code.mu) / torch.exp(0.5 * first.code.logvar)
    keyed = model.training_noise(batch.sample_index[2:3], seed=7, epoch=3)
    alone = model.latent.sample(first.code.rows(2, 3), keyed)
    torch.testing.assert_close(alone[0], first.z[2])
    assert noise.abs().max() < 6
    first.z.sum().backward()
    assert model.latent.encoder.mu_head.weight.grad.abs().sum() > 0


def test_word_dropout_touches_only_the_decoder_input(make_model, batch):
    from cdpvae import StepPlan

    model = make_model().train()
    plan = StepPlan(0, 0, 1.0, 1.5, 0.1, 0.9, 20.0, False).to_schedule()
    before = batch.response.ids.clone(), batch.targets.clone()
    dropped = model._drop_words(batch, plan, seed=0)
    starts = batch.response.cu_seqlens[:-1].long()
    assert torch.equal(dropped[starts], batch.response.ids[starts]), "the first token never"
    changed = dropped != batch.response.ids
    assert changed.any() and (dropped[changed] == model.tokens.pad).all()
    assert torch.equal(batch.response.ids, before[0]) and torch.equal(batch.targets, before[1])
    model.eval()
    assert torch.equal(model._drop_words(batch, plan, seed=0), batch.response.ids)


def test_linear_projections_are_affine():
    """The middle of two inputs gives the middle of two outputs: no layer of the MLPs is left."""
    torch.manual_seed(0)
    encoder = Gaussian.of(ModelConfig(projections="linear"), 16).encoder
    projector = SoftPromptProjector(6, None, 16, 4).mlp
    for function, width in ((lambda x: encoder(x).mu, 16), (projector, 6)):
        ends = torch.randn(2, width)
        one, two = function(ends)
        torch.testing.assert_close(function(ends.mean(0)), (one + two) / 2, rtol=1e-5, atol=1e-6)
