"""The training of a small language model: batches, dropout, schedule, early stopping, loss.

Legend: nats are means over target tokens unless a name says otherwise.
"""

from __future__ import annotations

import math
import random
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import LlamaForCausalLM

from cdpvae.sample.tokenizer import TokenSequence
from cdpvae.training.optimizer import warmup_cosine

IGNORE = -100  # the label that F.cross_entropy skips
POOL_BATCHES = 16  # batches whose rows are sorted by length together
WARMUP_STEPS_SHARE = 10  # the warm-up takes one step in so many
LEARNING_RATE_FLOOR = 0.1  # the last factor of the learning rate


@dataclass(frozen=True, kw_only=True)
class FitOptions:
    """How a language model is trained; the names are those of `BackboneOptions`."""

    steps: int
    epochs: int | None
    patience: int
    batch_size: int
    learning_rate: float
    dropout: float
    seed: int


def batches(
    sequences: Sequence[TokenSequence], batch_size: int, seed: int
) -> Iterator[list[TokenSequence]]:
    """Draw random batches for endless epochs; rows of similar length share a batch."""
    rng = random.Random(seed)
    while True:
        # Every epoch shows each sequence once.
        order = rng.sample(sequences, len(sequences))
        groups = []
        # Sorting within pools keeps padding small without fixing who meets whom.
        for low in range(0, len(order), POOL_BATCHES * batch_size):
            pool = sorted(order[low : low + POOL_BATCHES * batch_size], key=lambda s: len(s.ids))
            groups += [pool[i : i + batch_size] for i in range(0, len(pool), batch_size)]
        rng.shuffle(groups)
        yield from groups


def token_nll(model: LlamaForCausalLM, batch: Sequence[TokenSequence]) -> Tensor:
    """Compute the NLL of each token after the first: (rows, longest - 1) fp32, nats.

    It is 0 at padding, which stands on the right, where a causal model does not see it from any
    real token.
    """
    # Labels are the ids one position later; a label that is skipped has an NLL of 0.
    width = max(len(sequence.ids) for sequence in batch)
    pad = model.config.pad_token_id
    device = model.device
    ids = torch.tensor([s.ids + [pad] * (width - len(s.ids)) for s in batch], device=device)
    labels = torch.tensor(
        [s.ids[1:] + [IGNORE] * (width - len(s.ids)) for s in batch], device=device
    )
    logits = model(input_ids=ids, use_cache=False).logits[:, :-1].float()
    nll = F.cross_entropy(
        logits.flatten(0, 1), labels.flatten(), ignore_index=IGNORE, reduction="none"
    )
    return nll.view_as(labels)


