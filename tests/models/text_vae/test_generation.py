"""Writing text from z: the cache against teacher forcing, sampling, EOS, interpolation."""

from __future__ import annotations

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.nn import functional as F

from cdpvae.batch import PackedText
from cdpvae.config import NoLatentConfig
from cdpvae.latents.gaussian import interpolate
from cdpvae.models.text_vae.generation import choose_token


@pytest.mark.parametrize(
    "settings",
    [{}, {"deep_prefix": True}, {"positional_slots": 3}, {"latent": NoLatentConfig()}],
    ids=["soft prompts", "deep prefix", "positional", "no latent"],
)
def test_greedy_equals_teacher_forcing(make_model, settings):
    """What the cached steps chose is the argmax of one full pass over the result."""
    model = make_model(**settings)
    latent = model.config.latent.kind != "none"
    z = torch.randn(3, 6, generator=torch.Generator().manual_seed(1)) if latent else None
    # fp32 latents are what callers have; the model here is fp64.
    ids = model.generate(z, max_length=9, temperature=0, num_rows=3)
    rows = [[model.tokens.bos, *row] for row in ids.tolist()]
    text = PackedText.from_lists(rows)
    with torch.no_grad():
        decoded = model.decode(None if z is None else z.double(), text.ids, text)
        logits = F.linear(decoded.hidden[decoded.positions], model.backbone.head_weight)
    chosen = logits.argmax(-1).view(3, -1)[:, :-1]
    for row in range(3):
        for step, token in enumerate(ids[row].tolist()):
            assert int(chosen[row, step]) == token
            if token == model.tokens.eos:
                break


def test_a_batch_equals_its_rows(make_model):
    model = make_model()
    z = torch.randn(3, 6, generator=torch.Generator().manual_seed(1))
    together = model.generate(z, max_length=7, temperature=0)
    for row in range(3):
        alone = model.generate(z[row : row + 1], max_length=7, temperature=0)
        assert torch.equal(together[row, : alone.shape[1]], alone[0])


def test_stops_at_eos_and_pads(make_model, monkeypatch):
    """Row 0 ends after two tokens, row 1 after four: the result is four wide."""
    model = make_model()
    script = iter([[9, 9], [2, 9], [7, 9], [7, 2], [7, 7]])
    monkeypatch.setattr(
        "cdpvae.models.text_vae.generation.choose_token", lambda *_: torch.tensor(next(script))
    )
    ids = model.generate(torch.zeros(2, 6), max_length=50)
    assert ids.tolist() == [[9, 2, 3, 3], [9, 9, 9, 2]]


def test_greedy_leaves_mode_and_generator_alone(make_model):
    model = make_model(dropout=0.5).train()
    before = torch.get_rng_state()
    first = model.generate(torch.zeros(2, 6), max_length=4, temperature=0)
    assert model.training and torch.equal(before, torch.get_rng_state())
    assert torch.equal(first, model.generate(torch.zeros(2, 6), max_length=4, temperature=0))


def test_nucleus_and_temperature():
    """p = (.5, .3, .15, .05): top_p .8 keeps the first two, in proportion 5 : 3."""
    logits = torch.tensor([0.5, 0.3, 0.15, 0.05]).log().expand(40_000, 4)
    generator = torch.Generator().manual_seed(0)
    counts = choose_token(logits, 1.0, 0.8, generator).bincount(minlength=4).tolist()
    assert counts[2:] == [0, 0]
    # Five standard errors of a share of 5/8 in 40,000 draws.
    assert counts[0] / 40_000 == pytest.approx(0.625, abs=5 * (0.625 * 0.375 / 40_000) ** 0.5)
    sharp = choose_token(logits, 0.5, 1.0, generator).bincount(minlength=4)
    expected = torch.tensor([0.25, 0.09, 0.0225, 0.0025]) / 0.365
    assert (sharp / 40_000 - expected).abs().max() < 0.0125
    assert (choose_token(logits, 0.0, 1.0) == 0).all()
    # However small top_p is, the most likely token stays.
    assert (choose_token(logits, 1.0, 1e-9, generator) == 0).all()


