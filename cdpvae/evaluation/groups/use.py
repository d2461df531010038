"""The group `use`: what replacing z costs the decoder, altogether and number by number.

A decoder that ignores z loses nothing, however much the codes hold.

Legend: N rows, F units of z: its dimensions, or its concepts where a z is several vectors.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from cdpvae.evaluation.checkpoint import OpenedRun, RowSelection
from cdpvae.evaluation.encoded import EncodedRows, encode_rows
from cdpvae.evaluation.estimates import mean_figure
from cdpvae.evaluation.figures import Figure, FigureGroup
from cdpvae.evaluation.latents import require_latent
from cdpvae.evaluation.prompt_attention import prompt_shares
from cdpvae.latents import KeyedNoise
from cdpvae_kernels import Stream

NATS = "nats per sequence"
# A unit counts as used when replacing it alone costs more.
USED_COST = 0.1
ATTENTION_ROWS = 64


def measure_use(
    opened: OpenedRun,
    rows: RowSelection,
    *,
    seed: int,
    dimension_rows: int,
    progress: Callable[[str], None],
    encoded: EncodedRows | None = None,
) -> FigureGroup:
    """Measure what the decoder loses without its z, and how much it attends to the prompts.

    opened: the run.
    rows: which ones; z is shuffled over all of them.
    seed: of every draw.
    dimension_rows: rows, chosen at random, in which single dimensions are replaced.
    progress: told a line as work goes on.
    encoded: the same rows with the same seed, where they are encoded already.

    Raises ValueError for a model without a latent, fewer than two rows, or dimension_rows < 1.
    """
    require_latent(opened)
    if dimension_rows < 1:
        raise ValueError(f"dimension_rows={dimension_rows} must be at least 1")
    encoded = encoded or encode_rows(opened, rows, seed=seed, progress=progress)
    donor = other_rows(encoded.num_rows, seed=seed)
    # The whole z replaced, paired with the same row's own z.
    progress(f"z replaced in {encoded.num_rows} rows")
    own = encoded.own_nll
    figures = [mean_figure("NLL from z ~ q", own, NATS, "one draw a row")]
    for name, (z, how) in replacements(encoded, donor, seed=seed).items():
        cost = encoded.nll(z) - own
        figures.append(mean_figure(f"cost of {name}", cost, NATS, f"{how}; paired by row"))
    # Each of its numbers replaced alone.
    chosen = encoded.choose(dimension_rows, seed=seed)
    cost = unit_costs(
        encoded.select(chosen), own[chosen], encoded.z[donor[chosen]], progress=progress
    )
    unit = "dimension" if encoded.z.dim() == 2 else "concept"
    figures += _unit_figures(cost, unit)
    # How much of its attention the decoder spends on the prompts.
    progress("attention to the prompts")
    watched = encoded.select(encoded.choose(ATTENTION_ROWS, seed=seed))
    shares, even = prompt_shares(watched)
    figures.append(
        mean_figure(
            "attention to soft prompts",
            shares.mean(1),
            "share",
            "softmax mass on the prompts, mean over layers, heads and predicting positions",
            cap=1.0,
            note=f"{float(even.mean()):.3f} if every visible position got the same",
        )
    )
    series = {
        f"cost of each {unit} alone": cost.mean(0).tolist(),
        "attention to soft prompts by layer": shares.mean(0).tolist(),
    }
    if len(chosen) > 1:
        error = cost.std(0) / len(chosen) ** 0.5
        series[f"cost of each {unit} alone: standard error"] = error.tolist()
    return FigureGroup(name="use", figures=figures, series=series)


def other_rows(num_rows: int, *, seed: int) -> Tensor:
    """Choose for every row another row, each once -> (N,) int64.

    One cycle through all rows in a random order: no row gets itself, and the other row may be
    anywhere in the split. Raises ValueError for fewer than two rows.
    """
    if num_rows < 2:
        raise ValueError(
            f"{num_rows} row has no other row to take z from; evaluate at least two rows"
        )
    # Each row in the random order gets the z of the next one, the last that of the first.
    order = torch.randperm(num_rows, generator=torch.Generator().manual_seed(seed))
    return torch.empty_like(order).index_copy_(0, order, order.roll(-1))


def replacements(
    encoded: EncodedRows, donor: Tensor, *, seed: int
) -> dict[str, tuple[Tensor, str]]:
    """Return what stands in for z, by name: (N, *shape), and how it was drawn.

    encoded: the rows.
    donor (N,): for every row the row whose z it gets.
    seed: of the prior draws.
    """
    # The same prior draws as in the z-use test of the narrow commands.
    noise = KeyedNoise(seed, Stream.PRIOR, encoded.sample_index, 0)
    prior = encoded.model.latent.prior.sample(encoded.num_rows, noise)
    return {
        "z shuffled": (encoded.z[donor], "another row's z, from the whole split"),
        "z from the prior": (prior, "one draw a row"),
        "z zero": (torch.zeros_like(encoded.z), "no draw"),
    }


def unit_costs(
    encoded: EncodedRows,
    own: Tensor,
    other: Tensor,
    *,
    progress: Callable[[str], None],
) -> Tensor:
    """Return what each row loses when one unit of its z is another row's -> (N, F) nats.

    encoded: the rows.
    own (N,): their nats from their own z.
    other (N, *shape): the z that single units are taken from.
    progress: told a line for every tenth of the units.
    """
    units, costs = encoded.z.shape[1], []
    for unit in range(units):
        if unit % max(1, units // 10) == 0:
            progress(f"unit {unit} of {units} replaced in {encoded.num_rows} rows")
        # Only this unit changes: the rest of z stays the row's own.
        z = encoded.z.clone()
        z[:, unit] = other[:, unit]
        costs.append(encoded.nll(z) - own)
    return torch.stack(costs, 1)


def _unit_figures(cost: Tensor, unit: str) -> list[Figure]:
    """Return the largest, the sum and the number of used ones of costs (N, F)."""
    # Which one is largest is itself read off the estimates.
    mean, how = cost.mean(0), f"each {unit} alone from another row; paired by row"
    largest = int(mean.argmax())
    # The others need not be useless: they may stand in for each other.
    used = int((mean > USED_COST).sum())
    return [
        mean_figure(
            f"largest cost of one {unit}",
            cost[:, largest],
            NATS,
            how,
            note=f"{unit} {largest}; the largest of {len(mean)} estimates lies high",
        ),
        mean_figure(
            f"sum of the costs of single {unit}s",
            cost.sum(1),
            NATS,
            how,
            note=f"below the cost of z shuffled where {unit}s stand in for each other",
        ),
        Figure(
            name=f"{unit}s that the decoder uses",
            value=float(used),
            unit=f"{unit}s",
            estimator=f"mean cost alone > {USED_COST:g} nats",
            rows=len(cost),
            cap=float(len(mean)),
        ),
    ]
