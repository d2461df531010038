"""Lines that evaluation commands share: likelihoods beside the baseline, values with verdicts."""

from __future__ import annotations

from dataclasses import dataclass

from cdpvae.evaluation.checkpoint import OpenedRun, open_run
from cdpvae.evaluation.likelihood import Likelihood, evaluate_likelihood


@dataclass
class Verdict:
    """A value beside its healthy range; `low` or `high` is None where there is no bound."""

    name: str
    value: float
    low: float | None
    high: float | None
    note: str = ""

    @property
    def healthy(self) -> bool:
        above = self.low is None or self.value >= self.low
        return above and (self.high is None or self.value <= self.high)

    def line(self) -> str:
        """Fixed columns: name, value, range, verdict, note."""
        if self.low is None and self.high is None:
            bounds, word = "", ""
        else:
            low = "" if self.low is None else f"{self.low:g}"
            high = "" if self.high is None else f"{self.high:g}"
            bounds = f"{low} .. {high}".strip()
            word = "ok" if self.healthy else "OUT OF RANGE"
        return f"{self.name:<28}{self.value:>10.3f}  {bounds:<12}  {word:<12}  {self.note}".rstrip()


def model_likelihood(opened: OpenedRun, options) -> Likelihood:
    """`options` names split, processed_dir, num_rows, rows_per_batch and seed."""
    batches = opened.rows(
        options.processed_dir, options.split, options.num_rows, options.rows_per_batch
    )
    return evaluate_likelihood(opened.model, batches, seed=options.seed)


def baseline_likelihood(options) -> Likelihood | None:
    """Of the run named by `options.baseline`. Raises ValueError when that run has a latent."""
    if options.baseline is None:
        return None
    opened = open_run(options.baseline, device=options.device)
    if opened.settings.model.latent.kind != "none":
        raise ValueError(
            f"baseline={options.baseline!r} was trained with a latent; give a --latent none run"
        )
    return model_likelihood(opened, options)


def likelihood_lines(result: Likelihood, baseline: Likelihood | None) -> list[str]:
    """Nats per sequence; what each replacement of z costs; the decoder without z beside it."""
    lines = [
        f"{result.rows} rows, {result.tokens:.1f} target tokens each; nats per sequence:",
        f"  NLL from z~q {result.nll_q:.2f}, from z=mu {result.nll_mu:.2f}; KL {result.kl:.2f}; "
        f"negative ELBO {result.neg_elbo:.2f}",
    ]
    if result.costs:
        lines.append(
            "  z-use test, cost of replacing z: "
            + ", ".join(f"{what} {cost:+.2f}" for what, cost in result.costs.items())
        )
    if baseline is not None:
        lines.append(f"  the same decoder without z: NLL {baseline.nll_q:.2f}")
    else:
        lines.append("  (no --baseline given: train one with --latent none to judge these numbers)")
    return lines
