"""The group `likelihood` of a small model: against the other path to the same numbers."""

from __future__ import annotations

import math

import pytest
import torch

from cdpvae.config import NoLatentConfig
from cdpvae.evaluation.baselines import Baselines
from cdpvae.evaluation.encoded import EncodedRows, encode_rows
from cdpvae.evaluation.groups import likelihood as group
from cdpvae.evaluation.likelihood import backbone_nll, evaluate_likelihood
from support.opened import ROWS, given_run, random_batches

SEED = 5


def silent(line: str) -> None:
    pass


def measure(opened, *baselines, **changes):
    changes["baselines"] = Baselines.of(baselines)
    wanted = {"seed": SEED, "iw_rows": None, "iw_samples": 3, **changes}
    return group.measure_likelihood(opened, ROWS, progress=silent, **wanted)


def test_bounds_are_those_of_the_narrow_command(make_model):
    model, batches = make_model(), random_batches()
    figures = measure(given_run(model, batches))
    expected = evaluate_likelihood(model, batches, seed=SEED)
    for name, value in (
        ("-ELBO", expected.neg_elbo),
        ("NLL from z ~ q", expected.nll_q),
        ("NLL from mu", expected.nll_mu),
        ("KL", expected.kl),
    ):
        assert figures[name].value == pytest.approx(value, rel=1e-6)
        assert figures[name].rows == 12 and figures[name].standard_error > 0


def test_rates_divide_the_same_nats_by_tokens_words_and_bytes(make_model):
    model, batches = make_model(), random_batches()
    figures = measure(given_run(model, batches))
    responses = [ids.tolist() for batch in batches for ids in batch.response.rows()]
    # Two special ids a row, of which the end is a target; every other token is a word.
    words = sum(len(ids) - 2 for ids in responses)
    size = sum(len(" ".join(map(str, ids[1:-1]))) for ids in responses)
    assert figures["target tokens"].value == words + 12
    assert (figures["words"].value, figures["bytes"].value) == (words + 12, size)
    nats = 12 * figures["-ELBO"].value
    assert figures["bits per byte, -ELBO"].value == pytest.approx(nats / math.log(2) / size)
    assert figures["PPL per token, -ELBO"].value == pytest.approx(math.exp(nats / (words + 12)))


def test_weights_are_densities_at_the_same_draws(make_model):
    """From the model's own likelihood and torch's normal densities, a draw at a time."""
    model = make_model()
    opened = given_run(model, random_batches())
    encoded = encode_rows(opened, ROWS, seed=SEED, progress=silent)
    drawn = []
    decode = type(encoded).nll_of_draws

    class Watched(type(encoded)):
        def nll_of_draws(self, row, z):
            drawn.append(z)
            return decode(self, row, z)

    watched = Watched(**{name: getattr(encoded, name) for name in encoded.__dataclass_fields__})
    weights = group.row_log_weights(watched, seed=SEED, samples=3, progress=silent)
    z = torch.stack(drawn, 1).double()
    mu, deviation = encoded.code.mu.double(), (0.5 * encoded.code.logvar.double()).exp()
    for k in range(3):
        log_q = torch.distributions.Normal(mu, deviation).log_prob(z[k]).sum(1)
        log_p = torch.distributions.Normal(0.0, 1.0).log_prob(z[k]).sum(1)
        expected = -encoded.nll(z[k]) + log_p - log_q
        torch.testing.assert_close(weights[:, k], expected, rtol=1e-5, atol=1e-4)


def test_the_encoder_runs_once_a_row_and_memory_is_bounded(make_model, monkeypatch):
    model = make_model()
    opened = given_run(model, random_batches())
    whole = measure(opened, iw_samples=7)
    rows, widths = [], []
    infer, decode = model.infer, model.decode
    monkeypatch.setattr(model, "infer", lambda text: rows.append(text.num_rows) or infer(text))

    def narrow(z, ids, response, instruction):
        widths.append(len(ids) + len(z) * model.num_prompts)
        return decode(z, ids, response, instruction)

    monkeypatch.setattr(model, "decode", narrow)
    monkeypatch.setattr("cdpvae.evaluation.encoded.POSITIONS_AT_ONCE", 40)
    narrowed = measure(opened, iw_samples=7)
    assert sum(rows) == 12
    # Four rows a pass for whole splits; single rows in parts of at most 40 positions.
    assert max(widths[6:]) <= 40 and len(widths) > 6 + 12
    assert narrowed["IW-NLL"].value == pytest.approx(whole["IW-NLL"].value, rel=1e-9)


