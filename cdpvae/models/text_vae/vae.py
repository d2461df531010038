"""LlamaSoftPromptVAE: the composition, readable top to bottom.

    instruction -> Llama, frozen or with its own LoRA -> attention pooling -> latent.infer -> z
    z -> soft prompts (and deep prefix) + word-dropped response -> LoRA Llama -> hidden states
    (under `decoder_reads: instruction` the instruction stands before the response)

The logits of the decoder are never made in training: the losses take hidden states and the head.
What a code and a z are is the business of the latent family (`cdpvae.latents`).

Legend: B rows, T packed tokens, L longest row, Z latent, P prompts, D hidden.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from huggingface_hub import ModelCard, ModelHubMixin
from torch import Tensor, nn
from transformers.cache_utils import Cache

from cdpvae.batch import PackedText, SpecialTokens, StepSchedule, VAEBatch
from cdpvae.config import ModelConfig
from cdpvae.latents import Code, GeneratorNoise, KeyedNoise, Latent, Noise, family_of
from cdpvae.models.text_vae import generation, storage
from cdpvae.models.text_vae.backbone import Backbone, kv_heads_of
from cdpvae.models.text_vae.card import model_card
from cdpvae.models.text_vae.decoder_text import DecoderText, text_begun, text_read
from cdpvae.models.text_vae.encoders.pooling import AttentionPooling, LayerMix
from cdpvae.models.text_vae.outputs import Decoded, ModelOutput, flat_z
from cdpvae.models.text_vae.packing import Packing
from cdpvae.models.text_vae.positional import PositionalProjector, root_mean_square
from cdpvae.models.text_vae.prompts import DeepPrefixProjector, SoftPromptProjector
from cdpvae_kernels import Stream, prefixed_embedding, prefixed_positions, word_dropout


class LlamaSoftPromptVAE(nn.Module, ModelHubMixin, library_name="cdpvae", license="apache-2.0"):
    """A Llama with a latent space.

    config: settings of the network; `config.backbone` is loaded unless `backbone` is given.
    tokens: special token ids; by default those of the backbone's config.
    Raises ValueError when settings, backbone and tokens do not fit each other.
    """

    layer_mix: LayerMix | None
    pooling: AttentionPooling | None
    latent: Latent
    projector: SoftPromptProjector | None
    deep_prefix: DeepPrefixProjector | None
    positional: PositionalProjector | None
    bow_head: nn.Linear | None
    no_content_ids: Tensor

    def __init__(
        self,
        config: ModelConfig | None = None,
        backbone: Backbone | None = None,
        tokens: SpecialTokens | None = None,
    ) -> None:
        super().__init__()
        self.config = config = config or ModelConfig()
        self.backbone = backbone or Backbone.load(config)
        llama = self.backbone.config
        self.tokens = tokens or storage.tokens_of(llama)
        # On the model's device: made anew in every step, it would be a copy that waits for it.
        no_content = torch.tensor(self.tokens.no_content)
        self.register_buffer("no_content_ids", no_content, persistent=False)
        self.impl = config.kernel_impl
        # Modules are made in this order: it is that of the random numbers they start from and of
        # the parameters in a checkpoint.
        self.layer_mix = self.pooling = self.projector = self.deep_prefix = self.bow_head = None
        self.positional = None
        family, hidden = family_of(config), llama.hidden_size
        self.pooled_dim = hidden
        if family.reads_text:
            if config.encoder_layer == "mix":
                self.layer_mix = LayerMix(self.backbone.num_states)
            self.pooling = AttentionPooling(
                hidden,
                config.pooling_heads,
                config.pooling_dropout,
                config.pooling_queries,
                config.pooling_positions,
            )
            self.pooled_dim = self.pooling.output_dim
        self.latent = family.of(config, self.pooled_dim)
        if family.reads_text:
            width = self.latent.flat_dim
            self.projector = SoftPromptProjector(
                width,
                config.mlp_hidden_dim,
                hidden,
                config.num_soft_tokens,
                config.projector_dropout,
            )
            if config.deep_prefix:
                self.deep_prefix = DeepPrefixProjector(
                    width,
                    llama.num_hidden_layers,
                    kv_heads_of(llama),
                    self.backbone.head_dim,
                    config.num_soft_tokens,
                    config.prefix_hidden_dim,
                    config.prefix_bottleneck_dim,
                    config.prefix_scale_init,
                )
            self.bow_head = nn.Linear(width, llama.vocab_size)
            if config.positional_slots:
                self.positional = PositionalProjector(
                    width,
                    hidden,
                    config.positional_slots,
                    config.positional_length,
                    root_mean_square(self.backbone.embedding_weight),
                )

    @property
    def num_prompts(self) -> int:
        """P, soft prompts before each response; 0 without a latent."""
        return 0 if self.projector is None else self.config.num_soft_tokens

    @property
    def device(self) -> torch.device:
        """Where the weights are."""
        return self.backbone.embedding_weight.device

    def head_modules(self) -> dict[str, nn.Module]:
        """Return the trainable modules beside LoRA, by attribute name."""
        names = "layer_mix pooling latent projector deep_prefix bow_head positional".split()
        modules = {name: getattr(self, name) for name in names}
        return {name: module for name, module in modules.items() if module is not None}

    def set_gradient_checkpointing(self, on: bool) -> None:
        """Recompute the decoder's layers in backward instead of keeping their activations."""
        self.backbone.gradient_checkpointing = on

    # From text to the code

    def infer(self, text: PackedText) -> Code:
        """Return q(z|x) of packed texts; gradients reach the heads, and an encoder's own LoRA."""
        if self.pooling is None:
            return self.latent.infer(self.backbone.embedding_weight.new_zeros(text.num_rows, 0))
        packing = Packing.of(text.cu_seqlens, text.ids.numel(), text.max_len)
        states = self.backbone.encode(text, packing)
        hidden_TD = self.layer_mix(states) if self.layer_mix is not None else states[0]
        return self.latent.infer(self.pooling(hidden_TD.to(self.pooling.query.dtype), packing))

    def encode(self, instruction_ids: Tensor, attention_mask: Tensor) -> tuple[Tensor, ...]:
        """Encode padded (B, L) ids and mask -> z (B, *latent.shape), then the code's tensors.

        For the Gaussian these are its mean and log-variance, each (B, Z) fp32. z is a sample of
        q(z|x) in training mode and the mean in eval mode.
        Raises ValueError for mismatched shapes, empty rows, or a model without a latent.
        """
        if self.pooling is None:
            raise ValueError("a model without a latent (latent.kind='none') has no encoder")
        code = self.infer(PackedText.from_padded(instruction_ids, attention_mask))
        noise = GeneratorNoise(device=self.device)
        z = self.latent.sample(code, noise) if self.training else self.latent.mean(code)
        return (z, *code.tensors().values())

    # From z to text

    def decode(
        self,
        z: Tensor | None,
        input_ids: Tensor,
        response: PackedText,
        instruction: PackedText | None = None,
    ) -> Decoded:
        """Run the decoder over soft prompts and `input_ids`, the (word-dropped) response.

        z (B, *latent.shape): None or (B, 0) without a latent.
        input_ids (T,): laid out like `response.ids`.
        response: what is written.
        instruction: read first under `decoder_reads: instruction`, otherwise not looked at.
        """
        # Lay the prompts of each row before its tokens.
        read = DecoderText.of(input_ids, response, text_read(self.config, instruction))
        embedding, text = self.backbone.embedding_weight, read.text
        prompts, num_prompts = self._prompts(z, text.num_rows), self.num_prompts
        embeds, cu_seqlens = prefixed_embedding(
            embedding, text.ids, text.cu_seqlens, prompts, impl=self.impl
        )
        positions = prefixed_positions(read.positions, text.cu_seqlens, num_prompts)
        # What z says of each position is added to the word that stands there.
        predicted = None
        if self.positional is not None:
            embeds, predicted = self.positional(flat_z(z), embeds, positions, response)
        # Keys and values of the deep prefix come before these.
        prefixes = self.deep_prefix(flat_z(z)) if self.deep_prefix is not None else None
        prefix_len = self.config.num_soft_tokens if prefixes is not None else 0
        packing = Packing.of(cu_seqlens, embeds.shape[0], text.max_len + num_prompts, prefix_len)
        hidden = self.backbone.decode(embeds, packing, prefixes)
        return Decoded(hidden, positions, predicted)

    def _prompts(self, z: Tensor | None, num_rows: int) -> Tensor:
        """Return the soft prompts (B, P, D) in the embedding's dtype; P is 0 without a latent."""
        embedding = self.backbone.embedding_weight
        if self.projector is None:
            return embedding.new_zeros((num_rows, 0, embedding.shape[1]))
        return self.projector(flat_z(z)).to(embedding.dtype)

    def soft_prompts(self, z: Tensor) -> Tensor:
        """Return the soft prompts of z (B, *latent.shape) -> (B, P, D)."""
        return self._prompts(z, z.shape[0])

    def slots_of(self, z: Tensor | None) -> Tensor | None:
        """Return the slots of z, made once for a whole text; None where there are none."""
        return None if self.positional is None else self.positional.slots_of(flat_z(z))

    def embed_at(self, ids: Tensor, slots: Tensor | None, column: Tensor) -> Tensor:
        """Return the decoder's input (B, L, D) for tokens (B, L) at these response positions.

        slots: of `slots_of`. column (B, L) int64: negative for a token before the response.
        """
        embeds = nn.functional.embedding(ids, self.backbone.embedding_weight)
        if self.positional is None or slots is None:
            return embeds
        return embeds + self.positional.additions_at(slots, column).to(embeds.dtype)

    def fill_prefix_cache(self, z: Tensor | None, cache: Cache) -> int:
        """Put the deep prefix of z into an empty cache -> the position of the next token."""
        if self.deep_prefix is None:
            return 0
        for layer, (key, value) in enumerate(self.deep_prefix(flat_z(z))):
            dtype = self.backbone.embedding_weight.dtype
            cache.update(key.to(dtype), value.to(dtype), layer)
        return self.config.num_soft_tokens

    # Both

    def forward(
        self, batch: VAEBatch, schedule: StepSchedule | None = None, *, seed: int = 0
    ) -> ModelOutput:
        """Run one micro-batch through encoder and decoder.

        In training mode z ~ q(z|x) and the schedule's word dropout applies, both keyed by
        (seed, sample index, epoch); in eval mode z is the code's mean and nothing is dropped.
        """
        code, view = self._codes(batch)
        epoch = schedule.epoch if schedule else 0
        noise = self.training_noise(batch.sample_index, seed=seed, epoch=epoch)
        z = self.latent.sample(code, noise) if self.training else self.latent.mean(code)
        input_ids = self._drop_words(batch, schedule, seed)
        decoded = self.decode(z, input_ids, batch.response, batch.instruction)
        return ModelOutput(code, view, z, decoded)

    def _codes(self, batch: VAEBatch) -> tuple[Code, Code | None]:
        """Return the codes of anchor and augmented view, encoded in one packed pass."""
        if batch.augmented is None:
            return self.infer(batch.instruction), None
        both = self.infer(PackedText.concat(batch.instruction, batch.augmented))
        anchor_rows = batch.instruction.num_rows
        return both.rows(0, anchor_rows), both.rows(anchor_rows)

    def training_noise(self, sample_index: Tensor, *, seed: int, epoch: int) -> Noise:
        """Return the noise of q(z|x): it depends on (seed, sample index, epoch) alone."""
        return KeyedNoise(seed, Stream.NOISE, sample_index, epoch, self.impl)

    def _drop_words(self, batch: VAEBatch, schedule: StepSchedule | None, seed: int) -> Tensor:
        """Return the decoder's input ids (T,): the response, with words dropped in training."""
        # The labels stay whole: only what the decoder reads is thinned out.
        response = batch.response
        if not self.training or schedule is None or schedule.word_dropout == 0:
            return response.ids
        return word_dropout(
            response.ids,
            response.cu_seqlens,
            batch.sample_index,
            rate=schedule.word_dropout,
            fill_id=self.tokens.pad,
            seed=seed,
            epoch=schedule.epoch,
            impl=self.impl,
        )

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
        instruction: PackedText | None = None,
        generator: torch.Generator | None = None,
    ) -> Tensor:
        """Write a text for every latent -> ids (B, <= max_length), EOS included, then pad.

        z (B, *latent.shape): one latent a text; None for a model without a latent.
        max_length: tokens per text.
        temperature: 0 is greedy.
        top_p: nucleus of the sampling, in (0, 1].
        num_rows: texts of a model without a latent.
        instruction: of each row, read first under `decoder_reads: instruction`, otherwise not
            looked at.
        generator: of the sampling.

        Raises ValueError for a z of the wrong shape, sampling settings out of range, or a missing
        instruction.
        """
        given = text_read(self.config, instruction)
        z = self._checked_z(z, num_rows or (1 if given is None else given.num_rows))
        with self.evaluating():
            return generation.generate_ids(
                self,
                z.to(self.device).float(),
                text_begun(self.tokens, len(z), given).to(self.device),
                max_length=max_length,
                temperature=temperature,
                top_p=top_p,
                generator=generator,
            )

    def interpolate(
        self, z1: Tensor, z2: Tensor, num_steps: int = 10, mode: str = "linear"
    ) -> Tensor:
        """Return latents on the way from z1 to z2, ends included; steps come first.

        z1, z2 (*latent.shape) or (B, *latent.shape): the ends.
        num_steps: at least 2.
        mode: `linear` or `slerp`, for the Gaussian.
        """
        return self.latent.interpolate(z1, z2, num_steps, mode)

    def sample(
        self, num_rows: int, *, generator: torch.Generator | None = None, **kwargs: Any
    ) -> tuple[Tensor, Tensor]:
        """Draw z from the prior and write a text for each -> z (num_rows, *shape), ids.

        The further arguments are those of `generate`.
        """
        z = self.latent.prior.sample(num_rows, GeneratorNoise(generator)).to(self.device)
        return z, self.generate(z, generator=generator, **kwargs)

    def _checked_z(self, z: Tensor | None, num_rows: int) -> Tensor:
        """Return z (B, *latent.shape), (num_rows, 0) for None. Raises ValueError."""
        if z is None:
            z = torch.zeros(num_rows, 0)
        if tuple(z.shape[1:]) != self.latent.shape or not len(z):
            wanted = ", ".join(["rows", *map(str, self.latent.shape)])
            raise ValueError(
                f"z has shape {tuple(z.shape)}, expected ({wanted}); only a model without a "
                "latent takes z=None"
            )
        return z

    @contextmanager
    def evaluating(self) -> Iterator[None]:
        """Switch to eval mode inside, and back to the mode of before."""
        mode = self.training
        self.eval()
        try:
            yield
        finally:
            self.train(mode)

    # Storage: safetensors and JSON only

    def _save_pretrained(self, save_directory: Path) -> None:
        """Write the files of `storage.py`; `save_pretrained` calls it."""
        storage.save(self, Path(save_directory))

    def generate_model_card(self, *args: Any, **kwargs: Any) -> ModelCard:
        """Return the README.md that `save_pretrained` writes; kwargs: as in `card.model_card`."""
        return model_card(self._hub_mixin_info.model_card_data, self.config, **kwargs)

    @classmethod
    def from_pretrained(  # type: ignore[override]  # the mixin names its first argument otherwise
        cls, path: str | Path, **kwargs: Any
    ) -> LlamaSoftPromptVAE:
        """Load what `save_pretrained` wrote: a directory or a hub id. In eval mode.

        backbone: another place of the same base weights, or a loaded `Backbone`.
        dtype: of the base weights. Raises ValueError, one line, for whatever does not fit.
        """
        if Path(path).is_dir():
            # Before huggingface_hub reads the file, so that the error names it.
            storage.read_config(Path(path))
        return super().from_pretrained(path, **kwargs)

    @classmethod
    def _from_pretrained(
        cls,
        *,
        model_id: str,
        backbone: str | Backbone | None = None,
        dtype: torch.dtype = torch.float32,
        **hub: Any,
    ) -> LlamaSoftPromptVAE:
        """Find the files, locally or on the hub, and build the model from them."""
        directory = storage.locate(model_id, hub)
        return storage.load(cls, directory, backbone=backbone, dtype=dtype)
