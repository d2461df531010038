"""Reverse perplexity: samples that repeat one text predict real text worse than varied ones."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F

from cdpvae.evaluation.groups import reverse_perplexity as reverse
from support.runs import sentences

CPU = torch.device("cpu")
TEXTS = [row["output"] for row in sentences(90)]


@pytest.fixture(autouse=True)
def little_training(monkeypatch):
    monkeypatch.setattr(reverse, "FIT", replace(reverse.FIT, epochs=3, batch_size=16))
    monkeypatch.setattr(reverse, "TIMED_STEPS", 1)


def measure(draw, said, **changed):
    arguments = {"samples": 40, "seconds_a_text": 0.5, "device": CPU, "seed": 1}
    figures = reverse.reverse_perplexity(
        draw, TEXTS[:60], TEXTS[60:], **{**arguments, **changed}, progress=said.append
    )
    return {figure.name: figure for figure in figures}


def test_samples_of_one_text_are_worse_than_training_texts():
    said: list[str] = []
    before = torch.get_rng_state()

    def draw(count):
        # The time is said before anything is drawn.
        assert "takes about" in said[0] and "20 s for 40 samples" in said[0]
        return [TEXTS[0]] * count

    figures = measure(draw, said)
    samples, texts = figures["reverse PPL, samples"], figures["reverse PPL, training texts"]
    assert samples.value > 1.2 * texts.value > 1
    assert samples.rows == texts.rows == 30 and samples.standard_error > 0
    assert "40 samples" in samples.estimator and "40 training texts" in texts.estimator
    # Training moves no generator of torch: what follows draws as without it.
    assert torch.equal(torch.get_rng_state(), before)
    # The training texts as samples have exactly the figure of the training texts.
    same = measure(lambda count: TEXTS[:count], [])
    assert same["reverse PPL, samples"].value == same["reverse PPL, training texts"].value
    assert same["reverse PPL, training texts"].value == texts.value


def test_nats_are_those_of_transformers():
    learner = reverse.Learner(TEXTS, CPU, seed=2)
    model = learner.learn(TEXTS[:20])
    nats, tokens = learner.nats(model, TEXTS[60:63])
    for row, text in enumerate(TEXTS[60:63]):
        tokenizer = learner.tokenizer
        ids = torch.tensor([[*tokenizer(text)["input_ids"], tokenizer.eos_token_id]])
        with torch.no_grad():
            logits = model(input_ids=ids).logits[0, :-1].double()
        expected = F.cross_entropy(logits, ids[0, 1:], reduction="sum")
        assert float(nats[row]) == pytest.approx(float(expected), rel=1e-5)
        assert int(tokens[row]) == ids.shape[1] - 1
    assert math.isfinite(float(nats.sum()))
