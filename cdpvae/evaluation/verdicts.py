"""Lines that evaluation commands share: likelihoods beside the baseline, values with verdicts."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from cdpvae.evaluation.checkpoint import OpenedRun, RowSelection, check_baseline, open_run
from cdpvae.evaluation.likelihood import Likelihood, evaluate_likelihood


@dataclass(frozen=True)
class Verdict:
    """A value beside its healthy range; `low` or `high` is None where there is no bound."""

    name: str
    value: float
    low: float | None
    high: float | None
    note: str = ""

    @property
    def healthy(self) -> bool:
        """Whether the value lies within its range."""
        above = self.low is None or self.value >= self.low
        return above and (self.high is None or self.value <= self.high)

    def line(self) -> str:
        """Return fixed columns: name, value, range, verdict, note."""
        if self.low is None and self.high is None:
            bounds, word = "", ""
        else:
            low = "" if self.low is None else f"{self.low:g}"
            high = "" if self.high is None else f"{self.high:g}"
            bounds = f"{low} .. {high}".strip()
            word = "ok" if self.healthy else "OUT OF RANGE"
        return f"{self.name:<28}{self.value:>10.3f}  {bounds:<12}  {word:<12}  {self.note}".rstrip()


def verdict_lines(verdicts: Sequence[Verdict]) -> list[str]:
    """Return the table of all verdicts under its head."""
    return [f"{'':<28}{'value':>10}  {'healthy':<12}", *(verdict.line() for verdict in verdicts)]


@dataclass(frozen=True)
class Likelihoods:
    """Likelihoods of a run, and of one without a latent on the same rows where one was given."""

    model: Likelihood
    baseline: Likelihood | None

    def lines(self) -> list[str]:
        """Return nats per sequence, what each replacement of z costs, and the baseline."""
        # The likelihoods of the run itself.
        result = self.model
        lines = [
            f"{result.rows} rows, {result.tokens:.1f} target tokens each; nats per sequence:",
            f"  NLL from z~q {result.nll_q:.2f}, from z=mu {result.nll_mu:.2f}; "
            f"KL {result.kl:.2f}; negative ELBO {result.neg_elbo:.2f}",
        ]
        # Does the decoder use z?
        if result.costs:
            lines.append(
                "  z-use test, cost of replacing z: "
                + ", ".join(f"{what} {cost:+.2f}" for what, cost in result.costs.items())
            )
        # What the same decoder reaches without z.
        if self.baseline is not None:
            lines.append(f"  the same decoder without z: NLL {self.baseline.nll_q:.2f}")
        else:
            lines.append(
                "  (no --baseline given: train one with --latent none to judge these numbers)"
            )
        return lines

    def to_json(self) -> dict[str, Any]:
        """Return both as plain values."""
        baseline = None if self.baseline is None else self.baseline.to_json()
        return {"likelihood": self.model.to_json(), "baseline": baseline}


def compare_likelihoods(
    opened: OpenedRun, baseline: str | None, rows: RowSelection, seed: int
) -> Likelihoods:
    """Measure a run and a baseline on the same rows.

    opened: the run.
    baseline: directory of a run without a latent, or None.
    rows: which ones.
    seed: of posterior noise and prior draws.

    Raises ValueError when the baseline has a latent.
    """
    result = evaluate_likelihood(opened.model, opened.rows(rows), seed=seed)
    if baseline is None:
        return Likelihoods(result, None)
    # The baseline runs where the model runs, on the same rows.
    other = open_run(baseline, device=str(opened.model.device))
    check_baseline(other)
    return Likelihoods(result, evaluate_likelihood(other.model, other.rows(rows), seed=seed))
