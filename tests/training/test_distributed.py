"""Collectives of the trainer on two ranks."""

from __future__ import annotations

import torch
import torch.distributed as dist
import torch.multiprocessing as mp

from cdpvae.training.distributed import all_gather_uneven_rows

# Rows of each rank: equal numbers, unequal ones, a rank without any, nothing at all.
CASES = ((2, 2), (3, 1), (0, 2), (0, 0))


def run_rank(rank: int, folder: str) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", f"file://{folder}/meet", rank=rank, world_size=2)
    for counts in CASES:
        own = torch.arange(counts[rank] * 2.0).view(-1, 2) + 100 * rank
        torch.save(all_gather_uneven_rows(own), f"{folder}/{rank}-{counts[0]}-{counts[1]}.pt")
    dist.destroy_process_group()


def test_rows_of_unequal_ranks_come_together_in_rank_order(tmp_path):
    mp.spawn(run_rank, args=(str(tmp_path),), nprocs=2)
    for counts in CASES:
        parts = [torch.arange(n * 2.0).view(-1, 2) + 100 * rank for rank, n in enumerate(counts)]
        for rank in (0, 1):
            found = torch.load(tmp_path / f"{rank}-{counts[0]}-{counts[1]}.pt")
            assert torch.equal(found, torch.cat(parts))
