"""The description taken literally: one training step in stock PyTorch, transformers and PEFT.

What a competent engineer would write from the project's description section by section, before
anything is made fast; `train_step.py` compares cdpvae with it. It uses nothing of `cdpvae.models`
or `cdpvae.loss`; weights come in as state, settings as plain values. It is meant to be fair:
batches are padded to their own longest row and not to 512 and 1,024, attention is torch's SDPA,
the encoder pass computes no logits, and nothing is done twice that the text does not ask for. What
it implements, by section of the description:

    1. AttentionPooling       learned query, `MultiheadAttention`, padding mask, LayerNorm
       VariationalEncoder     two GELU layers, mu and clamped logvar, z = mu + std * eps
       SoftPromptProjector    64 -> 2048 -> 4096 -> P x 4096, position embedding, LayerNorm
       LoRA                   PEFT on seven projections; off for the encoder: `disable_adapter()`
       Word dropout           `bernoulli(full_like(input_ids, 1 - rate))`, first token kept
    2. Reconstruction         whole logits, `CrossEntropy(logits[:-1], labels[1:])`
       KL, free bits          mean over the batch, clamped per dimension, sum / latent_dim
       Bag of words           dense multi-hot targets, filled row by row with `scatter_`
       InfoNCE                similarity matrix, diagonal first, negatives masked
    3. Augmentation           spans and words replaced by UNK, special tokens kept; the view goes
                              through the encoder in a pass of its own
    6. Training               bf16 autocast, gradient accumulation, clipping at 1.0, AdamW, warm-up,
                              cosine

Where the text leaves a choice, it chooses as cdpvae does, so that the losses are comparable: BOS
and EOS are not in the bag of words, InfoNCE compares mu with mu, padding is never a target. As the
text says, each micro-batch is averaged over its own tokens; with accumulation cdpvae averages over
the whole step, so losses are compared on one micro-batch.

Legend: B rows, L padded length, D hidden, V vocabulary, Z latent, P prompts.
"""

from __future__ import annotations

import random
import warnings
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from peft import LoraConfig, get_peft_model
from torch import Tensor, nn
from torch.optim.lr_scheduler import CosineAnnealingLR, LinearLR, SequentialLR
from transformers import LlamaForCausalLM, LlamaModel

from benchmarks.support.lengths import Row, StepBatch
from benchmarks.support.phases import Timed
from benchmarks.support.randomness import Draws
from benchmarks.support.step_setup import TOTAL_STEPS, Setup
from cdpvae.config import ModelConfig

IGNORE = -100  # the label that F.cross_entropy skips


@dataclass
class PaddedBatch:
    """One micro-batch, padded on the right: ids (B, L) int64, and masks that are 1 at tokens.

    instruction, instruction_mask: what the encoder reads.
    view, view_mask: the augmented instruction, or None.
    response, response_mask: what the decoder writes.
    labels: the response, -100 at padding.
    decoder_input: the response after word dropout.
    noise_BZ: the posterior's noise, or None to draw it.
    """

    instruction: Tensor
    instruction_mask: Tensor
    view: Tensor | None
    view_mask: Tensor | None
    response: Tensor
    response_mask: Tensor
    labels: Tensor
    decoder_input: Tensor
    noise_BZ: Tensor | None


class AttentionPooling(nn.Module):
    """Pool the hidden states of a row with one learned query (section 1)."""

    def __init__(self, hidden_dim: int, num_heads: int, dropout: float):
        super().__init__()
        self.query = nn.Parameter(torch.randn(1, 1, hidden_dim) * hidden_dim**-0.5)
        self.attention = nn.MultiheadAttention(
            hidden_dim, num_heads, dropout=dropout, batch_first=True
        )
        self.norm = nn.LayerNorm(hidden_dim)

    def forward(self, hidden_BLD: Tensor, mask_BL: Tensor) -> Tensor:
        """Pool (B, L, D) -> (B, D); mask_BL is 0 at padding."""
        # Every row asks with the same query; padding is never attended to.
        query = self.query.expand(hidden_BLD.shape[0], -1, -1)
        pooled, _ = self.attention(
            query, hidden_BLD, hidden_BLD, key_padding_mask=mask_BL == 0, need_weights=False
        )
        return self.norm(pooled.squeeze(1))


class VariationalEncoder(nn.Module):
    """Map a pooled text to mu and a clamped logvar (section 1)."""

    def __init__(self, config: ModelConfig, hidden_dim: int):
        super().__init__()
        width, rate = config.vae_hidden_dim, config.encoder_dropout
        self.mlp = nn.Sequential(
            *(nn.Linear(hidden_dim, width), nn.GELU(), nn.Dropout(rate)),
            *(nn.Linear(width, width), nn.GELU(), nn.Dropout(rate)),
        )
        self.mu_head = nn.Linear(width, config.latent.latent_dim)
        self.logvar_head = nn.Linear(width, config.latent.latent_dim)
        self.clamp = config.latent.logvar_clamp

    def forward(self, pooled_BD: Tensor) -> tuple[Tensor, Tensor]:
        """Compute mu and logvar, each (B, Z)."""
        hidden = self.mlp(pooled_BD)
        return self.mu_head(hidden), self.logvar_head(hidden).clamp(-self.clamp, self.clamp)


