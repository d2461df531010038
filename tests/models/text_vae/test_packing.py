"""Packed equals separate, nothing leaks, and both equal transformers' own LlamaForCausalLM.

The whole model under every attention backend; those that need a GPU are stood in for.
"""

from __future__ import annotations

import gc

import pytest
import torch
from torch.nn import functional as F
from transformers import DynamicCache

from cdpvae.batch import PackedText, VAEBatch
from cdpvae.compatibility import forward
from cdpvae.models.text_vae.attention import packed_attention
from cdpvae.models.text_vae.packing import Packing
from support.attention import backends

BACKENDS = backends()
VARIANTS = {
    "grouped": {},
    "wide heads": {},
    "tied": {},
}
EXACT = {"rtol": 1e-10, "atol": 1e-10}  # fp64: only the order of sums differs


@pytest.fixture(params=BACKENDS)
def backend(request, monkeypatch):
    """Every model of the test attends with this backend."""
    chosen = BACKENDS[request.param]
    monkeypatch.setattr("cdpvae.models.text_vae.backbone.choose_backend", lambda *_: chosen)
    return chosen


def oracle_hidden(llama, prompts, ids, prefix=None):
    """transformers' own forward over one row, with the prefix as its key/value cache."""
    llama.config._attn_implementation = "sdpa"
    embeds = torch.cat((prompts, llama.get_input_embeddings()(ids)))[None]
    kwargs = {"inputs_embeds": embeds, "output_hidden_states": True}
    if prefix is not None:
        cache = DynamicCache(config=llama.config)
        for layer, (key, value) in enumerate(prefix):
            cache.update(key, value, layer)
        kwargs |= {"past_key_values": cache, "use_cache": True}
    return llama(**kwargs).hidden_states[-1][0]


def with_lora_merged(model, llama):
    """A plain Llama with our LoRA added into its weights."""
    state = dict(llama.named_parameters())
    for name, module in model.backbone.llama.named_modules():
        if hasattr(module, "lora_A"):
            delta = module.get_delta_weight("default")
            state[f"{name}.weight"].data += delta
    return llama


@pytest.mark.parametrize("shape", VARIANTS)
@pytest.mark.parametrize("deep_prefix", [False, True])
def test_packed_decoder_equals_transformers_row_by_row(
    make_model, make_llama, batch, shape, deep_prefix, backend
):
    model = make_model(shape, deep_prefix=deep_prefix)
    assert model.backbone.attention is backend
    llama = with_lora_merged(model, make_llama(shape))
    z = torch.randn(4, 6, generator=torch.Generator().manual_seed(3)).double()
    with torch.no_grad():
        decoded = model.decode(z, batch.response.ids, batch.response)
        prompts = model.projector(z)
        prefixes = model.deep_prefix(z) if deep_prefix else None
        ours = decoded.hidden[decoded.positions].split(batch.response.lengths.tolist())
        for row, ids in enumerate(batch.response.rows()):
            prefix = None
            if prefixes is not None:
                prefix = [(k[row : row + 1], v[row : row + 1]) for k, v in prefixes]
            theirs = oracle_hidden(llama, prompts[row], ids, prefix)
            torch.testing.assert_close(ours[row], theirs[prompts.shape[1] :], **EXACT)


