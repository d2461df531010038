"""The training objective: reconstruction + beta x rate + bag of words + InfoNCE.

The engine averages gradients over micro-batches (accumulation x ranks). A term that is a mean over
rows is a mean over those of its global micro-batch; the average then is one over all rows of the
step. Under `batching: tokens` micro-batches have different numbers of rows, and each such mean is
weighted by rows x micro_batches_per_step / row_divisor (`Term.share`), so that the step's average
is still over rows (every rank has the same number of rows in a global micro-batch). The floor of
the rate and the candidates of InfoNCE remain those of the global micro-batch. What a mean over
tokens needs is in `reconstruction.py`.

To add a term, see "A loss term" in docs/extending.md.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Any

from cdpvae.batch import StepSchedule, Term
from cdpvae.config import Settings
from cdpvae.loss.base import Gather, LossInputs, LossTerm, StepContext
from cdpvae.loss.bow import BagOfWords
from cdpvae.loss.contrastive import Contrastive, InfoNCELoss, MomentumQueue
from cdpvae.loss.order import Order
from cdpvae.loss.rate import Rate
from cdpvae.loss.reconstruction import Reconstruction


def build_objective(settings: Settings, flat_dim: int, world_size: int) -> Objective:
    """Make the objective of a run; the weights of a step come with its schedule.

    flat_dim: numbers of one row's latent vector, F.
    """
    # The order is that in which the terms are added up.
    loss, impl = settings.loss, settings.model.kernel_impl
    terms: list[LossTerm] = [
        Reconstruction(loss.objective, impl),
        Rate.of(loss),
        BagOfWords(loss.bow_reduction, impl),
        Contrastive(
            InfoNCELoss(loss.temperature, loss.normalize_latents),
            MomentumQueue(loss.queue_size, dim=max(flat_dim, 1)),
        ),
    ]
    if loss.order_weight:
        terms.append(Order(loss.objective, impl))
    return Objective(terms, settings.training.gradient_accumulation_steps * world_size)


class Objective:
    """Compute all terms of a micro-batch; keep what some of them need from step to step.

    terms: in the order in which they are added up. micro_batches_per_step: grad_accum x
    world_size. Raises ValueError for a number below 1.
    """

    def __init__(self, terms: Sequence[LossTerm], micro_batches_per_step: int) -> None:
        if micro_batches_per_step < 1:
            raise ValueError(
                f"micro_batches_per_step={micro_batches_per_step}: it is grad_accum x world_size "
                "and at least 1"
            )
        names = [type(term).__name__ for term in terms]
        if len(set(names)) < len(names):
            raise ValueError(f"terms {names}: each kind can be there once, its state has its name")
        self.terms = list(terms)
        self.micro_batches_per_step = micro_batches_per_step

    @property
    def optional_columns(self) -> tuple[str, ...]:
        """Return the names of figures that some steps do not compute."""
        return tuple(name for term in self.terms for name in term.optional_columns)

    def __call__(
        self, inputs: LossInputs, schedule: StepSchedule, gather: Gather | None = None
    ) -> list[Term]:
        """Return the terms of one micro-batch, and the negative ELBO as a term of weight 0.

        A term whose weight is exactly 0 is computed without a graph, reported, and left out of
        the total. With gradients enabled, terms that keep state take up this micro-batch.
        Raises ValueError for inputs that do not fit together.
        """
        step = StepContext(
            schedule=schedule,
            micro_batches_per_step=self.micro_batches_per_step,
            gather=gather,
        )
        found = [part for term in self.terms for part in term(inputs, step)]
        found += _family_penalties(inputs)
        found.append(_negative_elbo(found))
        # Weigh means over rows by the rows they are over.
        share = self._share(inputs.response.num_rows, schedule)
        return [dataclasses.replace(t, share=share) if t.per == "row" else t for t in found]

    def _share(self, num_rows: int, schedule: StepSchedule) -> float:
        """Return `Term.share` of a micro-batch of `num_rows` rows on this rank."""
        if schedule.row_divisor is None:
            return 1.0
        return num_rows * self.micro_batches_per_step / schedule.row_divisor

    def state_dict(self) -> dict[str, Any]:
        """Return what terms keep between steps, by the name of the term's class."""
        states = {name: term.state_dict() for name, term in self._by_name().items()}
        return {name: state for name, state in states.items() if state}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Continue there. Raises ValueError for a state that does not fit."""
        if "rows" in state:
            # Version 0.1.0 saved the queue alone.
            state = {Contrastive.__name__: state}
        wanted = {name: term for name, term in self._by_name().items() if term.state_dict()}
        if state.keys() != wanted.keys():
            raise ValueError(
                f"the saved objective has state of {sorted(state)}, this one of {sorted(wanted)}; "
                "resume with the terms of the saved run"
            )
        for name, term in wanted.items():
            term.load_state_dict(state[name])

    def _by_name(self) -> dict[str, LossTerm]:
        return {type(term).__name__: term for term in self.terms}


def _family_penalties(inputs: LossInputs) -> list[Term]:
    """Return what a latent family asks for beside its rate; it has scaled these itself."""
    return [
        Term(name=name, value=rows.reshape(len(rows), -1).sum(1).mean(), weight=1.0, per="row")
        for name, rows in inputs.penalties.items()
        if name != "kl"
    ]


def _negative_elbo(terms: Sequence[Term]) -> Term:
    """Return nats per sequence of reconstruction and unclamped rate, from one sample z."""
    by_name = {term.name: term for term in terms}
    value = by_name["recon_nats_per_sequence"].value.detach()
    if "kl" in by_name:
        value = value + by_name["kl"].report["kl_raw"]
    return Term(name="neg_elbo", value=value, weight=0.0, per="row")
