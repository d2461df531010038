"""What judges texts: the scorer against a likelihood computed by hand, BLEU, MAUVE's call."""

from __future__ import annotations

import importlib.util
import math
import sys
from types import SimpleNamespace

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from cdpvae.evaluation.groups import samples
from cdpvae.evaluation.scorer import TextScorer


@pytest.fixture(scope="module")
def scorer(backbone_dir):
    return TextScorer(str(backbone_dir), str(backbone_dir), torch.device("cpu"))


def test_perplexity_is_that_of_all_tokens_after_bos(scorer, backbone_dir):
    texts = ["the red house", "a horse and a river stand there", ""]
    tokenizer = AutoTokenizer.from_pretrained(backbone_dir)
    model = AutoModelForCausalLM.from_pretrained(backbone_dir).double()
    nats = tokens = 0.0
    for text in texts[:2]:
        ids = [0, *tokenizer(text, add_special_tokens=False)["input_ids"]]
        with torch.no_grad():
            loss = model(input_ids=torch.tensor([ids]), labels=torch.tensor([ids])).loss
        nats, tokens = nats + float(loss) * (len(ids) - 1), tokens + len(ids) - 1
    value, error, scored = scorer.perplexity(texts)
    assert value == pytest.approx(math.exp(nats / tokens), rel=1e-5)
    assert scored == 2 and error is not None and error > 0


def test_kin_texts_are_one_for_the_error(scorer):
    """A text written twice says nothing new: the error is that of one copy each."""
    texts = ["the red house", "a horse and a river stand there", "window"]
    twice = [text for text in texts for _ in range(2)]
    assert scorer.perplexity(twice, together=2)[:2] == pytest.approx(scorer.perplexity(texts)[:2])
    assert scorer.perplexity(twice)[1] < 0.9 * scorer.perplexity(texts)[1]


def test_texts_beyond_the_models_positions_are_cut(scorer):
    _, tokens = scorer.nats(["again " * 600])
    assert tokens == [255]
    assert scorer.features(["again " * 600, ""]).shape == (2, 32)


def test_equal_texts_have_a_bleu_of_one():
    assert samples.sentence_bleu("a", "a") == samples.sentence_bleu("", "") == 1.0
    assert samples.sentence_bleu("a b c d", "e f g h") == 0.0


def test_mauve_is_measured_where_it_is_installed(scorer, monkeypatch):
    """Both sets of features and the seed reach it; without the package a note says so."""
    notes: list[str] = []
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    assert samples._mauve(["a"], ["b"], lambda: scorer, 3, notes) == []
    assert "not installed" in notes[0]
    called = {}

    def compute_mauve(**arguments):
        called.update(arguments)
        return SimpleNamespace(mauve=0.25)

    monkeypatch.setattr(importlib.util, "find_spec", lambda name: object())
    monkeypatch.setitem(sys.modules, "mauve", SimpleNamespace(compute_mauve=compute_mauve))
    (figure,) = samples._mauve(["a river"], ["b", "c"], lambda: scorer, 3, [])
    assert figure.value == 0.25 and called["seed"] == 3
    assert torch.equal(torch.from_numpy(called["p_features"]), scorer.features(["a river"]))
    assert called["q_features"].shape == (2, 32)
