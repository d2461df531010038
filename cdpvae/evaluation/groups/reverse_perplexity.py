"""Reverse perplexity: how well a language model that has read samples alone predicts real text.

What samples lack, it cannot predict, so it is high where they repeat a part of the data, however
fluent they are (Zhao et al. 2018, adversarially regularized autoencoders). Beside it stands the
same language model trained on as many of the run's training texts.
"""

from __future__ import annotations

import contextlib
import copy
import io
import math
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import replace

import torch
from torch import Tensor
from transformers import LlamaForCausalLM

from cdpvae.evaluation.figures import Figure
from cdpvae.evaluation.statistics import ratio_and_error
from cdpvae.sample.backbone import BackboneOptions, build_model
from cdpvae.sample.language_model import FitOptions, fit, token_nll
from cdpvae.sample.tokenizer import TokenSequence, encode, train_tokenizer

# The language model: two layers of width 192, as `cdpvae.tiny_backbone` makes by default.
VOCABULARY, LONGEST, BATCH = 4096, 512, 32
# It stops at the best loss on a tenth of its own texts: real text decides nothing.
FIT = FitOptions(
    steps=1,
    epochs=20,
    patience=2,
    batch_size=BATCH,
    learning_rate=2e-3,
    dropout=0.1,
    seed=0,
)
HELD_OUT_EVERY = 10
TIMED_STEPS = 3


class Learner:
    """Make language models that are alike but for the texts that they learn from.

    corpus: the run's training texts. The tokenizer is made of them, so that every model of the
    same data is judged in the same tokens.
    device: where they are trained.
    seed: of weights, batches and dropout.
    """

    def __init__(self, corpus: Sequence[str], device: torch.device, seed: int) -> None:
        self.device, self.options = device, replace(FIT, seed=seed)
        self.tokenizer = train_tokenizer([(text,) for text in corpus], VOCABULARY, LONGEST)
        # Weights and dropout come from torch's global state, which is put back.
        with torch.random.fork_rng():
            torch.manual_seed(seed)
            self._untrained = build_model(BackboneOptions(positions=LONGEST), self.tokenizer)
        torch.nn.Module.to(self._untrained, device)

    def _encode(self, texts: Sequence[str]) -> list[TokenSequence]:
        return encode(self.tokenizer, [(text,) for text in texts], LONGEST)

    def seconds(self, texts: Sequence[str], count: int) -> float:
        """Estimate from a few steps how long learning from `count` such texts takes at most."""
        # A first step sets up what later ones find.
        sequences = self._encode(texts[: BATCH * TIMED_STEPS])
        taken = []
        for steps in (1, TIMED_STEPS):
            model, started = copy.deepcopy(self._untrained), time.perf_counter()
            options = replace(self.options, steps=steps, epochs=None)
            with contextlib.redirect_stdout(io.StringIO()), torch.random.fork_rng():
                fit(model, sequences, [], options)
            taken.append((time.perf_counter() - started) / steps)
        assert self.options.epochs is not None
        return taken[-1] * self.options.epochs * math.ceil(count / BATCH)

    def learn(self, texts: Sequence[str]) -> LlamaForCausalLM:
        """Train a model on texts, at least two, and return it as it was at its best validation."""
        sequences, model = self._encode(texts), copy.deepcopy(self._untrained)
        held_out = sequences[::HELD_OUT_EVERY]
        rest = [s for number, s in enumerate(sequences) if number % HELD_OUT_EVERY]
        # Its lines are progress; tables alone go to stdout.
        with contextlib.redirect_stdout(sys.stderr), torch.random.fork_rng():
            torch.manual_seed(self.options.seed)
            fit(model, rest, held_out, self.options)
        return model.eval()

    @torch.no_grad()
    def nats(self, model: LlamaForCausalLM, texts: Sequence[str]) -> tuple[Tensor, Tensor]:
        """Return -log p of every text, its end included, and its tokens -> (N,) fp64 each."""
        sequences = self._encode(texts)
        parts = [
            token_nll(model, sequences[start : start + BATCH]).double().sum(1).cpu()
            for start in range(0, len(sequences), BATCH)
        ]
        tokens = torch.tensor([len(s.ids) - 1.0 for s in sequences], dtype=torch.float64)
        return torch.cat(parts), tokens


def reverse_perplexity(
    draw: Callable[[int], list[str]],
    corpus: Sequence[str],
    real: Sequence[str],
    *,
    samples: int,
    seconds_a_text: float,
    device: torch.device,
    seed: int,
    progress: Callable[[str], None],
) -> list[Figure]:
    """Train on samples and on as many training texts, and score real texts with both.

    draw: returns so many samples.
    corpus: training texts, at least two.
    real: texts that are scored, cut at `LONGEST` tokens.
    samples: how many are drawn.
    seconds_a_text: what drawing one takes, for the estimate of the time.
    device: where the language models are trained.
    seed: of the language models.
    progress: told the estimate before anything of it is begun.
    """
    # What this will take is said before it starts.
    learner, known = Learner(corpus, device, seed), list(corpus[:samples])
    drawing = samples * seconds_a_text
    training = learner.seconds(known, samples + len(known))
    progress(
        f"reverse PPL takes about {drawing + training:.0f} s at most: {drawing:.0f} s for "
        f"{samples} samples, {training:.0f} s for two language models"
    )
    # Two models read texts of two origins; both are asked for the same real text.
    figures = []
    for origin, texts in (("samples", draw(samples)), ("training texts", known)):
        progress(f"reverse PPL: learning from {len(texts)} {origin}")
        mean, error = ratio_and_error(*learner.nats(learner.learn(texts), real))
        value = math.exp(mean)
        figures.append(
            Figure(
                name=f"reverse PPL, {origin}",
                value=value,
                unit="perplexity per token of its own tokenizer",
                estimator=f"language model trained on {len(texts)} {origin}: exp of nats over "
                "tokens of real text, ends included; error by linearisation over texts",
                rows=len(real),
                standard_error=None if error is None else value * error,
                note="comparable only with equal numbers of texts, training data and real texts",
            )
        )
    return figures