class SoftPromptProjector(nn.Module):
    """Map z to soft prompts in the decoder's embedding space (section 1)."""

    def __init__(self, config: ModelConfig, hidden_dim: int):
        super().__init__()
        width, rate = config.vae_hidden_dim, config.projector_dropout
        self.shape = (config.num_soft_tokens, hidden_dim)
        self.mlp = nn.Sequential(
            *(nn.Linear(config.latent.latent_dim, width), nn.GELU(), nn.Dropout(rate)),
            *(nn.Linear(width, hidden_dim), nn.GELU(), nn.Dropout(rate)),
            nn.Linear(hidden_dim, config.num_soft_tokens * hidden_dim),
        )
        self.position = nn.Parameter(torch.randn(1, *self.shape) * 0.02)
        self.norm = nn.LayerNorm(hidden_dim)

    def forward(self, z_BZ: Tensor) -> Tensor:
        """Compute the prompts, (B, P, D)."""
        return self.norm(self.mlp(z_BZ).view(-1, *self.shape) + self.position)


class NaiveVAE(nn.Module):
    """The model of the description: a PEFT Llama and four trainable heads in fp32."""

    def __init__(self, setup: Setup, attention: str = "sdpa"):
        super().__init__()
        config, hidden = setup.settings.model, setup.llama.hidden_size
        # LoRA over the frozen Llama, by PEFT.
        lora = LoraConfig(
            r=config.lora_r,
            lora_alpha=config.lora_alpha,
            lora_dropout=config.lora_dropout,
            use_rslora=config.use_rslora,
            target_modules=list(config.lora_target_modules),
            task_type="CAUSAL_LM",
        )
        with warnings.catch_warnings():
            # The names that all supported transformers know are deprecated in the newest.
            warnings.simplefilter("ignore", FutureWarning)
            self.llama = get_peft_model(setup.new_llama(attention), lora)
            if setup.settings.training.gradient_checkpointing:
                self.llama.gradient_checkpointing_enable({"use_reentrant": False})
        # The four trainable heads, in fp32.
        self.pooling = AttentionPooling(hidden, config.pooling_heads, config.pooling_dropout)
        self.encoder = VariationalEncoder(config, hidden)
        self.projector = SoftPromptProjector(config, hidden)
        self.bow_head = nn.Linear(config.latent.latent_dim, setup.llama.vocab_size)
        self.num_soft_tokens = config.num_soft_tokens
        self.to(setup.device)
        # Start where the other variants start.
        heads = ("pooling", "encoder", "projector", "bow_head")
        setup.load_trainable(self.llama, {name: getattr(self, name) for name in heads})

    @property
    def layers(self) -> LlamaModel:
        """Return the Llama without its output head; LoRA's layers are inside."""
        base = self.llama.get_base_model()
        assert isinstance(base, LlamaForCausalLM)
        return base.model

    def hidden_states(self, ids: Tensor, mask: Tensor) -> Tensor:
        """Run the frozen encoder pass, LoRA off -> (B, L, D)."""
        with torch.no_grad(), self.llama.disable_adapter():
            return self.layers(
                input_ids=ids, attention_mask=mask, use_cache=False
            ).last_hidden_state

    def encode(self, ids: Tensor, mask: Tensor) -> tuple[Tensor, Tensor]:
        """Encode padded ids -> mu and logvar, each (B, Z)."""
        hidden = self.hidden_states(ids, mask).to(self.pooling.query.dtype)
        return self.encoder(self.pooling(hidden, mask))

    def decode(self, prompts_BPD: Tensor, ids: Tensor, mask: Tensor) -> Tensor:
        """Compute the logits of every position, soft prompts included, (B, P + L, V)."""
        # The prompts stand before the response, and every token attends to them.
        embeds = self.llama.get_input_embeddings()(ids)
        embeds = torch.cat((prompts_BPD.to(embeds.dtype), embeds), dim=1)
        prompt_mask = mask.new_ones(mask.shape[0], self.num_soft_tokens)
        mask = torch.cat((prompt_mask, mask), dim=1)
        return self.llama(inputs_embeds=embeds, attention_mask=mask, use_cache=False).logits


