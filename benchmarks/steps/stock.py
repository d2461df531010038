"""A training step from the best stock parts, as a user who knows the libraries would write it.

The same model and terms as `naive.py`, from which it inherits the parts that are the same. What
differs:

    batch       padding-free: rows laid end to end in one, `position_ids` that restart, by which
                transformers separates sequences. With flash-attn installed attention is
                `flash_attention_2` and costs what the rows cost; otherwise transformers builds a
                T x T block mask for SDPA, whose cost grows with the square of the micro-batch and
                on a CPU exceeds that of padding from some 32 rows on: compare with
                `--stock-layout padded`
    encoder     one pass for anchor and augmented view
    head        hidden states of predicting positions only; Liger's fused loss on CUDA where it is
                installed, else torch's chunked `F.linear_cross_entropy`, else plain cross-entropy
    bag         the multi-hot targets in one scatter

It uses no kernel, packing or switch of cdpvae: LoRA goes off by `disable_adapter()`, and pooling is
`nn.MultiheadAttention` over padded rows.

Legend: B rows, T packed tokens, L padded length, D hidden, V vocabulary, Z latent, P prompts.
"""

from __future__ import annotations

import importlib.util
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils.rnn import pad_sequence

from benchmarks.steps.naive import IGNORE, NaiveStep, NaiveVAE, PaddedBatch
from benchmarks.support.step_setup import Setup

LAYOUTS = ("flattened", "padded")
CHUNK_ROWS = 1024


def has(package: str) -> bool:
    """Find out whether a package can be imported."""
    return importlib.util.find_spec(package) is not None


def attention_for(device: torch.device) -> str:
    """Choose the attention, by transformers' name."""
    return "flash_attention_2" if device.type == "cuda" and has("flash_attn") else "sdpa"


def head_loss(device: torch.device) -> tuple[str, Callable[[Tensor, Tensor, Tensor], Tensor]]:
    """Choose the best stock loss -> its name, and the function.

    The function takes hidden (N, D), weight (V, D) and targets (N,), and returns the mean.
    """
    # Liger's kernel where it can run: on CUDA, and where the extra package is installed.
    if device.type == "cuda" and has("liger_kernel"):
        from liger_kernel.transformers import LigerFusedLinearCrossEntropyLoss

        liger = LigerFusedLinearCrossEntropyLoss()
        return "Liger", lambda hidden, weight, targets: liger(weight, hidden, targets)
    if hasattr(F, "linear_cross_entropy") and hasattr(nn, "LinearCrossEntropyOptions"):
        # torch's own choice is 128 rows at 8B; larger chunks read the head less often.
        options = nn.LinearCrossEntropyOptions(batch_chunk_size=CHUNK_ROWS)
        return "F.linear_cross_entropy", lambda hidden, weight, targets: F.linear_cross_entropy(
            hidden, weight, targets, options=options
        )
    # An older torch computes whole logits, of the predicting positions only.
    return "F.cross_entropy", lambda hidden, weight, targets: F.cross_entropy(
        F.linear(hidden, weight).float(), targets
    )


class StockVAE(NaiveVAE):
    """A `NaiveVAE` without logits, its rows laid end to end unless `layout` is "padded".

    Raises ValueError for a layout that is not in LAYOUTS.
    """

    def __init__(self, setup: Setup, layout: str):
        if layout not in LAYOUTS:
            raise ValueError(f"stock_layout={layout!r}: it must be one of {LAYOUTS}")
        super().__init__(setup, attention_for(setup.device))
        self.layout = layout

    def hidden_states(self, ids: Tensor, mask: Tensor) -> Tensor:
        """Run the frozen encoder pass -> (B, L, D), zeros at padding when flattened."""
        with torch.no_grad(), self.llama.disable_adapter():
            return self.run(self.layers.embed_tokens(ids), mask)

    def decode(self, prompts_BPD: Tensor, ids: Tensor, mask: Tensor) -> Tensor:
        """Compute the hidden states of every position, (B, P + L, D)."""
        embeds = self.layers.embed_tokens(ids)
        embeds = torch.cat((prompts_BPD.to(embeds.dtype), embeds), dim=1)
        prompt_mask = mask.new_ones(mask.shape[0], self.num_soft_tokens)
        return self.run(embeds, torch.cat((prompt_mask, mask), dim=1))

    def run(self, embeds_BLD: Tensor, mask: Tensor) -> Tensor:
        """Run the layers in the chosen layout, (B, L, D) in and out."""
        llama = self.layers
        if self.layout == "padded":
            return llama(
                inputs_embeds=embeds_BLD, attention_mask=mask, use_cache=False
            ).last_hidden_state
        # Positions restart at each row, which is how transformers sees where a row begins.
        lengths = mask.sum(1).tolist()
        position_ids = (mask.cumsum(1) - 1)[mask.bool()][None]
        hidden = llama(
            inputs_embeds=embeds_BLD[mask.bool()][None], position_ids=position_ids, use_cache=False
        ).last_hidden_state[0]
        return pad_sequence(hidden.split(lengths), batch_first=True)