@pytest.mark.parametrize("checkpointing", [False, True])
@pytest.mark.parametrize("deep_prefix", [False, True])
def test_gradients_equal_the_cache_oracle(
    make_model, make_llama, batch, deep_prefix, checkpointing, backend
):
    """Through soft prompts and prefix back to z."""
    model = make_model(deep_prefix=deep_prefix)
    model.set_gradient_checkpointing(checkpointing)
    llama = with_lora_merged(model, make_llama())
    z = torch.randn(4, 6, generator=torch.Generator().manual_seed(3)).double()
    ours, theirs = z.clone().requires_grad_(), z.clone().requires_grad_()
    decoded = model.decode(ours, batch.response.ids, batch.response)
    logits = F.linear(
        decoded.hidden[decoded.positions[batch.target_positions]], llama.lm_head.weight
    )
    F.cross_entropy(logits, batch.targets, reduction="sum").backward()
    prompts = model.projector(theirs)
    prefixes = model.deep_prefix(theirs) if deep_prefix else None
    total = 0.0
    for row, ids in enumerate(batch.response.rows()):
        prefix = None
        if prefixes is not None:
            prefix = [(k[row : row + 1], v[row : row + 1]) for k, v in prefixes]
        hidden = oracle_hidden(llama, prompts[row], ids, prefix)[prompts.shape[1] :]
        logits = F.linear(hidden[:-1], llama.lm_head.weight)
        total = total + F.cross_entropy(logits, ids[1:], reduction="sum")
    total.backward()
    torch.testing.assert_close(ours.grad, theirs.grad, **EXACT)


@pytest.mark.parametrize("deep_prefix", [False, True])
def test_perturbing_one_segment_leaves_the_others_unchanged(
    make_model, batch, deep_prefix, backend
):
    model = make_model(deep_prefix=deep_prefix)
    z = torch.randn(4, 6, generator=torch.Generator().manual_seed(3)).double()
    start, stop = batch.response.cu_seqlens[1:3].tolist()
    other = batch.response.ids.clone()
    other[start:stop] = (other[start:stop] + 7) % 60 + 4
    z_other = z.clone()
    z_other[1] += 1.0
    with torch.no_grad():
        before = model.decode(z, batch.response.ids, batch.response)
        after = model.decode(z_other, other, batch.response)
        text = batch.instruction
        first, last = text.cu_seqlens[1:3].tolist()
        changed = PackedText(text.ids.clone(), text.cu_seqlens, text.max_len)
        changed.ids[first:last] = (changed.ids[first:last] + 7) % 60 + 4
        mu, mu_changed = model.infer(text).mu, model.infer(changed).mu
    same = before.hidden[before.positions] == after.hidden[after.positions]
    assert same[:start].all() and same[stop:].all()
    assert not same[start:stop].any(dim=1).all()
    untouched = [0, 2, 3]
    assert torch.equal(mu[untouched], mu_changed[untouched])
    assert not torch.equal(mu[1], mu_changed[1])


@pytest.mark.parametrize("encoder_layer", ["last", 1, 0, "mix"])
def test_encoder_pass_equals_transformers_without_lora(
    make_model, make_llama, batch, encoder_layer, backend
):
    """The LoRA weights are not zero here: the pass must ignore them."""
    model, llama = make_model(encoder_layer=encoder_layer), make_llama()
    llama.config._attn_implementation = "sdpa"
    text = batch.instruction
    packing = Packing.of(text.cu_seqlens, text.ids.numel(), text.max_len)
    states = model.backbone.encode(text, packing)
    flags = [p.requires_grad for p in model.backbone.parameters()]
    for row, ids in enumerate(text.rows()):
        with torch.no_grad():
            theirs = llama(ids[None], output_hidden_states=True).hidden_states
        wanted = {"last": [theirs[-1]], 1: [theirs[1]], 0: [theirs[0]], "mix": list(theirs)}
        start = int(text.cu_seqlens[row])
        for ours, expected in zip(states, wanted[encoder_layer], strict=True):
            torch.testing.assert_close(ours[start : start + len(ids)], expected[0], **EXACT)
    assert not any(state.requires_grad for state in states)
    assert flags == [p.requires_grad for p in model.backbone.parameters()]


