"""Is the latent space alive, and is it used?

    python -m cdpvae.check_latents --checkpoint checkpoints/checkpoint-1000

Active units at four thresholds, KL per dimension, mutual information beside its cap, effective
rank and pairwise similarities of the posterior means, each with its value, healthy range and
verdict; the z-use test, without which none of them proves anything; a PNG.
"""

from __future__ import annotations

import dataclasses
import json
import math
import sys
from collections.abc import Sequence
from pathlib import Path

import torch

from cdpvae.command_line import parse_options, run


@dataclasses.dataclass
class LatentOptions:
    """Which checkpoint, which rows, and where the result goes."""

    checkpoint: str = ""
    """checkpoint-N directory of a training run"""
    baseline: str | None = None
    """checkpoint-N of a --latent none run on the same data"""
    num_rows: int = 1000
    """rows encoded; the mutual information is capped by the log of this number"""
    split: str = "validation"
    processed_dir: str | None = None
    """default: the data the run was trained on"""
    rows_per_batch: int = 32
    output: str = "results"
    """directory of latents.json and latents.png"""
    seed: int = 0
    backbone: str | None = None
    """the base weights, where they moved since training"""
    device: str | None = None


def check(argv: Sequence[str] | None = None) -> None:
    """Parse, encode, measure, print, plot. Raises ValueError for what a user can cause."""
    options = parse_options(LatentOptions, "Is the latent space alive, and is it used?", argv)
    if not options.checkpoint:
        raise ValueError("--checkpoint is needed: a checkpoint-N directory")
    from cdpvae.evaluation.checkpoint import open_run
    from cdpvae.evaluation.verdicts import baseline_likelihood, likelihood_lines, model_likelihood

    opened = open_run(options.checkpoint, backbone=options.backbone, device=options.device)
    if opened.model.config.latent.kind == "none":
        raise ValueError(f"checkpoint={options.checkpoint!r} was trained with --latent none")
    statistics = measure(opened, options)
    verdicts = judge(statistics, opened.settings)
    print(f"{'':<28}{'value':>10}  {'healthy':<12}")
    for verdict in verdicts:
        print(verdict.line())
    likelihood = model_likelihood(opened, options)
    for line in likelihood_lines(likelihood, baseline_likelihood(options)):
        print(line)
    output = Path(options.output)
    output.mkdir(parents=True, exist_ok=True)
    result = {
        "checkpoint": options.checkpoint,
        "verdicts": [{**dataclasses.asdict(v), "healthy": v.healthy} for v in verdicts],
        "kl_per_dim": statistics.kl_per_dim.tolist(),
        "likelihood": dataclasses.asdict(likelihood),
    }
    (output / "latents.json").write_text(json.dumps(result, indent=2) + "\n")
    plot(statistics, output / "latents.png")
    print(f"wrote {output / 'latents.json'} and {output / 'latents.png'}")


@torch.no_grad()
def measure(opened, options: LatentOptions):
    """Encode the rows -> `LatentStatistics.compute()`."""
    from cdpvae.metrics import LatentStatistics

    statistics = LatentStatistics(opened.model.config.latent.latent_dim)
    batches = opened.rows(
        options.processed_dir, options.split, options.num_rows, options.rows_per_batch
    )
    for batch in batches:
        posterior = opened.model.posterior(batch.instruction.to(opened.model.device))
        statistics.update(posterior.mu.cpu(), posterior.logvar.cpu())
    return statistics.compute()


def judge(statistics, settings) -> list:
    """Every number with the description's healthy range."""
    from cdpvae.evaluation.verdicts import Verdict

    dims = settings.model.latent.latent_dim
    verdicts = [
        Verdict(
            f"active units (var > {threshold:g})",
            float(count),
            dims / 2 if threshold == 0.01 else None,
            float(dims) if threshold == 0.01 else None,
            f"of {dims}",
        )
        for threshold, count in statistics.active_units.items()
    ]
    mi = statistics.mutual_information
    return verdicts + [
        Verdict("KL, nats per sequence", statistics.kl_total, None, None),
        Verdict("KL, mean per dimension", statistics.kl_total / dims, 0.1, None),
        Verdict(
            "dimensions above free bits",
            float((statistics.kl_per_dim > settings.loss.free_bits).sum()),
            dims / 2,
            float(dims),
        ),
        Verdict("mutual information, lower", mi.lower, 1.0, None, f"cap {mi.cap:.2f}"),
        Verdict("mutual information, upper", mi.upper, None, None, "leave-one-out"),
        Verdict("marginal KL", statistics.marginal_kl, None, None, "KL - MI"),
        Verdict("effective rank of mu", statistics.effective_rank, None, None, f"of {dims}"),
        Verdict("mean cosine of mu pairs", statistics.mean_cosine, None, 0.9),
        Verdict("mean distance of mu pairs", statistics.mean_distance, None, None),
    ]


def plot(statistics, path: Path) -> None:
    """KL and variance of mu per dimension, sorted, with the thresholds they are judged by."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, (left, right) = pyplot.subplots(1, 2, figsize=(11, 3.6), layout="constrained")
    kl = sorted(statistics.kl_per_dim.tolist(), reverse=True)
    left.bar(range(len(kl)), kl, color="#3b6ea5")
    left.axhline(0.1, color="#b03a2e", linewidth=1, label="0.1 nats")
    left.set(title="KL per dimension", xlabel="dimension, sorted", ylabel="nats")
    left.legend(frameon=False)
    variance = sorted(statistics.mu_variance.tolist(), reverse=True)
    right.semilogy(range(len(variance)), [max(v, 1e-6) for v in variance], color="#3b6ea5")
    for threshold in statistics.active_units:
        right.axhline(threshold, color="#b03a2e", linewidth=0.7)
    right.set(title="variance of mu, thresholds of AU", xlabel="dimension, sorted")
    mi = statistics.mutual_information
    figure.suptitle(
        f"KL {statistics.kl_total:.1f} nats, MI {mi.lower:.2f} (cap {mi.cap:.2f}), effective rank "
        f"{statistics.effective_rank:.1f} of {len(kl)}"
        if math.isfinite(mi.lower)
        else ""
    )
    figure.savefig(path, dpi=120)
    pyplot.close(figure)


def main(argv: Sequence[str] | None = None) -> int:
    return run(check, argv)


if __name__ == "__main__":
    sys.exit(main())