class StockStep(NaiveStep):
    """The training step from stock parts. `head` names the loss in use."""

    name = "stock"
    model: StockVAE

    def __init__(self, setup: Setup, layout: str = "flattened"):
        super().__init__(setup, StockVAE(setup, layout))
        self.head, self.head_loss = head_loss(setup.device)

    @property
    def parts(self) -> str:
        """Name the parts in use, for the row."""
        return f"{self.model.layout}, {attention_for(self.setup.device)}, {self.head}"

    def forward(self, batch: PaddedBatch) -> Tensor:
        """Encode, sample z, decode, and add up the weighted terms; one encoder pass for both."""
        model, loss = self.model, self.setup.settings.loss
        ids, mask = batch.instruction, batch.instruction_mask
        if batch.view is not None and batch.view_mask is not None:
            # A view whose tokens are dropped and not replaced can be shorter than its anchor.
            narrower = ids.shape[1] - batch.view.shape[1]
            view = F.pad(batch.view, (0, narrower), value=self.setup.tokens.pad)
            ids = torch.cat((ids, view))
            mask = torch.cat((mask, F.pad(batch.view_mask, (0, narrower))))
        # One pass for both: the first rows are the anchors, the others their views.
        mu, logvar = model.encode(ids, mask)
        rows = len(batch.instruction)
        mu, mu_view, logvar = mu[:rows], mu[rows:], logvar[:rows]
        z = self.reparameterize(mu, logvar, batch.noise_BZ)
        hidden = model.decode(model.projector(z), batch.decoder_input, batch.response_mask)
        # Each term by its weight, as in the naive step.
        total = self.reconstruction(hidden, batch.labels)
        total = total + loss.beta_max * self.kl(mu, logvar)
        total = total + loss.bow_weight * self.bag_of_words(model.bow_head(z), batch.labels)
        if batch.view is not None:
            total = total + loss.contrastive_weight * self.infonce(mu, mu_view)
        return total

    def reconstruction(self, decoded: Tensor, labels: Tensor) -> Tensor:
        """Compute the mean cross-entropy; only positions that predict a token reach the head.

        decoded (B, P + L, D): the hidden states that `decode` returns. labels (B, L).
        """
        # The position before a token predicts it.
        targets = labels[:, 1:]
        predicts = targets != IGNORE
        predicting = decoded[:, -labels.shape[1] : -1][predicts]
        weight = self.model.llama.get_output_embeddings().weight
        return self.head_loss(predicting, weight, targets[predicts])

    def bag_of_words(self, bow_logits: Tensor, labels: Tensor) -> Tensor:
        """Compute the binary cross-entropy with multi-hot targets, filled in one scatter."""
        # BOS, EOS and padding are no content.
        special = torch.tensor(self.setup.tokens.no_content, device=labels.device)
        content = (labels != IGNORE) & ~torch.isin(labels, special)
        target = torch.zeros(bow_logits.shape, device=bow_logits.device)
        target[content.nonzero(as_tuple=True)[0], labels[content]] = 1.0
        return F.binary_cross_entropy_with_logits(bow_logits.float(), target)
