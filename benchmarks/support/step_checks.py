"""Do the variants compute the same? Loss and gradients of one micro-batch, side by side."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch

from benchmarks.steps.naive import NaiveStep
from benchmarks.steps.ours import OurStep
from benchmarks.support.lengths import Row
from benchmarks.support.randomness import Draws, without_dropout

# Relative, for the loss and for gradient norms. fp32: a few thousand roundings of 1e-7 in another
# order; gradient norms add up more. bf16: one rounding is 4e-3, and the variants round at
# different places.
TOLERANCES = {"fp32": (1e-5, 1e-4), "bf16": (1e-2, 5e-2)}


@dataclass(frozen=True)
class Signature:
    """The loss and the gradient's L2 norms that one variant computes for a micro-batch."""

    loss: float
    lora_grad: float
    heads_grad: float

    def worst_against(self, other: Signature) -> tuple[float, float]:
        """Compute the relative difference of the loss, and the larger one of the gradient norms."""
        lora = _relative(self.lora_grad, other.lora_grad)
        return _relative(self.loss, other.loss), max(
            lora, _relative(self.heads_grad, other.heads_grad)
        )


def signature(step: OurStep | NaiveStep, rows: Sequence[Row], draws: Draws) -> Signature:
    """Run forward and backward with dropout at 0 and the given draws; leave no gradient behind."""
    # Module dropout draws from torch's generator, in another order in each variant.
    with without_dropout(step.model):
        loss = step.loss(list(rows), True, draws)
        loss.backward()
    norms = {"lora": 0.0, "heads": 0.0}
    # Norms in fp64: adding up squares must not be what differs.
    for name, parameter in step.trainable().items():
        assert parameter.grad is not None, f"{name} got no gradient"
        part = "lora" if "lora_" in name else "heads"
        norms[part] += float(parameter.grad.detach().double().square().sum())
        parameter.grad = None
    return Signature(loss.item(), norms["lora"] ** 0.5, norms["heads"] ** 0.5)


def compare(
    steps: Mapping[str, OurStep | NaiveStep], rows: Sequence[Row], precision: str
) -> dict[str, Signature]:
    """Compute and print the signatures of all steps on the same rows and random draws.

    steps: by name, "ours" among them, whose draws all of them use. Raises SystemExit(1) when a
    signature differs from that of "ours" by more than TOLERANCES.
    """
    # Every variant computes with what ours draws at random.
    ours = steps["ours"]
    assert isinstance(ours, OurStep)
    draws = ours.draws(list(rows))
    found = {name: signature(step, rows, draws) for name, step in steps.items()}

    # A line per variant, and the names of those beyond the tolerance.
    loss_limit, grad_limit = TOLERANCES[precision]
    wrong = []
    print(f"the same {len(rows)} rows, noise and dropped words; no module dropout")
    for name, own in found.items():
        loss, grad = own.worst_against(found["ours"])
        ok = loss <= loss_limit and grad <= grad_limit
        wrong += [] if ok else [name]
        print(
            f"  {name:<6} loss {own.loss:.7f}, off by {loss:.1e} (at most {loss_limit:.0e}); "
            f"gradient norms: LoRA {own.lora_grad:.6f}, heads {own.heads_grad:.6f}, "
            f"off by {grad:.1e} (at most {grad_limit:.0e})"
        )
    if wrong:
        # Times of variants that compute different things say nothing.
        print(f"error: {', '.join(wrong)} computes something else than ours; no times are taken")
        raise SystemExit(1)
    return found


def _relative(value: float, reference: float) -> float:
    if not (torch.isfinite(torch.tensor([value, reference])).all()):
        return float("inf")
    return abs(value - reference) / max(abs(reference), 1e-12)