@pytest.mark.parametrize(("temperature", "top_p"), [(-1.0, 1.0), (1.0, 0.0), (1.0, 1.5)])
def test_sampling_settings_out_of_range(temperature, top_p):
    with pytest.raises(ValueError, match="temperature=.*top_p="):
        choose_token(torch.zeros(1, 3), temperature, top_p)


def test_sampling_repeats_with_its_generator(make_model):
    model = make_model()
    texts = [
        model.sample(4, generator=torch.Generator().manual_seed(3), max_length=6) for _ in range(2)
    ]
    assert torch.equal(texts[0][0], texts[1][0]) and torch.equal(texts[0][1], texts[1][1])


def test_interpolation():
    a, b = torch.tensor([3.0, 0.0, 0.0]), torch.tensor([0.0, 1.0, 0.0])
    line = interpolate(a, b, 5)
    torch.testing.assert_close(line[2], torch.tensor([1.5, 0.5, 0.0]))
    arc = interpolate(a, b, 5, "slerp")
    torch.testing.assert_close(arc.norm(dim=1), torch.tensor([3.0, 2.5, 2.0, 1.5, 1.0]))
    unit = F.normalize(arc, dim=1)
    angles = torch.acos((unit[:-1] * unit[1:]).sum(1).clamp(-1, 1))
    torch.testing.assert_close(angles, torch.full((4,), torch.pi / 8))
    for path in (line, arc):
        torch.testing.assert_close(path[0], a)
        torch.testing.assert_close(path[-1], b, atol=1e-6, rtol=0)
    # Parallel latents have no arc; nothing may become NaN.
    same = interpolate(a, 2 * a, 3, "slerp")
    torch.testing.assert_close(same[1], 1.5 * a)
    batched = interpolate(torch.stack([a, b]), torch.stack([b, a]), 5, "slerp")
    torch.testing.assert_close(batched[:, 0], arc)


@pytest.mark.parametrize(
    ("arguments", "match"),
    [
        ((torch.zeros(3), torch.zeros(4)), "one shape"),
        ((torch.zeros(3), torch.zeros(3), 1), "num_steps=1"),
        ((torch.zeros(3), torch.zeros(3), 5, "cubic"), "cubic"),
    ],
)
def test_interpolation_errors(arguments, match):
    with pytest.raises(ValueError, match=match):
        interpolate(*arguments)


def test_z_of_the_wrong_shape(make_model):
    with pytest.raises(ValueError, match=r"shape \(2, 5\), expected \(rows, 6\)"):
        make_model().generate(torch.zeros(2, 5))
    with pytest.raises(ValueError, match="z=None"):
        make_model().generate(None)


def test_a_generator_draws_on_its_own_device(monkeypatch):
    """A model on a GPU takes a CPU's generator too; torch draws only where the generator lives."""
    drawn_on = []

    def multinomial(probabilities, samples, generator):
        drawn_on.append(probabilities.device)
        return probabilities.new_zeros(len(probabilities), samples, dtype=torch.int64)

    monkeypatch.setattr(torch, "multinomial", multinomial)
    with FakeTensorMode():
        token = choose_token(torch.empty(2, 7, device="cuda:0"), 1.0, 1.0, torch.Generator())
    assert drawn_on == [torch.device("cpu")] and token.device.type == "cuda"


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU to draw on")
@pytest.mark.parametrize("device", ["cpu", "cuda"])
def test_any_generator_draws_for_a_gpu(device):
    generator = torch.Generator(device).manual_seed(3)
    token = choose_token(torch.zeros(2, 7, device="cuda"), 1.0, 1.0, generator)
    assert token.device.type == "cuda" and 0 <= int(token.min()) <= int(token.max()) < 7
