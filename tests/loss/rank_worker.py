"""One rank of `test_ranks.py`: python rank_worker.py RANK WORLD_SIZE FOLDER

Reads FOLDER/rows.pt, takes its rank's share of the rows, computes KL and InfoNCE over the rows of
all ranks, averages the gradients over ranks as the engine does, and writes FOLDER/rank{RANK}.pt.
"""

import sys
from pathlib import Path

import torch
import torch.distributed as dist

from cdpvae.loss import FreeBitsKL, InfoNCELoss, MomentumQueue


class Gather(torch.autograd.Function):
    """Rows of all ranks; backward hands each rank its own slice times world_size."""

    @staticmethod
    def forward(ctx, rows):
        ctx.num_rows = rows.shape[0]
        parts = [torch.empty_like(rows) for _ in range(dist.get_world_size())]
        dist.all_gather(parts, rows.contiguous())
        return torch.cat(parts)

    @staticmethod
    def backward(ctx, grad):
        start = dist.get_rank() * ctx.num_rows
        return grad[start : start + ctx.num_rows] * dist.get_world_size()


def main(rank: int, world_size: int, folder: Path) -> None:
    dist.init_process_group("gloo", f"file://{folder}/rendezvous", rank=rank, world_size=world_size)
    saved = torch.load(folder / "rows.pt", weights_only=True)
    # One parameter for each input, so that a gradient averaged over ranks has a meaning.
    weights = {name: torch.eye(rows.shape[1], dtype=rows.dtype) for name, rows in saved.items()}
    local = {}
    for name, rows in saved.items():
        weights[name].requires_grad_()
        local[name] = rows.chunk(world_size)[rank] @ weights[name]
    kl = FreeBitsKL(0.5)(local["mu"], local["logvar"], Gather.apply)
    queue = MomentumQueue(64, dim=local["mu"].shape[1])
    infonce = InfoNCELoss()(local["mu"], local["view"], gather=Gather.apply)
    queue.push(infonce.positives)

    result = {
        "kl": kl.kl_sum_clamped.detach(),
        "kl_per_dim": kl.kl_per_dim,
        "active_dims": kl.active_dims,
        "infonce": infonce.loss.detach(),
        "mi_cap": infonce.mi_cap,
        "queue": queue.rows(),
    }
    for term, value in (("kl", kl.kl_sum_clamped), ("infonce", infonce.loss)):
        gradients = torch.autograd.grad(
            value, list(weights.values()), retain_graph=True, materialize_grads=True
        )
        for name, gradient in zip(weights, gradients, strict=True):
            dist.all_reduce(gradient)
            result[f"{term}/{name}"] = gradient / world_size
    torch.save(result, folder / f"rank{rank}.pt")
    dist.destroy_process_group()


if __name__ == "__main__":
    main(int(sys.argv[1]), int(sys.argv[2]), Path(sys.argv[3]))
