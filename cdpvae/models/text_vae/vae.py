"""LlamaSoftPromptVAE: the composition, readable top to bottom.

    instruction -> frozen Llama -> attention pooling -> q(z|x) -> z
    z -> soft prompts (and deep prefix) + word-dropped response -> LoRA Llama -> hidden states

The logits of the decoder are never made in training: the loss takes hidden states and the head.

Legend: B rows, T packed tokens, N target positions, L longest row, Z latent, P prompts, D hidden,
V vocabulary.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import torch
from huggingface_hub import ModelHubMixin
from torch import Tensor, nn
from torch.nn import functional as F
from transformers.cache_utils import Cache

from cdpvae.batch import LossTerms, PackedText, Posterior, SpecialTokens, StepPlan, VAEBatch
from cdpvae.config import ModelConfig
from cdpvae.loss import SoftPromptVAELoss
from cdpvae.models.text_vae import generation, storage
from cdpvae.models.text_vae.backbone import Backbone
from cdpvae.models.text_vae.encoders.pooling import (
    AttentionPooling,
    LayerMix,
    VariationalEncoder,
    reparameterize,
)
from cdpvae.models.text_vae.packing import Packing
from cdpvae.models.text_vae.prompts import DeepPrefixProjector, SoftPromptProjector
from cdpvae_kernels import philox, prefixed_embedding, prefixed_rows, word_dropout

Gather = Callable[[Tensor], Tensor]


@dataclass
class VAEOutput:
    """What one forward pass gives; `None` where it was not asked for or does not exist.

    logits: (B, L, V) padded, only on request; position i predicts response token i+1.
    loss, kl_loss, recon_loss: scalars, when a loss function was given. z, mu, logvar: (B, Z) fp32.
    bow_logits: (B, V), only on request. mu_augmented: (B, Z). terms: all loss terms.
    """

    logits: Tensor | None = None
    loss: Tensor | None = None
    z: Tensor | None = None
    mu: Tensor | None = None
    logvar: Tensor | None = None
    kl_loss: Tensor | None = None
    recon_loss: Tensor | None = None
    bow_logits: Tensor | None = None
    mu_augmented: Tensor | None = None
    terms: LossTerms | None = None


@dataclass
class Decoded:
    """The decoder's packed output. hidden: (T + B*P, D). rows: (N,) its predicting positions."""

    hidden: Tensor
    rows: Tensor


