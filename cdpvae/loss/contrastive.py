"""InfoNCE between the latent vectors of a text and of its augmented view.

Each anchor must pick its own positive among all candidates: the positives of the global
micro-batch and, optionally, a queue of past ones. One direction only, anchors against positives.
log K - loss is a lower bound of the mutual information (van den Oord et al. 2018,
"Representation Learning with Contrastive Predictive Coding", appendix A.1) and can never pass
log K; a bound that sits at its cap says that there are too few candidates, not how much z knows.
That is why `mi_bound` and `mi_cap` are reported together.

Legend: B local rows, K rows of all ranks, Q rows in the queue, Z latent.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor

from cdpvae.batch import Term
from cdpvae.loss.base import Gather, LossInputs, LossTerm, StepContext, graph_if


@dataclass(frozen=True)
class InfoNCETerms:
    """What InfoNCE gives for one global micro-batch.

    loss (): nats, carries the graph.
    mi_bound (): nats, mi_cap - loss, detached.
    mi_cap: log(K + Q) in nats.
    positives (K, Z): the gathered positives as they were compared (normalised if so set),
        detached: what a queue takes.
    """

    loss: Tensor
    mi_bound: Tensor
    mi_cap: float
    positives: Tensor


class InfoNCELoss:
    """Compute -log of the softmax weight of the right candidate, mean over anchors.

    temperature: divides the similarities; positive. normalize: L2-normalise rows, so that the
    similarity is a cosine. Raises ValueError for a temperature that is not positive and finite.
    """

    def __init__(self, temperature: float, normalize: bool) -> None:
        if not (math.isfinite(temperature) and temperature > 0):
            raise ValueError(
                f"temperature={temperature}: it divides the similarities and must be finite and "
                "above 0; the default is 0.07"
            )
        self.temperature = temperature
        self.normalize = normalize

    def __call__(
        self,
        anchor_BZ: Tensor,
        positive_BZ: Tensor,
        queue_QZ: Tensor | None = None,
        gather: Gather | None = None,
    ) -> InfoNCETerms:
        """Compare each anchor with its own positive and with all others. Computes in fp32.

        anchor_BZ, positive_BZ (B, Z): row i of the second is the positive of row i of the first;
            B >= 1. fp64 inputs are computed in fp64.
        queue_QZ (Q, Z): further negatives, no gradient, taken as they are.
        gather: rows of all ranks, see `base.py`; None means local.

        Raises ValueError for wrong shapes.
        """
        # Bring the rows of all ranks together.
        if anchor_BZ.dim() != 2 or anchor_BZ.shape != positive_BZ.shape or not len(anchor_BZ):
            raise ValueError(
                f"anchor {tuple(anchor_BZ.shape)} and positive {tuple(positive_BZ.shape)} must "
                "both be (batch, latent_dim) with at least one row"
            )
        anchor_KZ = self._rows(anchor_BZ, gather)
        positive_KZ = self._rows(positive_BZ, gather)
        # Candidates are all positives, and those of earlier micro-batches.
        candidates = positive_KZ
        if queue_QZ is not None:
            candidates = torch.cat((positive_KZ, _checked_queue(queue_QZ, positive_KZ)))
        similarity = anchor_KZ @ candidates.t() / self.temperature
        own = torch.arange(similarity.shape[0], device=similarity.device)
        loss = F.cross_entropy(similarity, own)
        mi_cap = math.log(similarity.shape[1])
        return InfoNCETerms(loss, mi_cap - loss.detach(), mi_cap, positive_KZ.detach())

    def _rows(self, rows_BZ: Tensor, gather: Gather | None) -> Tensor:
        rows = rows_BZ.to(torch.promote_types(rows_BZ.dtype, torch.float32))
        if self.normalize:
            rows = F.normalize(rows, dim=-1)
        return rows if gather is None else gather(rows)


def _checked_queue(queue_QZ: Tensor, like_KZ: Tensor) -> Tensor:
    if queue_QZ.dim() != 2 or queue_QZ.shape[1] != like_KZ.shape[1]:
        raise ValueError(
            f"queue has shape {tuple(queue_QZ.shape)}; it must be (rows, {like_KZ.shape[1]})"
        )
    return queue_QZ.detach().to(like_KZ)


class MomentumQueue:
    """Keep the last `size` positives, first in, first out: negatives that cost no forward pass.

    He et al. 2020, "Momentum Contrast for Unsupervised Visual Representation Learning". There is
    no momentum encoder here: the backbone is frozen, so the features drift only with the small
    posterior network, and rows are as old as size / (rows of a global micro-batch) micro-batches.

    size: rows kept; 0 keeps none. dim: Z. Rows are fp32 and follow the device of the last push.
    Raises ValueError for a negative size or a dim below 1.
    """

    def __init__(self, size: int, *, dim: int) -> None:
        if size < 0:
            raise ValueError(f"size={size}: a queue holds at least 0 rows; 0 switches it off")
        if dim < 1:
            raise ValueError(f"dim={dim}: rows of a queue need at least one dimension")
        self.size = size
        self.dim = dim
        self._rows = torch.empty(0, dim, dtype=torch.float32)

    def __len__(self) -> int:
        return self._rows.shape[0]

    def push(self, rows_KZ: Tensor) -> None:
        """Append rows (K, dim) in their order; the oldest leave, the newest `size` stay.

        Every rank must push the same rows, the gathered ones, so that the queues stay alike.
        Raises ValueError for another shape.
        """
        if rows_KZ.dim() != 2 or rows_KZ.shape[1] != self.dim:
            raise ValueError(f"pushed rows {tuple(rows_KZ.shape)}; they must be (rows, {self.dim})")
        if self.size == 0:
            return
        new = rows_KZ.detach().to(torch.float32)
        # `cat` copies, and the slice is copied again so that what has left frees its memory.
        self._rows = torch.cat((self._rows.to(new.device), new))[-self.size :].clone()

    def rows(self) -> Tensor | None:
        """Return the rows held, (n, dim) fp32, oldest first; None while there are none."""
        return self._rows if len(self) else None

    def state_dict(self) -> dict[str, Any]:
        """Return plain integers and one tensor, for a checkpoint."""
        return {"size": self.size, "dim": self.dim, "rows": self._rows.clone()}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Take over what `state_dict` of a queue of the same size and dim gave.

        Raises ValueError for missing keys, another size or dim, or rows that do not fit.
        """
        # Refuse the queue of other settings, or a damaged one.
        missing = {"size", "dim", "rows"} - state.keys()
        if missing:
            raise ValueError(f"queue state lacks {sorted(missing)}; it holds {sorted(state)}")
        if state["size"] == self.size == 0:
            return
        if (state["size"], state["dim"]) != (self.size, self.dim):
            raise ValueError(
                f"the saved queue has size {state['size']} and dim {state['dim']}, this one "
                f"{self.size} and {self.dim}; resume with the settings of the saved run"
            )
        rows = state["rows"]
        if rows.dim() != 2 or rows.shape[1] != self.dim or rows.shape[0] > self.size:
            raise ValueError(
                f"the saved rows are {tuple(rows.shape)}; they must be (at most {self.size}, "
                f"{self.dim})"
            )
        self._rows = rows.detach().to(torch.float32, copy=True)


