"""Lines that evaluation commands share: likelihoods beside the baseline, values with verdicts."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from cdpvae.config.text_vae import DecoderReads
from cdpvae.evaluation.baselines import HOW_TO_TRAIN, open_baselines, rows_of_run
from cdpvae.evaluation.checkpoint import OpenedRun, RowSelection
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
    """Likelihoods of a run, and of those without a latent on the same rows that were given.

    model: of the run. baseline: of a decoder that reads the response alone.
    instruction_baseline: of one that reads the instruction. reads: what the run's decoder reads.
    """

    model: Likelihood
    baseline: Likelihood | None
    instruction_baseline: Likelihood | None = None
    reads: DecoderReads = "nothing"

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
        return lines + self._baseline_lines()

    def _baseline_lines(self) -> list[str]:
        """Return what decoders without z reach, the one that reads as the run's own does first."""
        known = {"nothing": self.baseline, "instruction": self.instruction_baseline}
        same = known.pop(self.reads)
        if same is None:
            lines = [
                f"  (no --baseline given: train one with {HOW_TO_TRAIN[self.reads]} to judge these "
                "numbers)"
            ]
        else:
            lines = [f"  the same decoder without z: NLL {same.nll_q:.2f}"]
        for kind, other in known.items():
            if other is not None:
                lines.append(f"  a decoder without z that reads the {kind}: NLL {other.nll_q:.2f}")
        # What z could be worth at most, and how much of that it is.
        if self.baseline is not None and self.instruction_baseline is not None:
            worth = self.baseline.nll_q - self.instruction_baseline.nll_q
            line = f"  the instruction is worth {worth:.2f}"
            if self.reads == "nothing" and "shuffled" in self.model.costs and worth > 0:
                line += (
                    f"; another row's z costs {self.model.costs['shuffled'] / worth:.0%} of that"
                )
            lines.append(line)
        return lines

    def to_json(self) -> dict[str, Any]:
        """Return all as plain values."""
        given = {"baseline": self.baseline, "instruction_baseline": self.instruction_baseline}
        others = {name: None if it is None else it.to_json() for name, it in given.items()}
        return {"likelihood": self.model.to_json(), **others}


def compare_likelihoods(
    opened: OpenedRun, baselines: Sequence[str], rows: RowSelection, seed: int
) -> Likelihoods:
    """Measure a run and its baselines on the same rows.

    opened: the run.
    baselines: directories of runs without a latent, one of each kind at most.
    rows: which ones.
    seed: of posterior noise and prior draws.

    Raises ValueError when a baseline has a latent, or two are of one kind.
    """
    # Baselines run where the model runs, on the same rows.
    others = open_baselines(baselines, opened)
    same = rows_of_run(opened, rows)
    plain, reading = (
        None if run is None else evaluate_likelihood(run.model, run.rows(same), seed=seed)
        for run in (others.nothing, others.instruction)
    )
    result = evaluate_likelihood(opened.model, opened.rows(rows), seed=seed)
    return Likelihoods(result, plain, reading, opened.model.config.decoder_reads)