def learning_rate_factor(step: int, steps: int) -> float:
    """Compute the factor of the highest learning rate: a tenth of the steps up, a cosine down."""
    warmup_steps = max(1, steps // WARMUP_STEPS_SHARE)
    return warmup_cosine(step, warmup_steps, steps, LEARNING_RATE_FLOOR)


@contextmanager
def residual_dropout(model: LlamaForCausalLM, rate: float) -> Iterator[None]:
    """Drop a share of the embeddings and of what each sublayer adds, inside; Llama has no such.

    The places are those of Vaswani et al. 2017, section 5.4. rate: in [0, 1). Drawn from torch's
    global generator, in training mode only.
    """
    if not rate:
        yield
        return

    def drop(module: nn.Module, _inputs: Any, output: Tensor) -> Tensor:
        return F.dropout(output, rate, module.training)

    places: list[nn.Module] = [model.model.embed_tokens]
    for layer in model.model.layers:
        places += [layer.self_attn.o_proj, layer.mlp.down_proj]
    hooks = [place.register_forward_hook(drop) for place in places]
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()


def fit(
    model: LlamaForCausalLM,
    train: Sequence[TokenSequence],
    held_out: Sequence[TokenSequence],
    options: FitOptions,
) -> dict[str, Any]:
    """Train in place with AdamW -> what `training.json` records of it.

    model: in fp32; with `epochs` it ends with the weights of its best validation.
    train: what it learns from.
    held_out: what it is validated on after each epoch; not read without `epochs`.
    options: how.
    """
    per_epoch = math.ceil(len(train) / options.batch_size)
    steps = options.steps if options.epochs is None else options.epochs * per_epoch
    optimizer = torch.optim.AdamW(
        model.parameters(), lr=options.learning_rate, betas=(0.9, 0.95), weight_decay=0.01
    )
    schedule = torch.optim.lr_scheduler.LambdaLR(
        optimizer, lambda step: learning_rate_factor(step, steps)
    )
    stream = batches(train, options.batch_size, options.seed)
    best = _Best(options.patience)
    last: list[float] = []
    started = time.perf_counter()
    model.train()
    with residual_dropout(model, options.dropout):
        for step in range(1, steps + 1):
            # The loss is a mean over real tokens, not over the padded width.
            batch = next(stream)
            loss = token_nll(model, batch).sum() / sum(len(s.ids) - 1 for s in batch)

            # One optimizer step.
            optimizer.zero_grad(set_to_none=True)
            loss.backward()
            torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
            schedule.step()

            # Keep the losses of the last tenth of the steps: single batches are noisy.
            last = [*last, loss.item()][-max(1, steps // 10) :]
            if step % 50 == 0 or step == steps:
                rate = step / (time.perf_counter() - started)
                print(
                    f"step {step}/{steps}  loss {sum(last) / len(last):.3f} nats/token  "
                    f"{rate:.1f} it/s",
                    flush=True,
                )

            # An epoch ends with a validation, which may end the training.
            if options.epochs is not None and step % per_epoch == 0:
                best.look(model, evaluate(model, held_out, options.batch_size))
                model.train()
                if best.is_over:
                    break
    best.restore(model)
    record: dict[str, Any] = {"train_nll_per_token": sum(last) / len(last), "steps_taken": step}
    return record | best.record()


class _Best:
    """The best weights so far by validation, and whether to go on. patience: see the options."""

    def __init__(self, patience: int) -> None:
        self.patience = patience
        self.curve: list[float] = []
        self.weights: dict[str, Tensor] = {}

    @property
    def is_over(self) -> bool:
        """Whether the last `patience` validations brought no gain."""
        return len(self.curve) - 1 - self._epoch >= self.patience

    @property
    def _epoch(self) -> int:
        return self.curve.index(min(self.curve))

    def look(self, model: LlamaForCausalLM, figures: dict[str, float]) -> None:
        """Take in one validation."""
        self.curve.append(figures["validation_nll_per_response"])
        gained = self._epoch == len(self.curve) - 1
        print(
            f"epoch {len(self.curve)}: validation {self.curve[-1]:.2f} nats per response"
            f"{'' if gained else ', no gain'}",
            flush=True,
        )
        if gained:
            self.weights = {name: value.clone() for name, value in model.state_dict().items()}

    def restore(self, model: LlamaForCausalLM) -> None:
        """Put the best weights back."""
        if self.weights:
            model.load_state_dict(self.weights)

    def record(self) -> dict[str, Any]:
        """Return the curve and its best epoch, counted from 1; empty without a validation."""
        if not self.curve:
            return {}
        return {"validation_curve": self.curve, "best_epoch": self._epoch + 1}


@torch.no_grad()
def evaluate(
    model: LlamaForCausalLM, sequences: Sequence[TokenSequence], batch_size: int
) -> dict[str, float]:
    """Compute the NLL per token, and per response (or whole text) given its instruction, in nats.

    The keys are those of `training.json`. sequences: held-out text, at least one.
    """
    # Sums first, so that a short last batch does not weigh more.
    model.eval()
    total = tail = 0.0
    for low in range(0, len(sequences), batch_size):
        batch = sequences[low : low + batch_size]
        nll = token_nll(model, batch)
        total += nll.sum().item()
        tail += sum(row[s.start :].sum().item() for row, s in zip(nll, batch, strict=True))
    tokens = sum(len(s.ids) - 1 for s in sequences)
    return {
        "validation_nll_per_token": total / tokens,
        "validation_nll_per_response": tail / len(sequences),
        "validation_rows": len(sequences),
    }
