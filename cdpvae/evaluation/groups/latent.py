"""The group `latent`: how much the codes hold, and whether they cover the prior.

None of these figures proves that a decoder uses z; the group `use` does.

Legend: N rows, M prior draws.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from torch import Tensor

from cdpvae.evaluation.checkpoint import OpenedRun, RowSelection
from cdpvae.evaluation.encoded import EncodedRows, encode_rows
from cdpvae.evaluation.estimates import mean_figure
from cdpvae.evaluation.figures import Figure, FigureGroup
from cdpvae.evaluation.latents import LatentFigures, measure_code, require_latent
from cdpvae.evaluation.statistics import mean_and_error
from cdpvae.latents import GeneratorNoise, Latent
from cdpvae.latents.aggregate import (
    COVERED_KL,
    normal_to_marginal,
    prior_to_aggregate,
    share_in_holes,
)
from cdpvae.latents.priors.standard import StandardNormal

PRIOR_DRAWS = 4096
HOLE_QUANTILE = 0.99


def measure_latent(
    opened: OpenedRun,
    rows: RowSelection,
    *,
    seed: int,
    progress: Callable[[str], None],
    encoded: EncodedRows | None = None,
) -> FigureGroup:
    """Measure the codes of a split, and their mixture beside the prior.

    opened: the run.
    rows: which ones; all of them make the aggregate.
    seed: of every draw.
    progress: told a line as work goes on.
    encoded: the same rows with the same seed, where they are encoded already.

    Raises ValueError for a model without a latent and for an empty split.
    """
    require_latent(opened)
    encoded = encoded or encode_rows(opened, rows, seed=seed, progress=progress)
    # The codes by themselves.
    progress(f"codes of {encoded.num_rows} rows")
    latent, code = encoded.model.latent, encoded.code.to(torch.float32)
    measured = measure_code(latent, code, seed=seed)
    figures, notes = _code_figures(latent, measured, encoded.kl()), []
    series = {"variance of mu per dimension": measured.variance.tolist()}
    if measured.rate_per_dim.numel():
        series["KL per dimension"] = measured.rate_per_dim.tolist()
    # Their mixture beside the prior, as far as the family has densities.
    progress("prior and aggregate")
    marginals = marginal_gaps(encoded)
    if marginals is None:
        notes.append(
            "CU is left out: it needs densities of single dimensions and a standard normal prior"
        )
    else:
        series["KL of the prior to the aggregate per dimension"] = marginals
        figures.append(_covered_figure(marginals, encoded.num_rows))
    joint = _joint_figures(encoded, seed)
    if not joint:
        notes.append("joint holes are left out: no density log q(z|x), or fewer than two rows")
    return FigureGroup(name="latent", figures=[*figures, *joint], series=series, notes=notes)


def marginal_gaps(encoded: EncodedRows) -> list[float] | None:
    """Return KL(p(z_d) || q(z_d)) of every dimension in nats; None where it is not known."""
    # One point tells whether the family knows densities of single dimensions.
    latent, code = encoded.model.latent, encoded.code
    point = torch.zeros(1, dtype=torch.float64)
    known = latent.log_q_of_dim(point, 0, code) is not None
    if not known or not isinstance(latent.prior, StandardNormal):
        return None

    def gap(dim: int) -> float:
        def log_q(points: Tensor) -> Tensor:
            density = latent.log_q_of_dim(points, dim, code)
            assert density is not None
            return density

        return normal_to_marginal(log_q)

    return [gap(dim) for dim in range(latent.flat_dim)]


def _code_figures(latent: Latent, measured: LatentFigures, kl: Tensor | None) -> list[Figure]:
    """Return KL, active units, mutual information, marginal KL and effective rank.

    latent: the family. measured: what was measured of N rows. kl (N,): of each, where it is known.
    """
    rows, dims = measured.rows, latent.flat_dim
    # All of these are over the same rows.
    figures = []

    def add(
        name: str,
        value: float,
        unit: str,
        estimator: str,
        cap: float | None = None,
        note: str = "",
        error: float | None = None,
    ) -> None:
        figure = Figure(
            name=name,
            value=value,
            unit=unit,
            estimator=estimator,
            rows=rows,
            standard_error=error,
            cap=cap,
            note=note,
        )
        figures.append(figure)

    # What is spent, and in how many dimensions.
    if measured.rate_per_dim.numel():
        error = None if kl is None else mean_and_error(kl)[1]
        add("KL", measured.rate, "nats per sequence", "closed form", error=error)
    for threshold, count in measured.active_units.items():
        name, how = f"active units at {threshold:g}", f"variance of mu over rows > {threshold:g}"
        add(name, float(count), "dimensions", how, cap=float(dims))
    # What texts and codes share.
    if (shared := measured.information) is not None:
        how, error = "one draw a row, mixture of all rows", shared.lower_error
        note = "cap is log N"
        add("MI, lower", shared.lower, "nats", how, cap=shared.cap, note=note, error=error)
        note = "overshoots where posteriors are further apart than N rows can tell"
        how, error = "one draw a row, mixture of the others", shared.upper_error
        add("MI, upper", shared.upper, "nats", how, note=note, error=error)
        if measured.rate_per_dim.numel():
            gap = measured.rate - shared.lower
            note = f"too large where MI is near its cap of {shared.cap:.2f}"
            add("marginal KL", gap, "nats", "KL - MI, lower", note=note)
    # How many directions the codes spread over.
    how = "entropy of the singular values of mu (Roy & Vetterli 2007)"
    add("effective rank", measured.effective_rank, "dimensions", how, cap=float(min(dims, rows)))
    return figures


def _covered_figure(marginals: list[float], rows: int) -> Figure:
    """Return CU, the number of dimensions whose aggregate covers the prior."""
    # Of an aggregate of few rows the mixture is rough, and fewer dimensions pass.
    covered = sum(gap < COVERED_KL for gap in marginals)
    return Figure(
        name="covered units (CU)",
        value=float(covered),
        unit="dimensions",
        estimator=f"KL(p(z_d) || q(z_d)) < {COVERED_KL:g}, integrated over a grid",
        rows=rows,
        cap=float(len(marginals)),
        note=f"share {covered / len(marginals):.2f}; a collapsed dimension is covered as well",
    )


def _joint_figures(encoded: EncodedRows, seed: int) -> list[Figure]:
    """Return the KL of the prior to the aggregate, and the share of the prior in its holes."""
    latent, code = encoded.model.latent, encoded.code
    # Each row is measured against the others, so that one alone has no distance.
    if encoded.num_rows < 2 or latent.log_q(encoded.z[:1], code) is None:
        return []

    def log_q(z: Tensor) -> Tensor:
        density = latent.log_q(z, code)
        assert density is not None
        return density

    # The same prior draws for both.
    noise = GeneratorNoise(torch.Generator().manual_seed(seed))
    prior = latent.prior.sample(PRIOR_DRAWS, noise)
    gap = prior_to_aggregate(latent.prior.log_prob, log_q, prior)
    share = share_in_holes(log_q, prior, encoded.z, HOLE_QUANTILE)
    # Both depend on how many rows the aggregate has, and say so.
    of = f"aggregate of {encoded.num_rows} rows"
    return [
        mean_figure(
            "KL of the prior to the aggregate",
            gap,
            "nats",
            f"Monte Carlo over prior draws, {of}",
            note="rows are prior draws; falls as the aggregate gets more rows",
        ),
        Figure(
            name="share of the prior in holes",
            value=share,
            unit="share",
            estimator=(
                f"-max log q(z|x_n) above its {HOLE_QUANTILE:.0%} quantile over the rows' own "
                f"draws, each against the other rows; {of}"
            ),
            rows=PRIOR_DRAWS,
            standard_error=math.sqrt(share * (1 - share) / PRIOR_DRAWS),
            cap=1.0,
            note=f"{1 - HOLE_QUANTILE:.2f} where the aggregate is the prior; rows are prior draws",
        ),
    ]
