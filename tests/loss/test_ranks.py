"""KL with free bits and InfoNCE over two real ranks equal the same rows on one.

The oracle is written out here and sees all rows; the ranks run `rank_worker.py` on gloo.
"""

import math
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F

WORKER = Path(__file__).with_name("rank_worker.py")
WORLD_SIZE, ROWS, Z = 2, 6, 5


def make_rows():
    generator = torch.Generator().manual_seed(7)
    shape = (ROWS, Z)
    mu, view, logvar = (
        torch.randn(shape, generator=generator, dtype=torch.float64) for _ in range(3)
    )
    logvar *= 0.1
    # Dimension 0: above the floor on the first rank, below it on the second and in the mean.
    # Dimension 1: below it on the first rank, above it on the second and in the mean.
    mu[:, 0] = torch.tensor([1.2] * 3 + [0.1] * 3)
    mu[:, 1] = torch.tensor([0.1] * 3 + [3.0] * 3)
    return {"mu": mu, "logvar": logvar, "view": view}


def single_rank(rows):
    """Values and gradients with respect to a matrix behind each input, all rows at once."""
    weights = {name: torch.eye(Z, dtype=torch.float64).requires_grad_() for name in rows}
    mu, logvar, view = (rows[name] @ weights[name] for name in ("mu", "logvar", "view"))
    kl_dim = ((mu**2 + logvar.exp() - 1 - logvar) / 2).mean(0)
    kl = kl_dim.clamp(min=0.5).sum()
    cosine = F.normalize(mu, dim=1) @ F.normalize(view, dim=1).t()
    infonce = -(cosine / 0.07).log_softmax(1).diag().mean()
    result = {
        "kl": kl.detach(),
        "kl_per_dim": kl_dim.detach(),
        "active_dims": (kl_dim > 0.5).sum().double(),
        "infonce": infonce.detach(),
        "mi_cap": math.log(ROWS),
        "queue": F.normalize(rows["view"], dim=1).float(),
    }
    for term, value in (("kl", kl), ("infonce", infonce)):
        gradients = torch.autograd.grad(
            value, list(weights.values()), retain_graph=True, materialize_grads=True
        )
        result |= {f"{term}/{name}": g for name, g in zip(weights, gradients, strict=True)}
    return result


@pytest.fixture(scope="module")
def results(tmp_path_factory):
    folder = tmp_path_factory.mktemp("ranks")
    rows = make_rows()
    torch.save(rows, folder / "rows.pt")
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    ranks = [
        subprocess.Popen(
            [sys.executable, str(WORKER), str(rank), str(WORLD_SIZE), str(folder)],
            env=environment,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        for rank in range(WORLD_SIZE)
    ]
    try:
        for process in ranks:
            output, _ = process.communicate(timeout=120)
            assert process.returncode == 0, output
    finally:
        for process in ranks:
            process.kill()
            process.wait()
    loaded = [torch.load(folder / f"rank{rank}.pt", weights_only=True) for rank in range(2)]
    return single_rank(rows), loaded


def test_the_floor_cuts_differently_on_each_rank():
    rows = make_rows()
    kl = (rows["mu"] ** 2 + rows["logvar"].exp() - 1 - rows["logvar"]) / 2
    local = [(half.mean(0) > 0.5)[:2].tolist() for half in kl.chunk(2)]
    assert local == [[True, False], [False, True]]
    assert (kl.mean(0) > 0.5)[:2].tolist() == [False, True]


@pytest.mark.parametrize(
    "name",
    [
        "kl",
        "kl_per_dim",
        "active_dims",
        "infonce",
        "mi_cap",
        "queue",
        "kl/mu",
        "kl/logvar",
        "kl/view",
        "infonce/mu",
        "infonce/logvar",
        "infonce/view",
    ],
)
def test_two_ranks_equal_one(results, name):
    want, ranks = results
    for rank in ranks:
        # fp64 sums in another order.
        torch.testing.assert_close(rank[name], want[name], rtol=1e-11, atol=1e-12)


def test_both_ranks_hold_the_same_queue(results):
    first, second = (rank["queue"] for rank in results[1])
    assert torch.equal(first, second)