def test_more_draws_never_lie_above_the_bound_of_few(make_model):
    figures = measure(given_run(make_model(), random_batches()), iw_samples=40, iw_rows=8)
    assert figures["IW-NLL"].rows == 8 and figures["-ELBO"].rows == 12
    ladder = figures.series["IW-NLL by samples"]
    assert figures.series["IW-NLL by samples: samples"] == [1, 2, 5, 10, 20, 40]
    assert ladder[-1] == pytest.approx(figures["IW-NLL"].value) and ladder[-1] < ladder[0]
    gap = figures["-ELBO on the rows of IW-NLL"].value - figures["IW-NLL"].value
    assert figures["-ELBO minus IW-NLL"].value == pytest.approx(gap)
    assert 1 <= figures["effective samples of IW-NLL"].value <= 40


def test_the_baseline_is_paired_with_the_same_rows(make_model):
    batches = random_batches()
    opened = given_run(make_model(), batches)
    without = given_run(make_model(latent=NoLatentConfig()), batches)
    figures = measure(opened, without)
    alone = evaluate_likelihood(without.model, batches, seed=SEED)
    assert figures["NLL of the decoder without z"].value == pytest.approx(alone.nll_q)
    # The better of the backbone itself and the tuned decoder is what z has to beat.
    itself = figures["NLL of the backbone itself"].value
    untuned = sum(backbone_nll(without.model, b.response).double().sum() for b in batches)
    assert itself == pytest.approx(float(untuned) / alone.rows)
    gap = figures["-ELBO"].value - min(alone.nll_q, itself)
    assert figures["-ELBO minus NLL without z"].value == pytest.approx(gap)
    # Some rows only: the weighted ones are paired with their own likelihood without z.
    few = measure(opened, without, iw_rows=5)
    chosen = encode_rows(opened, ROWS, seed=SEED, progress=silent).choose(5, seed=SEED)
    other = encode_rows(without, ROWS, seed=SEED, progress=silent).select(chosen)
    rival = other.backbone_nll() if itself < alone.nll_q else other.nll(other.z)
    gap = few["IW-NLL"].value - float(rival.mean())
    assert few["IW-NLL minus NLL without z"].value == pytest.approx(gap)
    assert "IW-NLL minus NLL without z" in [figure.name for figure in figures.figures]
    assert "PPL per word, NLL without z" in [figure.name for figure in figures.figures]
    with pytest.raises(ValueError, match="trained with a latent"):
        measure(opened, opened)


def test_the_better_of_two_figures_without_z_counts(make_model, monkeypatch):
    """Whichever of backbone and tuned decoder is better is the rival, and is named."""
    batches = random_batches()
    opened = given_run(make_model(), batches)
    without = given_run(make_model(latent=NoLatentConfig()), batches)
    for offset, best in ((-1e4, "the backbone itself"), (1e4, "the decoder without z")):
        monkeypatch.setattr(
            EncodedRows, "backbone_nll", lambda rows, _, offset=offset: rows.nll(rows.z) + offset
        )
        figures = measure(opened, without)
        gap = figures["-ELBO minus NLL without z"]
        rival = figures[f"NLL of {best}"].value
        assert gap.value == pytest.approx(figures["-ELBO"].value - rival) and best in gap.note


def test_a_model_without_a_latent_has_an_exact_likelihood_alone(make_model):
    opened = given_run(make_model(latent=NoLatentConfig()), random_batches())
    figures = measure(opened)
    expected = evaluate_likelihood(opened.model, opened.batches, seed=SEED)
    assert figures["NLL"].value == pytest.approx(expected.nll_q)
    assert "PPL per token, NLL" in [figure.name for figure in figures.figures]
    assert not {"-ELBO", "KL", "IW-NLL"} & {figure.name for figure in figures.figures}
    assert group.NO_LATENT in figures.notes


def test_numbers_of_draws_and_rows_are_checked(make_model):
    opened = given_run(make_model(), random_batches(1))
    for wrong in ({"iw_rows": 0}, {"iw_samples": 0}):
        with pytest.raises(ValueError, match="must be at least 1"):
            measure(opened, **wrong)
    with pytest.raises(ValueError, match="the split is empty"):
        measure(given_run(opened.model, []))


def test_weights_of_chosen_rows_are_those_of_all(make_model):
    """Noise is keyed by the row, and a row keeps its own code, z and text; no draw is -ELBO's."""
    opened = given_run(make_model(), random_batches())
    encoded = encode_rows(opened, ROWS, seed=SEED, progress=silent)
    whole = group.row_log_weights(encoded, seed=SEED, samples=2, progress=silent)
    chosen = torch.tensor([3, 7, 10])
    few = group.row_log_weights(encoded.select(chosen), seed=SEED, samples=2, progress=silent)
    torch.testing.assert_close(few, whole[chosen])
    bound = encoded.nll(encoded.z) + encoded.kl()
    assert not torch.isclose(-whole[:, 0], bound, rtol=1e-3).all()
