"""The figures of a trained run: likelihood, rate, use of z, on the validation rows.

Standard errors come from the means of batches: for a figure that is S / R with S and R summed over
B batches, its variance is B / (B - 1) * sum_b (S_b - figure * R_b)^2 / R^2 (Cochran 1977, section
6.3, the ratio estimator). They are unknown for a single batch.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import torch

from cdpvae.config import load_settings
from cdpvae.evaluation.baselines import check_baseline
from cdpvae.evaluation.checkpoint import OpenedRun, RowSelection, open_run
from cdpvae.evaluation.likelihood import Likelihood, LikelihoodSums, health_of, measure_batches
from cdpvae.evaluation.statistics import ratio_and_error
from cdpvae.experiments.table import FIGURES


@dataclass(frozen=True)
class Evaluation:
    """What is measured of every run.

    num_rows: the first validation rows. rows_per_batch: of them together; z is shuffled among
    them. baseline: checkpoint without a latent, whose decoder reads nothing. seed: of posterior
    noise and prior draws.
    """

    num_rows: int = 1000
    rows_per_batch: int = 32
    baseline: str | None = None
    seed: int = 0
    _measured: dict[str, dict[str, float]] = field(default_factory=dict, repr=False)

    def identity(self) -> str:
        """Name what decides a run's own figures; a baseline does not."""
        return f"validation rows {self.num_rows}, a batch {self.rows_per_batch}, seed {self.seed}"

    def __call__(self, checkpoint: Path, device: str | None) -> dict[str, float]:
        """Measure a checkpoint -> the figures of `table.FIGURES` that are known.

        device: CUDA device number, None for the default. Raises ValueError for data that is gone.
        """
        place = f"cuda:{device}" if device is not None and torch.cuda.is_available() else None
        opened = open_run(str(checkpoint), device=place)
        figures = self.figures(opened)
        # Beside a run whose decoder reads the instruction, this baseline would flatter z.
        if self.baseline is not None and not opened.model.config.reads_instruction:
            known = self._baseline(str(opened.settings.data.processed), place)
            figures["baseline_nll"] = known["nll_q"]
            if "nll_q_se" in known:
                figures["baseline_nll_se"] = known["nll_q_se"]
        return {name: figures[name] for name in FIGURES if name in figures}

    def check(self) -> None:
        """Raise ValueError for what is not the baseline without z, before anything is trained."""
        if self.baseline is None:
            return
        settings = Path(self.baseline) / "settings.json"
        if not settings.exists():
            raise ValueError(
                f"--baseline {self.baseline}: no settings.json; give a checkpoint-N directory of a "
                "run of --latent none"
            )
        # It would stand in the column of the decoder without z.
        if load_settings(settings).model.reads_instruction:
            raise ValueError(
                f"--baseline {self.baseline}: its decoder reads the instruction; give a run of "
                "--latent none --decoder-reads nothing"
            )

    def _baseline(self, processed: str, place: str | None) -> dict[str, float]:
        """Measure the decoder without z on the same rows, once for all runs on the same data."""
        assert self.baseline is not None
        if processed not in self._measured:
            other = open_run(self.baseline, device=place)
            check_baseline(other)
            self._measured[processed] = self.figures(other, processed)
        return self._measured[processed]

    def figures(self, opened: OpenedRun, processed: str | None = None) -> dict[str, float]:
        """Return means over rows, their standard errors and the latent's health, by column."""
        rows = RowSelection("validation", processed, self.num_rows, self.rows_per_batch)
        # One batch at a time, so that their spread is known.
        parts, codes = [], []
        for batch in opened.rows(rows):
            sums, code = measure_batches(opened.model, [batch], seed=self.seed)
            parts.append(sums)
            codes.append(code)
        known = [code for code in codes if code is not None]
        whole = type(known[0]).concat(known) if known else None
        # Means by the same rule as every other evaluation.
        total = sum(parts, LikelihoodSums())
        result = Likelihood.of(total, health_of(opened.model, whole, seed=self.seed))
        figures = {name: float(getattr(result, name)) for name in ("rows", "tokens", "nll_q")}
        figures |= {name: getattr(result, name) for name in ("nll_mu", "kl", "neg_elbo")}
        figures |= {f"cost_{name}": cost for name, cost in result.costs.items()}
        figures |= result.health
        # The spread of batches around them.
        ratios: dict[str, Callable[[LikelihoodSums], tuple[float, float]]] = {
            "nll_q": lambda part: (part.nll_q, part.rows),
            "kl": lambda part: (part.kl, part.rows),
            "neg_elbo": lambda part: (part.nll_q + part.kl, part.rows),
            "cost_shuffled": lambda part: (part.shuffled - part.nll_replaced, part.replaced),
        }
        for name, ratio in ratios.items():
            error = ratio_error([ratio(part) for part in parts])
            if name in figures and error is not None:
                figures[f"{name}_se"] = error
        return figures


def ratio_error(batches: Sequence[tuple[float, float]]) -> float | None:
    """Return the standard error of sum(S) / sum(R) over batches (S, R); None for fewer than two.

    Batches with R = 0 do not count.
    """
    # A figure over other rows than all, such as a cost, has its own R.
    counted = [(value, rows) for value, rows in batches if rows]
    return ratio_and_error([value for value, _ in counted], [rows for _, rows in counted])[1]