def test_packed_posterior_and_logits_equal_separate(make_model, batch):
    model = make_model()
    with torch.no_grad():
        together = forward(model, batch, return_logits=True)
        for row in range(4):
            alone = VAEBatch.build(
                PackedText.from_lists([batch.instruction.rows()[row].tolist()]),
                PackedText.from_lists([batch.response.rows()[row].tolist()]),
                torch.tensor([row]),
            )
            out = forward(model, alone, return_logits=True)
            length = out.logits.shape[1]
            torch.testing.assert_close(together.mu[row], out.mu[0], rtol=1e-5, atol=1e-6)
            torch.testing.assert_close(
                together.logits[row, :length], out.logits[0], rtol=1e-4, atol=1e-5
            )


def test_checkpointing_changes_no_bit(make_model, batch, backend):
    """Same torch seed, LoRA dropout on: the recomputation draws the same masks."""
    gradients = []
    for checkpointing in (False, True):
        model = make_model(dropout=0.1, deep_prefix=True)
        model.set_gradient_checkpointing(checkpointing)
        model.train()
        torch.manual_seed(5)
        z = torch.ones(4, 6).double()
        decoded = model.decode(z, batch.response.ids, batch.response)
        decoded.hidden.square().sum().backward()
        gradients.append([p.grad for p in model.parameters() if p.grad is not None])
    assert len(gradients[0]) == len(gradients[1]) > 10
    assert all(torch.equal(a, b) for a, b in zip(*gradients, strict=True))


@pytest.mark.parametrize("deep_prefix", [False, True])
def test_generation_with_a_cache_equals_the_packed_pass(make_model, batch, deep_prefix, backend):
    """Soft prompts and BOS at once, then a token at a time: the same hidden states."""
    model = make_model(deep_prefix=deep_prefix)
    z = torch.randn(4, 6, generator=torch.Generator().manual_seed(3)).double()
    with torch.no_grad():
        decoded = model.decode(z, batch.response.ids, batch.response)
        packed = decoded.hidden[decoded.positions].split(batch.response.lengths.tolist())
        prompts = model.projector(z)
        for row, ids in enumerate(batch.response.rows()):
            cache = DynamicCache(config=model.backbone.config)
            position = model.fill_prefix_cache(z[row : row + 1], cache)
            embeds = model.backbone.llama.get_input_embeddings()(ids)[None]
            step = torch.cat((prompts[row : row + 1], embeds[:, :1]), dim=1)
            for t in range(len(ids)):
                hidden = model.backbone.decode_step(step, cache, position)
                torch.testing.assert_close(hidden[0, -1], packed[row][t], **EXACT)
                position += step.shape[1]
                step = embeds[:, t + 1 : t + 2]


def test_lora_is_on_again_after_an_error(make_model):
    model = make_model()
    with pytest.raises(RuntimeError), model.backbone.lora_off():
        raise RuntimeError
    assert not any(layer.disable_adapters for layer in model.backbone._lora_layers)


def test_a_mask_beside_packing_is_refused(make_model):
    q = torch.zeros(1, 4, 3, 8)
    with pytest.raises(ValueError, match="attention_mask"):
        packed_attention(None, q, q, q, torch.ones(1, 3), 1.0)


@pytest.mark.parametrize(("layer", "alive"), [("last", 1), (2, 1), ("mix", 3)])
def test_hidden_states_that_nothing_reads_are_freed(make_model, batch, layer, alive):
    """Before the last layer its input is alive; for `mix` so is every state before it."""
    model = make_model(encoder_layer=layer)
    text = batch.instruction
    packing = Packing.of(text.cu_seqlens, text.ids.numel(), text.max_len)
    layers = model.backbone.llama.model.layers
    shape, found = (text.ids.numel(), model.backbone.config.hidden_size), []

    def count(*_):
        gc.collect()
        states = (x for x in gc.get_objects() if type(x) is torch.Tensor and x.is_floating_point())
        places = {x.data_ptr() for x in states if tuple(x.shape[-2:]) == shape}
        found.append(len(places))

    layers[(layer if isinstance(layer, int) else len(layers)) - 1].register_forward_pre_hook(count)
    with torch.no_grad():
        model.backbone.encode(text, packing)
    assert found == [alive]
