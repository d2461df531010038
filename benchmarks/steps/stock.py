"""The rival a user would reach for: a training step put together from the best stock parts.

The same model and terms as `naive_step.py`, from which it inherits what is the same, but written
by someone who knows the libraries:

    batch       padding-free: rows laid end to end in one, `position_ids` that restart, which is how
                transformers tells sequences apart. With flash-attn installed attention is
                `flash_attention_2` and costs what the rows cost; otherwise transformers builds a
                T x T block mask for SDPA, whose cost grows with the square of the micro-batch and
                on a CPU overtakes padding at some 32 rows: `--stock-layout padded` tells
    encoder     one pass for anchor and augmented view
    head        hidden states of predicting positions only; Liger's fused loss on CUDA where it is
                installed, else torch's chunked `F.linear_cross_entropy`, else plain cross-entropy
    bag         the multi-hot targets in one scatter

None of cdpvae's kernels, packing or switches: LoRA goes off by `disable_adapter()`, and pooling
is `nn.MultiheadAttention` over padded rows.

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
    """Whether a package can be imported."""
    return importlib.util.find_spec(package) is not None


def attention_for(device: torch.device) -> str:
    """transformers' name of the attention to use."""
    return "flash_attention_2" if device.type == "cuda" and has("flash_attn") else "sdpa"


def head_loss(device: torch.device) -> tuple[str, Callable[[Tensor, Tensor, Tensor], Tensor]]:
    """The best stock loss -> its name, and (hidden (N, D), weight (V, D), targets (N,)) -> mean."""
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
    return "F.cross_entropy", lambda hidden, weight, targets: F.cross_entropy(
        F.linear(hidden, weight).float(), targets
    )


class StockVAE(NaiveVAE):
    """`NaiveVAE` without logits, its rows laid end to end unless `layout` is "padded"."""

    def __init__(self, setup: Setup, layout: str):
        if layout not in LAYOUTS:
            raise ValueError(f"stock_layout={layout!r}: it must be one of {LAYOUTS}")
        super().__init__(setup, attention_for(setup.device))
        self.layout = layout

    def hidden_states(self, ids: Tensor, mask: Tensor) -> Tensor:
        """The frozen encoder pass -> (B, L, D), zeros at padding when flattened."""
        with torch.no_grad(), self.llama.disable_adapter():
            embeds = self.llama.get_input_embeddings()(ids)
            return self.run(embeds, mask)

    def decode(self, prompts_BPD: Tensor, ids: Tensor, mask: Tensor) -> Tensor:
        """-> hidden states of every position, (B, P + L, D)."""
        embeds = self.llama.get_input_embeddings()(ids)
        embeds = torch.cat((prompts_BPD.to(embeds.dtype), embeds), dim=1)
        prompt_mask = mask.new_ones(mask.shape[0], self.num_soft_tokens)
        return self.run(embeds, torch.cat((prompt_mask, mask), dim=1))

    def run(self, embeds_BLD: Tensor, mask: Tensor) -> Tensor:
        """The layers in the chosen layout, (B, L, D) in and out."""
        llama = self.llama.get_base_model().model
        if self.layout == "padded":
            return llama(
                inputs_embeds=embeds_BLD, attention_mask=mask, use_cache=False
            ).last_hidden_state
        lengths = mask.sum(1).tolist()
        position_ids = (mask.cumsum(1) - 1)[mask.bool()][None]
        hidden = llama(
            inputs_embeds=embeds_BLD[mask.bool()][None], position_ids=position_ids, use_cache=False
        ).last_hidden_state[0]
        return pad_sequence(hidden.split(lengths), batch_first=True)


class StockStep(NaiveStep):
    """The parts that differ from `NaiveStep`. `head` names the loss in use."""

    name = "stock"

    def __init__(self, setup: Setup, layout: str = "flattened"):
        super().__init__(setup, StockVAE(setup, layout))
        self.head, self.head_loss = head_loss(setup.device)

    @property
    def parts(self) -> str:
        """What it is made of here, for the row."""
        return f"{self.model.layout}, {attention_for(self.setup.device)}, {self.head}"

    def forward(self, batch: PaddedBatch) -> Tensor:
        model, loss = self.model, self.setup.settings.loss
        ids, mask = batch.instruction, batch.instruction_mask
        if batch.view is not None:
            # A view whose tokens are dropped and not replaced can be shorter than its anchor.
            narrower = ids.shape[1] - batch.view.shape[1]
            view = F.pad(batch.view, (0, narrower), value=self.setup.tokens.pad)
            ids = torch.cat((ids, view))
            mask = torch.cat((mask, F.pad(batch.view_mask, (0, narrower))))
        mu, logvar = model.encode(ids, mask)
        rows = len(batch.instruction)
        mu, mu_view, logvar = mu[:rows], mu[rows:], logvar[:rows]
        z = self.reparameterize(mu, logvar, batch.noise_BZ)
        hidden = model.decode(model.projector(z), batch.decoder_input, batch.response_mask)
        total = self.reconstruction(hidden, batch.labels)
        total = total + loss.beta_max * self.kl(mu, logvar)
        total = total + loss.bow_weight * self.bag_of_words(model.bow_head(z), batch.labels)
        if batch.view is not None:
            total = total + loss.contrastive_weight * self.infonce(mu, mu_view)
        return total

    def reconstruction(self, hidden: Tensor, labels: Tensor) -> Tensor:
        """hidden (B, P + L, D): only positions that predict a token reach the head."""
        targets = labels[:, 1:]
        predicts = targets != IGNORE
        predicting = hidden[:, -labels.shape[1] : -1][predicts]
        weight = self.model.llama.get_output_embeddings().weight
        return self.head_loss(predicting, weight, targets[predicts])

    def bag_of_words(self, bow_logits: Tensor, labels: Tensor) -> Tensor:
        special = torch.tensor(self.setup.tokens.no_content, device=labels.device)
        content = (labels != IGNORE) & ~torch.isin(labels, special)
        target = torch.zeros(bow_logits.shape, device=bow_logits.device)
        target[content.nonzero(as_tuple=True)[0], labels[content]] = 1.0
        return F.binary_cross_entropy_with_logits(bow_logits.float(), target)