class LlamaSoftPromptVAE(nn.Module, ModelHubMixin, library_name="cdpvae", license="apache-2.0"):
    """A Llama with a latent space.

    config: settings of the network; `config.backbone` is loaded unless `backbone` is given.
    tokens: special token ids; by default those of the backbone's config.
    Raises ValueError when settings, backbone and tokens do not fit each other.
    """

    def __init__(
        self,
        config: ModelConfig | None = None,
        backbone: Backbone | None = None,
        tokens: SpecialTokens | None = None,
    ):
        super().__init__()
        self.config = config = config or ModelConfig()
        self.backbone = backbone or Backbone.load(config)
        llama = self.backbone.config
        self.tokens = tokens or storage.tokens_of(llama)
        # On the model's device: made anew in every step, it would be a copy that waits for it.
        no_content = torch.tensor(self.tokens.no_content)
        self.register_buffer("no_content_ids", no_content, persistent=False)
        self.impl = config.kernel_impl
        self.layer_mix = self.pooling = self.encoder = self.projector = None
        self.deep_prefix = self.bow_head = None
        if config.latent.kind == "none":
            return
        hidden = llama.hidden_size
        if config.encoder_layer == "mix":
            self.layer_mix = LayerMix(self.backbone.num_states)
        self.pooling = AttentionPooling(hidden, config.pooling_heads, config.pooling_dropout)
        self.encoder = VariationalEncoder.of(config, hidden)
        self.projector = SoftPromptProjector(
            config.latent.latent_dim,
            config.vae_hidden_dim,
            hidden,
            config.num_soft_tokens,
            config.projector_dropout,
        )
        if config.deep_prefix:
            self.deep_prefix = DeepPrefixProjector(
                config.latent.latent_dim,
                llama.num_hidden_layers,
                llama.num_key_value_heads,
                llama.head_dim,
                config.num_soft_tokens,
                config.prefix_hidden_dim,
                config.prefix_bottleneck_dim,
                config.prefix_scale_init,
            )
        self.bow_head = nn.Linear(config.latent.latent_dim, llama.vocab_size)

    @property
    def num_prompts(self) -> int:
        return 0 if self.projector is None else self.config.num_soft_tokens

    @property
    def device(self) -> torch.device:
        return self.backbone.embedding_weight.device

    def head_modules(self) -> dict[str, nn.Module]:
        """The trainable modules beside LoRA, by attribute name."""
        names = ("layer_mix", "pooling", "encoder", "projector", "deep_prefix", "bow_head")
        return {name: getattr(self, name) for name in names if getattr(self, name) is not None}

    def set_gradient_checkpointing(self, on: bool) -> None:
        """Recompute the decoder's layers in backward instead of keeping their activations."""
        self.backbone.gradient_checkpointing = on

    # From text to the posterior

    def posterior(self, text: PackedText) -> Posterior:
        """q(z|x) of packed texts; gradients reach the heads, never the backbone."""
        packing = Packing.of(text.cu_seqlens, text.ids.numel(), text.max_len)
        states = self.backbone.encode(text, packing)
        hidden_TD = self.layer_mix(states) if self.layer_mix is not None else states[0]
        return self.encoder(self.pooling(self._to_head_dtype(hidden_TD), packing))

    def encode(
        self, instruction_ids: Tensor, attention_mask: Tensor
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Padded (B, L) ids and mask -> z, mu, logvar, each (B, Z) fp32.

        z is a sample of q(z|x) in training mode and mu in eval mode.
        Raises ValueError for mismatched shapes, empty rows, or a model without latent.
        """
        if self.config.latent.kind == "none":
            raise ValueError("a model with latent.kind=none has no encoder")
        posterior = self.posterior(PackedText.from_padded(instruction_ids, attention_mask))
        noise = torch.randn_like(posterior.mu) if self.training else torch.zeros(())
        z = reparameterize(posterior, noise.to(posterior.mu.device))
        return z, posterior.mu, posterior.logvar

    # From z to text

    def decode(self, z: Tensor | None, input_ids: Tensor, response: PackedText) -> Decoded:
        """The decoder pass over soft prompts and `input_ids`, the (word-dropped) response.

        input_ids: (T,), laid out like `response.ids`. z: (B, Z), or None without latent.
        `Decoded.rows` maps every position of the response that predicts the next token.
        """
        embedding = self.backbone.embedding_weight
        prompts, num_prompts = self._prompts(z, response.num_rows), self.num_prompts
        embeds, cu_seqlens = prefixed_embedding(
            embedding, input_ids, response.cu_seqlens, prompts, impl=self.impl
        )
        prefixes = self.deep_prefix(z) if self.deep_prefix is not None else None
        prefix_len = self.config.num_soft_tokens if prefixes is not None else 0
        packing = Packing.of(
            cu_seqlens, embeds.shape[0], response.max_len + num_prompts, prefix_len
        )
        hidden = self.backbone.decode(embeds, packing, prefixes)
        every = torch.arange(input_ids.numel(), device=input_ids.device)
        return Decoded(hidden, prefixed_rows(every, response.cu_seqlens, num_prompts))

    def _prompts(self, z: Tensor | None, num_rows: int) -> Tensor:
        """(B, P, D) in the embedding's dtype; P is 0 without latent."""
        embedding = self.backbone.embedding_weight
        if self.projector is None:
            return embedding.new_zeros((num_rows, 0, embedding.shape[1]))
        return self.projector(z).to(embedding.dtype)

    def fill_prefix_cache(self, z: Tensor | None, cache: Cache) -> int:
        """Put the deep prefix of z into an empty cache -> the position of the next token."""
        if self.deep_prefix is None:
            return 0
        for layer, (key, value) in enumerate(self.deep_prefix(z)):
            dtype = self.backbone.embedding_weight.dtype
            cache.update(key.to(dtype), value.to(dtype), layer)
        return self.config.num_soft_tokens

    def _to_head_dtype(self, hidden: Tensor) -> Tensor:
        return hidden.to(self.pooling.query.dtype)

    # Both, with the loss

    def forward(
        self,
        batch: VAEBatch,
        plan: StepPlan | None = None,
        *,
        loss_fn: SoftPromptVAELoss | None = None,
        gather: Gather | None = None,
        seed: int = 0,
        return_logits: bool = False,
    ) -> VAEOutput:
        """One micro-batch through encoder and decoder.

        In training mode z ~ q(z|x) and the plan's word dropout applies, both keyed by
        (seed, sample index, epoch); in eval mode z = mu and nothing is dropped.
        `gather` brings together the rows of all ranks for the terms that need them.
        """
        posterior = view = z = None
        if self.config.latent.kind != "none":
            posterior, view = self._posteriors(batch)
            z = self._sample(posterior, batch, plan, seed)
        input_ids = self._drop_words(batch, plan, seed)
        decoded = self.decode(z, input_ids, batch.response)
        terms = None
        if loss_fn is not None:
            terms = self._loss(loss_fn, batch, decoded, posterior, z, view, plan, gather)
        return VAEOutput(
            logits=self._padded_logits(decoded, batch.response) if return_logits else None,
            loss=None if terms is None else terms.total,
            z=z,
            mu=None if posterior is None else posterior.mu,
            logvar=None if posterior is None else posterior.logvar,
            kl_loss=None if terms is None else terms.kl,
            recon_loss=None if terms is None else terms.recon,
            bow_logits=self.bow_logits(z) if return_logits and z is not None else None,
            mu_augmented=None if view is None else view.mu,
            terms=terms,
        )

    def _posteriors(self, batch: VAEBatch) -> tuple[Posterior, Posterior | None]:
        """Anchor and augmented view go through the encoder in one packed pass."""
        if batch.augmented is None:
            return self.posterior(batch.instruction), None
        both = self.posterior(PackedText.concat(batch.instruction, batch.augmented))
        anchor_rows = batch.instruction.num_rows
        return (
            Posterior(both.mu[:anchor_rows], both.logvar[:anchor_rows]),
            Posterior(both.mu[anchor_rows:], both.logvar[anchor_rows:]),
        )

    def _sample(
        self, posterior: Posterior, batch: VAEBatch, plan: StepPlan | None, seed: int
    ) -> Tensor:
        if not self.training:
            return posterior.mu
        return self.sample_posterior(
            posterior, batch.sample_index, seed=seed, epoch=plan.epoch if plan else 0
        )

    def sample_posterior(
        self, posterior: Posterior, sample_index: Tensor, *, seed: int, epoch: int
    ) -> Tensor:
        """z ~ q(z|x) with noise that depends on (seed, sample index, epoch) alone -> (B, Z)."""
        position = torch.arange(posterior.mu.shape[1], device=posterior.mu.device)
        noise = philox.normal(
            seed,
            philox.Stream.NOISE,
            sample_index[:, None],
            epoch,
            position[None, :],
            impl=self.impl,
        )
        return reparameterize(posterior, noise)

    def _drop_words(self, batch: VAEBatch, plan: StepPlan | None, seed: int) -> Tensor:
        response = batch.response
        if not self.training or plan is None or plan.word_dropout == 0:
            return response.ids
        return word_dropout(
            response.ids,
            response.cu_seqlens,
            batch.sample_index,
            rate=plan.word_dropout,
            fill_id=self.tokens.pad,
            seed=seed,
            epoch=plan.epoch,
            impl=self.impl,
        )

    def _loss(self, loss_fn, batch, decoded, posterior, z, view, plan, gather) -> LossTerms:
        bow = self.bow_head
        return loss_fn(
            hidden=decoded.hidden,
            head_weight=self.backbone.head_weight,
            target_rows=decoded.rows[batch.target_rows],
            targets=batch.targets,
            posterior=posterior,
            z=z,
            bow_weight=None if bow is None else bow.weight,
            bow_bias=None if bow is None else bow.bias,
            response=batch.response,
            special_ids=self.no_content_ids,
            view=view,
            plan=plan,
            gather=gather,
        )

    def bow_logits(self, z: Tensor) -> Tensor:
        """(B, Z) -> (B, V): which tokens the response holds."""
        return self.bow_head(z.to(self.bow_head.weight.dtype))

    def _padded_logits(self, decoded: Decoded, response: PackedText) -> Tensor:
        hidden = decoded.hidden[decoded.rows]
        packing = Packing.of(response.cu_seqlens, hidden.shape[0], response.max_len)
        return F.linear(packing.pad(hidden), self.backbone.head_weight)

    # Latent space operations

    @torch.no_grad()
    def generate(
        self,
        z: Tensor | None,
        max_length: int = 256,
        temperature: float = 1.0,
        top_p: float = 1.0,
        *,
        num_rows: int | None = None,
        generator: torch.Generator | None = None,
    ) -> Tensor:
        """Write a text for every latent (B, Z) -> ids (B, <= max_length), EOS included, then pad.

        temperature 0 is greedy. A model without latent takes z=None and `num_rows`.
        Raises ValueError for a z of the wrong shape or sampling settings out of range.
        """
        self._check_z(z)
        with self.evaluating():
            return generation.generate_ids(
                self,
                None if z is None else z.to(self.device).float(),
                num_rows=(num_rows or 1) if z is None else z.shape[0],
                max_length=max_length,
                temperature=temperature,
                top_p=top_p,
                generator=generator,
            )

    def interpolate(
        self, z1: Tensor, z2: Tensor, num_steps: int = 10, mode: str = "linear"
    ) -> Tensor:
        """Latents on the way from z1 to z2, ends included; `generation.interpolate`."""
        return generation.interpolate(z1, z2, num_steps, mode)

    def sample(
        self, num_rows: int, *, generator: torch.Generator | None = None, **kwargs
    ) -> tuple[Tensor, Tensor]:
        """z ~ N(0, I) and a text for each -> z (num_rows, Z), ids as in `generate`."""
        latent = self.config.latent
        if latent.kind == "none":
            raise ValueError("a model with latent.kind=none has no z to sample")
        z = torch.randn(num_rows, latent.latent_dim, generator=generator).to(self.device)
        return z, self.generate(z, generator=generator, **kwargs)

    def _check_z(self, z: Tensor | None) -> None:
        latent = self.config.latent
        if (z is None) != (latent.kind == "none"):
            raise ValueError(
                f"latent.kind={latent.kind} and z={'None' if z is None else 'a tensor'}: "
                "only a model without latent takes z=None"
            )
        if z is None or latent.kind == "none":
            return
        if z.dim() != 2 or z.shape[1] != latent.latent_dim:
            raise ValueError(f"z has shape {tuple(z.shape)}, expected (rows, {latent.latent_dim})")

    @contextmanager
    def evaluating(self):
        """Eval mode inside, the mode of before afterwards."""
        mode = self.training
        self.eval()
        try:
            yield
        finally:
            self.train(mode)

    # Storage: safetensors and JSON only

    def _save_pretrained(self, save_directory: Path) -> None:
        storage.save(self, Path(save_directory))

    @classmethod
    def from_pretrained(cls, path: str | Path, **kwargs) -> LlamaSoftPromptVAE:
        """Load what `save_pretrained` wrote: a directory or a hub id. In eval mode.

        backbone: another place of the same base weights, or a loaded `Backbone`.
        dtype: of the base weights. Raises ValueError, one line, for whatever does not fit.
        """
        if Path(path).is_dir():
            # Before huggingface_hub reads the file, so that the error names it.
            storage.read_config(Path(path))
        return super().from_pretrained(path, **kwargs)

    @classmethod
    def _from_pretrained(cls, *, model_id: str, backbone=None, dtype=torch.float32, **hub):
        directory = storage.locate(model_id, hub)
        return storage.load(cls, directory, backbone=backbone, dtype=dtype)