class NaiveStep:
    """The training step of the description.

    `loss` computes one micro-batch. `start` makes the optimizer; `step` needs it.
    """

    name = "naive"

    def __init__(self, setup: Setup, model: NaiveVAE | None = None):
        self.setup = setup
        self.model = NaiveVAE(setup) if model is None else model
        self.model.train()
        self.random = random.Random(setup.settings.training.seed)

    def loss(self, rows: list[Row], with_view: bool, draws: Draws | None = None) -> Tensor:
        """Compute the total loss of one micro-batch; `draws` replaces what is random."""
        batch = self.collate(rows, with_view, draws)
        bf16 = self.setup.settings.training.precision == "bf16"
        with torch.autocast(self.setup.device.type, torch.bfloat16, enabled=bf16):
            return self.forward(batch)

    def forward(self, batch: PaddedBatch) -> Tensor:
        """Encode, sample z, decode, and add up the weighted terms."""
        # The instruction becomes z, and z becomes soft prompts.
        model, loss = self.model, self.setup.settings.loss
        mu, logvar = model.encode(batch.instruction, batch.instruction_mask)
        z = self.reparameterize(mu, logvar, batch.noise_BZ)
        prompts = model.projector(z)
        logits = model.decode(prompts, batch.decoder_input, batch.response_mask)
        # Each term by its weight; the view goes through the encoder once more.
        total = self.reconstruction(logits, batch.labels)
        total = total + loss.beta_max * self.kl(mu, logvar)
        total = total + loss.bow_weight * self.bag_of_words(model.bow_head(z), batch.labels)
        if batch.view is not None and batch.view_mask is not None:
            mu_view, _ = model.encode(batch.view, batch.view_mask)
            total = total + loss.contrastive_weight * self.infonce(mu, mu_view)
        return total

    # What is random, and batches.

    @staticmethod
    def reparameterize(mu: Tensor, logvar: Tensor, noise_BZ: Tensor | None) -> Tensor:
        """Sample z = mu + std * eps, in fp32; eps is drawn where no noise is given."""
        std = torch.exp(0.5 * logvar.float())
        eps = torch.randn_like(std) if noise_BZ is None else noise_BZ
        return mu.float() + std * eps

    def collate(self, rows: list[Row], with_view: bool, draws: Draws | None) -> PaddedBatch:
        """Pad the rows, and augment and drop words unless `draws` has the results."""
        instruction, instruction_mask = self.pad([row.instruction for row in rows])
        response, response_mask = self.pad([row.response for row in rows])
        # The augmented view and the dropped words are random; the draws replace both.
        view = view_mask = None
        if with_view:
            views = draws.views if draws else [self.augment(row.instruction) for row in rows]
            view, view_mask = self.pad(views)
        dropped = self.pad(draws.response_inputs)[0] if draws else self.drop_words(response)
        return PaddedBatch(
            instruction=instruction,
            instruction_mask=instruction_mask,
            view=view,
            view_mask=view_mask,
            response=response,
            response_mask=response_mask,
            labels=response.masked_fill(response_mask == 0, IGNORE),
            decoder_input=dropped,
            noise_BZ=draws.noise_BZ.to(self.setup.device) if draws else None,
        )

    def pad(self, rows: list[list[int]]) -> tuple[Tensor, Tensor]:
        """Pad to the longest row -> ids and mask, (B, L), on the device."""
        longest = max(map(len, rows))
        ids = [row + [self.setup.tokens.pad] * (longest - len(row)) for row in rows]
        mask = [[1] * len(row) + [0] * (longest - len(row)) for row in rows]
        device = self.setup.device
        return torch.tensor(ids, device=device), torch.tensor(mask, device=device)

    def drop_words(self, input_ids: Tensor) -> Tensor:
        """Replace tokens by pad at random; the first token of a row stays."""
        rate = self.setup.settings.loss.word_dropout
        # The draw of the description, token by token.
        keep = torch.bernoulli(torch.full_like(input_ids, 1.0 - rate, dtype=torch.float)).bool()
        keep[:, 0] = True
        return torch.where(keep, input_ids, self.setup.tokens.pad)

    def augment(self, ids: list[int]) -> list[int]:
        """Replace spans and single words by UNK, or by pad without UNK; special tokens stay."""
        config, tokens = self.setup.settings.augmentation, self.setup.tokens
        fill = tokens.pad if tokens.unk is None else tokens.unk
        # Single words, then spans of random length from random starts.
        masked = [self.random.random() < config.word_dropout_rate for _ in ids]
        mean_length = (1 + config.span_max_len) / 2
        for start in range(len(ids)):
            if self.random.random() < config.span_mask_prob / mean_length:
                for place in range(start, start + self.random.randint(1, config.span_max_len)):
                    if place < len(ids):
                        masked[place] = True
        # Special tokens keep their meaning.
        pairs = zip(ids, masked, strict=True)
        return [fill if drop and token not in tokens.special else token for token, drop in pairs]

    # The terms of the loss.

    def reconstruction(self, decoded: Tensor, labels: Tensor) -> Tensor:
        """Compute the mean cross-entropy; the position of label i predicts label i + 1.

        decoded (B, P + L, V): the logits that `decode` returns. labels (B, L).
        """
        # The prompts' positions predict no token of the response.
        logits = decoded[:, -labels.shape[1] :]
        predicted = logits[:, :-1].reshape(-1, logits.shape[-1])
        return F.cross_entropy(predicted, labels[:, 1:].reshape(-1), ignore_index=IGNORE)

    def kl(self, mu: Tensor, logvar: Tensor) -> Tensor:
        """Compute the KL with free bits: clamped per dimension, averaged over dimensions."""
        # The mean over rows is clamped, not each row.
        mu, logvar = mu.float(), logvar.float()
        kl_per_dim = (0.5 * (mu**2 + logvar.exp() - 1 - logvar)).mean(dim=0)
        clamped = kl_per_dim.clamp(min=self.setup.settings.loss.free_bits)
        return clamped.sum() / kl_per_dim.shape[0]

    def bag_of_words(self, bow_logits: Tensor, labels: Tensor) -> Tensor:
        """Compute the binary cross-entropy with multi-hot targets, filled row by row."""
        # BOS, EOS and padding are no content.
        special = torch.tensor(self.setup.tokens.no_content, device=labels.device)
        target_ids = labels.masked_fill(torch.isin(labels, special), IGNORE)
        bow_target = torch.zeros(bow_logits.shape, device=bow_logits.device)
        for b in range(len(target_ids)):
            valid_ids = target_ids[b][target_ids[b] != IGNORE]
            bow_target[b].scatter_(0, valid_ids, 1.0)
        return F.binary_cross_entropy_with_logits(bow_logits.float(), bow_target)

    def infonce(self, mu: Tensor, mu_view: Tensor) -> Tensor:
        """Compute InfoNCE between mu and the view's mu; other rows are the negatives."""
        anchor, positive = F.normalize(mu.float(), dim=-1), F.normalize(mu_view.float(), dim=-1)
        sim = torch.mm(anchor, positive.T) / self.setup.settings.loss.temperature
        # The positive goes first, and is masked among the negatives.
        own = torch.eye(len(sim), dtype=torch.bool, device=sim.device)
        candidates = torch.cat((sim.diag()[:, None], sim.masked_fill(own, float("-inf"))), dim=1)
        return F.cross_entropy(
            candidates, torch.zeros(len(sim), dtype=torch.long, device=sim.device)
        )

    # The optimizer.

    def trainable(self) -> dict[str, nn.Parameter]:
        """List the trainable parameters by name."""
        return {n: p for n, p in self.model.named_parameters() if p.requires_grad}

    def start(self) -> None:
        """Make AdamW and the schedule: a linear warm-up, then a cosine."""
        training, total = self.setup.settings.training, TOTAL_STEPS
        self.optimizer = torch.optim.AdamW(
            self.trainable().values(), lr=training.learning_rate, weight_decay=training.weight_decay
        )
        # Stock schedules, one after the other.
        warmup = int(total * training.warmup_ratio)
        cosine = CosineAnnealingLR(self.optimizer, total - warmup, eta_min=training.eta_min)
        rise = LinearLR(self.optimizer, start_factor=1 / warmup, total_iters=warmup)
        self.scheduler = SequentialLR(self.optimizer, [rise, cosine], milestones=[warmup])

    def step(self, batch: StepBatch) -> None:
        """Take one optimizer step; gradients are averaged over the micro-batches."""
        for rows in batch.micro_batches:
            self.backward(self.loss(rows, batch.with_view) / len(batch.micro_batches))
        self.update()

    def backward(self, loss: Tensor) -> None:
        """Add a micro-batch's gradients; a method, so that it can be timed."""
        loss.backward()

    def update(self) -> None:
        """Clip, take the optimizer's step, move the schedule, clear the gradients."""
        nn.utils.clip_grad_norm_(
            self.trainable().values(), self.setup.settings.training.max_grad_norm
        )
        self.optimizer.step()
        self.scheduler.step()
        self.optimizer.zero_grad(set_to_none=True)

    def timed(self) -> list[Timed]:
        """List the calls that make up each phase."""
        # A call inside another timed call counts for its own phase only.
        model = self.model
        heads = (model.pooling, model.encoder, model.projector, model.bow_head)
        terms = ("reconstruction", "kl", "bag_of_words", "infonce")
        return [
            (self, "collate", "data"),
            (model, "hidden_states", "encoder"),
            *((head, "forward", "heads") for head in heads),
            (model, "decode", "decoder"),
            *((self, term, "loss") for term in terms),
            (self, "backward", "backward"),
            (self, "update", "optimizer"),
        ]
