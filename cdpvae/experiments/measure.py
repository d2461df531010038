"""The figures of a trained run: likelihood, rate, use of z, on the validation rows.

They are those of the groups `likelihood` and `use` of `cdpvae.evaluate`: means over rows, with the
standard error of such a mean; z is replaced by that of a row anywhere in the split, paired by row.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path

import torch

from cdpvae.config import load_settings
from cdpvae.evaluation.baselines import check_baseline
from cdpvae.evaluation.checkpoint import OpenedRun, RowSelection, open_run
from cdpvae.evaluation.encoded import encode_rows
from cdpvae.evaluation.groups.use import other_rows, replacements
from cdpvae.evaluation.likelihood import health_of
from cdpvae.evaluation.statistics import mean_and_error
from cdpvae.experiments.table import FIGURES

# The columns of what the group `use` calls by these names.
COSTS = {
    "z shuffled": "cost_shuffled",
    "z from the prior": "cost_prior",
    "z zero": "cost_zero",
}


@dataclass(frozen=True)
class Evaluation:
    """What is measured of every run.

    num_rows: the first validation rows, among which z is shuffled. rows_per_batch: of them
    together. baseline: checkpoint without a latent, whose decoder reads nothing. seed: of all draws
    and of the shuffle.
    """

    num_rows: int = 1000
    rows_per_batch: int = 32
    baseline: str | None = None
    seed: int = 0
    _measured: dict[str, dict[str, float]] = field(default_factory=dict, repr=False)

    def identity(self) -> str:
        """Name what decides a run's own figures; a baseline does not."""
        # The estimator belongs to it: rows of a table must be comparable.
        return (
            f"validation rows {self.num_rows}, a batch {self.rows_per_batch}, seed {self.seed}, "
            "z shuffled over all rows, errors by row"
        )

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
        encoded = encode_rows(opened, rows, seed=self.seed, progress=lambda line: None)
        own, kl = encoded.own_nll, encoded.kl()
        rate = torch.zeros_like(own) if kl is None else kl
        # Every figure is a mean over rows; a decoder without z has one likelihood.
        by_row = {
            "tokens": torch.tensor([len(ids) - 1.0 for ids in encoded.responses]),
            "nll_q": own,
            "nll_mu": own,
            "kl": rate,
            "neg_elbo": own + rate,
        }
        if opened.model.latent.reads_text:
            by_row["nll_mu"] = encoded.nll(opened.model.latent.mean(encoded.code))
            # Z is replaced from the whole split; one row has no other to take it from.
            if encoded.num_rows > 1:
                donor = other_rows(encoded.num_rows, seed=self.seed)
                for name, (z, _) in replacements(encoded, donor, seed=self.seed).items():
                    by_row[COSTS[name]] = encoded.nll(z) - own
        figures = {"rows": float(encoded.num_rows)}
        for name, values in by_row.items():
            figures[name], error = mean_and_error(values)
            if error is not None:
                figures[f"{name}_se"] = error
        return figures | health_of(opened.model, encoded.code, seed=self.seed)