class Contrastive(LossTerm):
    """The InfoNCE term, weighted by `contrastive_weight`, and the queue of past positives.

    infonce: how rows are compared. queue: further negatives; positives enter it after each
    micro-batch that is trained on.
    """

    # A step without the augmented view computes none of them.
    optional_columns: ClassVar[tuple[str, ...]] = ("infonce", "mi_bound", "mi_cap")

    def __init__(self, infonce: InfoNCELoss, queue: MomentumQueue) -> None:
        self.infonce = infonce
        self.queue = queue

    def __call__(self, inputs: LossInputs, step: StepContext) -> list[Term]:
        """Return `infonce` with its bound and cap; nothing in a step without the augmented view."""
        if inputs.view is None:
            return []
        # Without a weight the bound is only reported.
        weight = step.weight("contrastive")
        with graph_if(weight):
            found = self.infonce(inputs.anchor, inputs.view, self.queue.rows(), step.gather)
        # Evaluation reads the queue and leaves it as it is.
        if torch.is_grad_enabled():
            self.queue.push(found.positives)
        return [
            Term(
                name="infonce",
                value=found.loss,
                weight=weight,
                per="row",
                report={
                    "mi_bound": found.mi_bound,
                    "mi_cap": found.mi_bound.new_full((), found.mi_cap),
                },
            )
        ]

    def state_dict(self) -> dict[str, Any]:
        """Return the state of the queue."""
        return self.queue.state_dict()

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Take over the queue of a checkpoint. Raises ValueError when it does not fit."""
        self.queue.load_state_dict(state)
