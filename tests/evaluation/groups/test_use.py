"""The group `use`: whose z a row gets, what it costs, and where the decoder looks."""

from __future__ import annotations

import pytest
import torch

from cdpvae.config import NoLatentConfig
from cdpvae.evaluation.encoded import encode_rows
from cdpvae.evaluation.groups.use import measure_use, other_rows
from cdpvae.evaluation.likelihood import measure_batches
from cdpvae.evaluation.prompt_attention import prompt_shares
from support.opened import ROWS, given_run, random_batches

SEED = 5


def silent(line: str) -> None:
    pass


def measure(opened, dimension_rows=200):
    return measure_use(opened, ROWS, seed=SEED, dimension_rows=dimension_rows, progress=silent)


@pytest.mark.parametrize("rows", [2, 3, 100])
def test_every_row_gets_another_row_and_each_is_given_once(rows):
    donor = other_rows(rows, seed=1)
    assert (donor != torch.arange(rows)).all() and sorted(donor.tolist()) == list(range(rows))


def test_the_other_row_is_anywhere_in_the_split():
    """Within batches of 10 of 1000 rows, no row would be further away than 9."""
    distance = (other_rows(1000, seed=1) - torch.arange(1000)).abs().double()
    # Two independent places of 0..999 are 333 apart on average.
    assert float(distance.mean()) == pytest.approx(333, rel=0.1)
    assert not torch.equal(other_rows(1000, seed=1), other_rows(1000, seed=2))
    with pytest.raises(ValueError, match="at least two rows"):
        other_rows(1, seed=0)


def test_z_is_shuffled_over_the_whole_split(make_model):
    """Batches of one row leave nothing to shuffle inside; the cost is that of the whole split."""
    model = make_model()
    batches = random_batches(count=6, rows=1)
    inside, _ = measure_batches(model, batches, seed=SEED)
    assert inside.replaced == 0
    opened = given_run(model, batches)
    group = measure(opened)
    encoded = encode_rows(opened, ROWS, seed=SEED, progress=silent)
    with torch.no_grad():
        z = encoded.z[other_rows(6, seed=SEED)]
        cost = encoded.nll(z) - encoded.nll(encoded.z)
    figure = group["cost of z shuffled"]
    assert figure.rows == 6 and figure.value == pytest.approx(float(cost.mean()), rel=1e-9)
    # Paired: the error is that of the differences, not of the two likelihoods.
    assert figure.standard_error == pytest.approx(float(cost.std() / 6**0.5), rel=1e-9)
    assert abs(figure.value) > 1e-3


def test_prior_and_zero_are_those_of_the_narrow_command(make_model):
    model, batches = make_model(), random_batches()
    sums, _ = measure_batches(model, batches, seed=SEED)
    group = measure(given_run(model, batches))
    for name, replaced in (("z from the prior", sums.prior), ("z zero", sums.zero)):
        expected = (replaced - sums.nll_replaced) / 12
        assert group[f"cost of {name}"].value == pytest.approx(expected, rel=1e-6)


def test_a_dimension_that_the_decoder_does_not_read_costs_nothing(make_model):
    model = make_model()
    with torch.no_grad():
        next(model.projector.mlp.parameters())[:, 2] = 0.0
    group = measure(given_run(model, random_batches()), dimension_rows=5)
    cost = group.series["cost of each dimension alone"]
    assert len(cost) == 6 and cost[2] == 0.0
    assert all(abs(value) > 1e-6 for number, value in enumerate(cost) if number != 2)
    assert group["dimensions that the decoder uses"].rows == 5
    assert group["sum of the costs of single dimensions"].value == pytest.approx(sum(cost))
    assert group["largest cost of one dimension"].value == pytest.approx(max(cost))


@pytest.mark.parametrize("deep", [False, True])
def test_attention_is_that_of_weights_computed_by_transformers(make_model, make_llama, deep):
    """Without LoRA and prefix: the eager attention of the same Llama over the same embeddings."""
    model = make_model(deep_prefix=deep)
    opened = given_run(model, random_batches(count=1))
    encoded = encode_rows(opened, ROWS, seed=SEED, progress=silent)
    with model.backbone.lora_off():
        shares, even = prompt_shares(encoded)
    assert shares.shape == (4, 3) and ((shares > 0) & (shares < 1)).all()
    carriers = 8 if deep else 4
    length = len(encoded.responses[0])
    visible = [carriers / (carriers + t) for t in range(1, length)]
    assert float(even[0]) == pytest.approx(sum(visible) / len(visible), rel=1e-9)
    if deep:
        return
    llama = make_llama()
    llama.set_attn_implementation("eager")
    for row, ids in enumerate(encoded.responses):
        with torch.no_grad():
            prompts = model.soft_prompts(encoded.z[row : row + 1])
            text = llama.get_input_embeddings()(torch.tensor([ids]))
            out = llama(inputs_embeds=torch.cat((prompts, text), 1), output_attentions=True)
        for layer, weights in enumerate(out.attentions):
            expected = weights[0, :, 4:-1, :4].sum(-1).mean()
            assert float(shares[row, layer]) == pytest.approx(float(expected), rel=1e-6)


def test_the_backend_is_the_same_again_afterwards(make_model):
    model = make_model()
    before = model.backbone.attention
    group = measure(given_run(model, random_batches()))
    assert model.backbone.attention is before
    layers = group.series["attention to soft prompts by layer"]
    assert group["attention to soft prompts"].value == pytest.approx(sum(layers) / 3)


def test_a_model_without_a_latent_and_no_rows_are_refused(make_model):
    with pytest.raises(ValueError, match="trained without a latent"):
        measure(given_run(make_model(latent=NoLatentConfig()), random_batches()))
    with pytest.raises(ValueError, match="dimension_rows=0"):
        measure(given_run(make_model(), random_batches()), dimension_rows=0)
