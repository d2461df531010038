"""Ranks: how processes find each other, and the few collectives the trainer needs.

One process started plainly sets its own rendezvous variables (DeepSpeed would ask for MPI);
`deepspeed` and `torchrun` bring theirs.

Legend: B rows of one rank, K rows of all ranks.
"""

from __future__ import annotations

import os
import socket
from collections.abc import Mapping
from dataclasses import dataclass
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

# Long enough for one rank to load an 8B backbone from a cold disk while the other waits.
TIMEOUT = timedelta(minutes=60)


@dataclass(frozen=True)
class World:
    """This process among its peers."""

    rank: int
    world_size: int
    local_rank: int
    device: torch.device

    @property
    def is_main(self) -> bool:
        """Whether this rank writes files and lines."""
        return self.rank == 0


def init_world() -> World:
    """Join the process group (NCCL on CUDA, gloo elsewhere); a lone process makes its own."""
    cuda = torch.cuda.is_available()
    if not cuda:
        os.environ.setdefault("DS_ACCELERATOR", "cpu")
    # A process that no launcher started is the only one.
    if "RANK" not in os.environ:
        os.environ.update(
            RANK="0",
            WORLD_SIZE="1",
            LOCAL_RANK="0",
            MASTER_ADDR="127.0.0.1",
            MASTER_PORT=str(_free_port()),
        )
    # Choose the device before anything allocates on it.
    local_rank = int(os.environ.get("LOCAL_RANK", "0"))
    if cuda:
        torch.cuda.set_device(local_rank)
    import deepspeed  # after DS_ACCELERATOR is set: it picks its accelerator at import

    # Meet the other ranks.
    if not dist.is_initialized():
        deepspeed.init_distributed(
            dist_backend="nccl" if cuda else "gloo",
            auto_mpi_discovery=False,
            timeout=TIMEOUT,
            verbose=False,
        )
    device = torch.device("cuda", local_rank) if cuda else torch.device("cpu")
    return World(dist.get_rank(), dist.get_world_size(), local_rank, device)


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


class _GatherRows(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, rows: Tensor) -> Tensor:
        ctx.num_rows = rows.shape[0]
        return all_gather_rows(rows)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Tensor:
        start = dist.get_rank() * ctx.num_rows
        return grad[start : start + ctx.num_rows] * dist.get_world_size()


def gather_rows(rows: Tensor) -> Tensor:
    """Gather (B, ...) of every rank -> (K, ...) in rank order, differentiable.

    Every rank must compute the same scalar from the gathered rows. The engine then averages
    gradients over ranks, so each rank's own slice, times the world size, is the whole gradient and
    backward needs no communication.
    """
    return _GatherRows.apply(rows)


def all_gather_rows(rows: Tensor) -> Tensor:
    """Gather (B, ...) of every rank, the same B everywhere -> (K, ...); no gradient."""
    rows = rows.detach().contiguous()
    if dist.get_world_size() == 1:
        return rows
    parts = [torch.empty_like(rows) for _ in range(dist.get_world_size())]
    dist.all_gather(parts, rows)
    return torch.cat(parts)


def all_gather_uneven_rows(rows: Tensor) -> Tensor:
    """Return the rows (B, ...) of every rank, each with its own B, in rank order; no gradient."""
    rows = rows.detach().contiguous()
    if dist.get_world_size() == 1:
        return rows
    # Every rank sends as many rows as the longest has; the surplus is cut off again.
    counts = all_gather_rows(torch.tensor([len(rows)], device=rows.device)).tolist()
    if not max(counts):
        return rows
    padded = rows.new_zeros((max(counts), *rows.shape[1:]))
    padded[: len(rows)] = rows
    gathered = all_gather_rows(padded).split(max(counts))
    return torch.cat([part[:count] for part, count in zip(gathered, counts, strict=True)])


def all_reduce_sum(values: Tensor) -> Tensor:
    """Return the sum over ranks; the argument stays as it is."""
    total = values.detach().clone()
    if dist.get_world_size() > 1:
        dist.all_reduce(total)
    return total


def values_of_main(values: Mapping[str, float]) -> dict[str, float]:
    """Return the values of rank 0 on every rank, exactly; those of other ranks are not read."""
    if dist.get_world_size() == 1:
        return dict(values)
    box = [dict(values)]
    dist.broadcast_object_list(box, src=0)
    return box[0]


def barrier() -> None:
    """Wait for every rank."""
    if dist.get_world_size() > 1:
        dist.barrier()


def close_world() -> None:
    """Leave the process group."""
    if dist.is_initialized():
        dist.destroy_process_group()
