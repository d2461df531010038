"""Bag of words: z alone must say which tokens the response holds.

The default, that of the original description, is binary cross-entropy against the set of tokens,
averaged over rows *and vocabulary*. With 128K tokens it is nearly inert: a response holds some
hundred of them, each logit's gradient is divided by rows x 128,256, and what reaches z is of the
order of 1e-6.
`bow_reduction: categorical` is the literature's (Zhao et al. 2017, "Learning Discourse-level
Diversity for Neural Dialog Models using Conditional Variational Autoencoders", equation 5): the
mean over the response's tokens of -log softmax, whose gradient does not shrink with the vocabulary.

Legend: B rows, T packed tokens, L padded length, Z latent, V vocabulary.
"""

from __future__ import annotations

from typing import ClassVar, get_args

import torch
from torch import Tensor

from cdpvae.batch import PackedText, Term
from cdpvae.config.loss import BowReduction
from cdpvae.loss.base import LinearHead, LossInputs, LossTerm, StepContext, graph_if
from cdpvae_kernels import bow_bce, bow_categorical

BOW_REDUCTIONS = get_args(BowReduction)
# No token has this id.
NO_CONTENT = -1


def check_bow_reduction(reduction: str) -> None:
    """Raise ValueError for a reduction that does not exist."""
    if reduction not in BOW_REDUCTIONS:
        raise ValueError(f"bow_reduction={reduction!r}: it must be one of {BOW_REDUCTIONS}")


def content_ids(response: PackedText, special_ids: Tensor) -> Tensor:
    """Return the ids of the response, (T,) int64, with NO_CONTENT for those in `special_ids`.

    response: ids (T,) int64. special_ids (S,) int64: BOS, EOS and pad.
    Every token keeps its place: how many are left would be known to the device alone, and a
    compiled graph could not be cut by it.
    """
    special_T = torch.isin(response.ids, special_ids.to(response.ids.device))
    return response.ids.masked_fill(special_T, NO_CONTENT)


class BagOfWords(LossTerm):
    """The bag-of-words term, weighted by `bow_weight`.

    reduction: "bce" or "categorical". impl: passed on to `cdpvae_kernels`.
    Raises ValueError for another reduction.
    """

    # A model without a latent has no head to predict from.
    optional_columns: ClassVar[tuple[str, ...]] = ("bow",)

    def __init__(self, reduction: str, impl: str | None) -> None:
        check_bow_reduction(reduction)
        self.reduction = reduction
        self.impl = impl

    def __call__(self, inputs: LossInputs, step: StepContext) -> list[Term]:
        """Return `bow`; nothing for a model without a bag-of-words head."""
        if inputs.bow_head is None:
            return []
        # Without a weight the loss is only reported.
        weight = step.weight("bow")
        with graph_if(weight):
            value = bow_loss(
                inputs.z,
                inputs.bow_head,
                inputs.response,
                inputs.special_ids,
                self.reduction,
                impl=self.impl,
            )
        return [Term(name="bow", value=value, weight=weight, per="row")]


def bow_loss(
    z: Tensor,
    bow_head: LinearHead,
    response: PackedText,
    special_ids: Tensor,
    reduction: str,
    *,
    impl: str | None = None,
) -> Tensor:
    """Return the bag-of-words loss of a linear head against the content tokens of `response`.

    z (B, Z): latents, in any float dtype the head's operation takes.
    bow_head: Z inputs, V outputs, with bias.
    response: B rows.
    special_ids (S,) int64: left out of the bag.
    reduction: "bce", against the set of tokens, mean over rows and vocabulary; "categorical", per
        row the mean over tokens (repeats count) of -log softmax, then the mean over rows.
    impl: passed on to `cdpvae_kernels`.

    Returns a scalar in nats, fp32 (fp64 for fp64 inputs). A row without content tokens is all
    negatives in "bce" and adds 0 in "categorical".
    Raises ValueError for another reduction, wrong shapes, or ids outside the vocabulary.
    """
    check_bow_reduction(reduction)
    weight, bias = bow_head.weight, bow_head.bias
    # BOS, EOS and pad are in every response and say nothing.
    ids = content_ids(response, special_ids)
    arguments = (z, weight, bias, ids, response.cu_seqlens)
    if reduction == "bce":
        return bow_bce(*arguments, reduction="mean", ignore_index=NO_CONTENT, impl=impl)
    return bow_categorical(*arguments, ignore_index=NO_CONTENT, impl=impl)
