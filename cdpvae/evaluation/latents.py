"""Is the latent space alive: the family's health and the geometry of its vectors, with verdicts.

None of these figures proves that a decoder uses z; the z-use test of `likelihood.py` does.

Legend: N rows, F numbers of one row's latent vector.
"""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
from torch import Tensor

from cdpvae.evaluation.checkpoint import OpenedRun, RowSelection
from cdpvae.evaluation.verdicts import Likelihoods, Verdict
from cdpvae.latents import Code, Latent, MutualInformation
from cdpvae.latents.base import variance_over_rows
from cdpvae.metrics import effective_rank, pairwise_similarities


@dataclass(frozen=True)
class LatentFigures:
    """What was measured over N rows; nats.

    active_units: dimensions whose vector varies by more, by threshold. rate_per_dim (F,): mean KL;
    empty for a family without one. variance (F,): of the vectors over rows. information: between
    texts and latents, None for a family without a density.
    """

    rows: int
    active_units: dict[float, int]
    rate_per_dim: Tensor
    variance: Tensor
    information: MutualInformation | None
    effective_rank: float
    mean_cosine: float
    max_cosine: float
    mean_distance: float

    @property
    def rate(self) -> float:
        """KL per sequence."""
        return float(self.rate_per_dim.sum())


@torch.no_grad()
def measure_latents(opened: OpenedRun, rows: RowSelection) -> LatentFigures:
    """Encode rows and measure their codes. Raises ValueError for a model without a latent."""
    require_latent(opened)
    # Encode every row; figures are computed over all rows at once, on the CPU.
    model = opened.model
    codes = [
        model.infer(batch.instruction.to(model.device)).to(torch.float32, "cpu")
        for batch in opened.rows(rows)
    ]
    return measure_code(model.latent, type(codes[0]).concat(codes), seed=0)


def require_latent(opened: OpenedRun) -> None:
    """Raise ValueError for a model without a latent."""
    if not opened.model.latent.reads_text:
        raise ValueError(
            f"checkpoint={str(opened.checkpoint)!r} was trained without a latent; there is nothing "
            "to check"
        )


def measure_code(latent: Latent, code: Code, *, seed: int) -> LatentFigures:
    """Measure the code of N rows on the CPU. seed: of the draws of the mutual information."""
    # Measure the vectors, and the rate in fp64.
    vectors = latent.flat(code)
    rate = latent.penalties(code.to(torch.float64)).get("kl")
    mean_cosine, max_cosine, mean_distance = pairwise_similarities(vectors)
    # Not every family has dimensions that count as active.
    active = {
        threshold: count
        for threshold in latent.activity_thresholds
        if (count := latent.active_units(code, threshold)) is not None
    }
    return LatentFigures(
        rows=code.num_rows,
        active_units=active,
        rate_per_dim=torch.zeros(0) if rate is None else rate.reshape(len(rate), -1).mean(0),
        variance=variance_over_rows(vectors),
        information=latent.information(code, seed=seed),
        effective_rank=effective_rank(vectors),
        mean_cosine=mean_cosine,
        max_cosine=max_cosine,
        mean_distance=mean_distance,
    )


def judge_latents(figures: LatentFigures, free_bits: float) -> list[Verdict]:
    """Put every figure beside its healthy range. free_bits: floor of the rate, nats a dimension."""
    dims = figures.variance.numel()
    # Only the first threshold is one that the literature judges by.
    verdicts = [
        Verdict(
            f"active units (var > {threshold:g})",
            float(count),
            dims / 2 if number == 0 else None,
            float(dims) if number == 0 else None,
            f"of {dims}",
        )
        for number, (threshold, count) in enumerate(figures.active_units.items())
    ]
    # The rate and what texts and latents share, for families that have them.
    if figures.rate_per_dim.numel():
        above = float((figures.rate_per_dim > free_bits).sum())
        verdicts += [
            Verdict("KL, nats per sequence", figures.rate, None, None),
            Verdict("KL, mean per dimension", figures.rate / dims, 0.1, None),
            Verdict("dimensions above free bits", above, dims / 2, float(dims)),
        ]
    if figures.information is not None:
        lower, upper, cap = (getattr(figures.information, n) for n in ("lower", "upper", "cap"))
        verdicts += [
            Verdict("mutual information, lower", lower, 1.0, None, f"cap {cap:.2f}"),
            Verdict("mutual information, upper", upper, None, None, "leave-one-out"),
            Verdict("marginal KL", figures.rate - lower, None, None, "KL - MI"),
        ]
    # The geometry of the vectors.
    return [
        *verdicts,
        Verdict("effective rank of mu", figures.effective_rank, None, None, f"of {dims}"),
        Verdict("mean cosine of mu pairs", figures.mean_cosine, None, 0.9),
        Verdict("mean distance of mu pairs", figures.mean_distance, None, None),
    ]


def write_latents(
    directory: str,
    checkpoint: str,
    figures: LatentFigures,
    verdicts: list[Verdict],
    likelihoods: Likelihoods,
) -> list[Path]:
    """Write latents.json and latents.png into a directory -> their paths.

    directory: made where it is missing.
    checkpoint: as the user named it.
    figures, verdicts, likelihoods: what was measured.
    """
    output = Path(directory)
    output.mkdir(parents=True, exist_ok=True)
    # The file holds what was printed, and the rate of each dimension.
    content = {
        "checkpoint": checkpoint,
        "verdicts": [{**asdict(v), "healthy": v.healthy} for v in verdicts],
        "kl_per_dim": figures.rate_per_dim.tolist(),
        "likelihood": likelihoods.model.to_json(),
    }
    (output / "latents.json").write_text(json.dumps(content, indent=2) + "\n")
    plot_latents(figures, output / "latents.png")
    return [output / "latents.json", output / "latents.png"]


def plot_latents(figures: LatentFigures, path: Path) -> None:
    """Draw KL and variance of each dimension, sorted, with the thresholds they are judged by."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, (left, right) = pyplot.subplots(1, 2, figsize=(11, 3.6), layout="constrained")
    # Left, the rate of each dimension.
    rate = sorted(figures.rate_per_dim.tolist(), reverse=True)
    left.bar(range(len(rate)), rate, color="#3b6ea5")
    left.axhline(0.1, color="#b03a2e", linewidth=1, label="0.1 nats")
    left.set(title="KL per dimension", xlabel="dimension, sorted", ylabel="nats")
    left.legend(frameon=False)
    # Right, how much each dimension of the vectors varies over rows.
    variance = sorted(figures.variance.tolist(), reverse=True)
    right.semilogy(range(len(variance)), [max(v, 1e-6) for v in variance], color="#3b6ea5")
    for threshold in figures.active_units:
        right.axhline(threshold, color="#b03a2e", linewidth=0.7)
    right.set(title="variance of mu, thresholds of AU", xlabel="dimension, sorted")
    # Above both, the figures that belong to all dimensions together.
    title = f"KL {figures.rate:.1f} nats, "
    if figures.information is not None:
        title += f"MI {figures.information.lower:.2f} (cap {figures.information.cap:.2f}), "
    figure.suptitle(f"{title}effective rank {figures.effective_rank:.1f} of {len(variance)}")
    figure.savefig(path, dpi=120)
    pyplot.close(figure)
