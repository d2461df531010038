"""z at every position of the response: what is read, where it is added, what it predicts."""

from __future__ import annotations

import pytest
import torch
from torch.nn import functional as F

from cdpvae.batch import PackedText
from cdpvae.models.text_vae.packing import Packing
from cdpvae.models.text_vae.positional import FIRST_GAIN, PositionalProjector

SLOTS, LENGTH, WIDTH = 3, 5, 8


@pytest.fixture
def projector():
    torch.manual_seed(0)
    module = PositionalProjector(6, WIDTH, SLOTS, LENGTH, torch.tensor(0.2)).double()
    # Off its start, so that positions mix slots.
    torch.nn.init.normal_(module.table)
    return module


def packing_of(lengths):
    text = PackedText.from_lists([[1] * n for n in lengths])
    return Packing.of(text.cu_seqlens, text.ids.numel(), text.max_len)


def test_every_position_reads_the_slots_of_its_row(projector):
    """Position t of row b is sum_k table[t, k] slot_k(z_b); past the table its last row counts."""
    lengths = [7, 2, 5]
    z = torch.randn(3, 6, generator=torch.Generator().manual_seed(1)).double()
    states = projector.states(z, packing_of(lengths))
    expected = []
    for row, length in enumerate(lengths):
        slots = projector.slots(z[row]).view(SLOTS, WIDTH)
        for position in range(length):
            table = projector.table[min(position, LENGTH - 1)]
            expected.append(sum(table[k] * slots[k] for k in range(SLOTS)))
    torch.testing.assert_close(states, torch.stack(expected))
    # Written word by word it is the same.
    places = torch.tensor([[2, 3], [-1, 1], [2, 6]])
    single = projector.additions_at(projector.slots_of(z), places)
    wanted = projector.additions(states)[[2, 3, 8, 11]]
    torch.testing.assert_close(single[[0, 0, 1, 2], [0, 1, 1, 0]], wanted)
    assert (single[1, 0] == 0).all()


def test_it_starts_with_a_slot_for_each_position_and_a_multiple_of_the_embeddings():
    torch.manual_seed(0)
    projector = PositionalProjector(6, WIDTH, SLOTS, LENGTH, torch.tensor(0.2))
    rest = [0.0, 0.0, 1.0]
    assert projector.table.tolist() == [[1.0, 0.0, 0.0], [0.0, 1.0, 0.0], rest, rest, rest]
    additions = projector.additions(torch.randn(500, WIDTH))
    size = float(additions.detach().square().mean().sqrt())
    assert size == pytest.approx(0.2 * FIRST_GAIN, rel=0.01)


def test_the_decoder_sees_it_at_the_response_only(make_model, batch):
    """The oracle: the same rows one by one through the backbone, with inputs put by hand."""
    model = make_model(positional_slots=SLOTS, positional_length=LENGTH)
    z = torch.randn(4, 6, generator=torch.Generator().manual_seed(1)).double()
    with torch.no_grad():
        decoded = model.decode(z, batch.response.ids, batch.response)
        for row, ids in enumerate(batch.response.rows()):
            inputs = F.embedding(ids, model.backbone.embedding_weight)
            own = z[row : row + 1]
            every = torch.arange(len(ids))[None]
            added = model.positional.additions_at(model.slots_of(own), every)[0]
            inputs = torch.cat((model.soft_prompts(own)[0], inputs + added))
            hidden = model.backbone.decode(inputs, packing_of([len(inputs)]))
            start, stop = batch.response.cu_seqlens[row], batch.response.cu_seqlens[row + 1]
            ours = decoded.hidden[decoded.positions[start:stop]]
            torch.testing.assert_close(ours, hidden[model.num_prompts :])
        # Without a gain nothing is added.
        model.positional.gain.zero_()
        plain = make_model()
        plain.load_state_dict(model.state_dict(), strict=False)
        same = model.decode(z, batch.response.ids, batch.response).hidden
        assert torch.equal(same, plain.decode(z, batch.response.ids, batch.response).hidden)


def test_no_word_reaches_what_predicts(make_model, batch):
    """Other words in the decoder's input change its hidden states, and no prediction."""
    model = make_model(positional_slots=SLOTS)
    z = torch.ones(4, 6).double()
    ids = batch.response.ids
    first = model.decode(z, ids, batch.response)
    second = model.decode(z, ids.flip(0), batch.response)
    assert not torch.equal(first.hidden, second.hidden)
    assert torch.equal(first.predicted, second.predicted)
    first.predicted.sum().backward()
    assert model.positional.slots.weight.grad.abs().sum() > 0
    assert model.positional.mix.weight.grad is None


def test_it_is_stored_with_the_model(make_model, tmp_path):
    model = make_model(positional_slots=SLOTS, pooling_queries=2, pooling_positions=5)
    model.save_pretrained(tmp_path)
    # The backbone comes anew: its LoRA is read from the files.
    again = type(model).from_pretrained(
        tmp_path, backbone=type(model.backbone)(fresh_llama(model), model.config)
    )
    for name, tensor in model.state_dict().items():
        torch.testing.assert_close(again.state_dict()[name].double(), tensor.double(), msg=name)


def fresh_llama(model):
    """The base of a model without its LoRA."""
    from transformers import LlamaForCausalLM

    llama = LlamaForCausalLM(model.backbone.config).double()
    names = {
        name.replace(".base_layer", ""): t for name, t in model.backbone.llama.state_dict().items()
    }
    llama.load_state_dict({n: t for n, t in names.items() if "lora_" not in n})
    return llama
