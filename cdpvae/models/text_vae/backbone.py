"""One Llama, two roles: the encoder pass and the LoRA decoder pass.

There is never a second copy of the base weights. The encoder pass runs with LoRA off, without
gradient, in eval mode, or (`encoder: lora`) with a LoRA of its own that learns; the decoder pass
with the decoder's LoRA on. LoRA is switched by flags on its layers:
PEFT's `disable_adapter()` costs 70x more per step and flips `requires_grad`, so that a checkpoint
saved inside it loses every LoRA weight without a word.

Legend: B rows, T packed tokens, D hidden, V vocabulary.
"""

from __future__ import annotations

import copy
import json
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import cast

import torch
from peft import LoraConfig, get_peft_model
from peft.tuners.lora import LoraLayer
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint
from transformers import AutoConfig, LlamaConfig, LlamaForCausalLM
from transformers.cache_utils import Cache

from cdpvae.batch import PackedText, SpecialTokens
from cdpvae.config import ModelConfig
from cdpvae.latents import family_of
from cdpvae.models.text_vae.attention import ATTENTION_NAME, register
from cdpvae.models.text_vae.attention_backends import AttentionBackend, choose_backend
from cdpvae.models.text_vae.packing import Packing, Prefix

# PEFT's name of the decoder's LoRA, and ours of the encoder's.
DECODER_ADAPTER, ENCODER_ADAPTER = "default", "encoder"


class Backbone(nn.Module):
    """A `LlamaForCausalLM` with PEFT LoRA. All dimensions come from its config.

    The base stays in eval mode whatever `train()` says; only LoRA's dropout follows.
    """

    def __init__(self, llama: LlamaForCausalLM, config: ModelConfig):
        """Take `llama` over: freeze it, inject LoRA, set its attention implementation.

        Raises ValueError when the settings do not fit its dimensions or module names.
        """
        super().__init__()
        check_fits(llama.config, config)
        # Attention of packed sequences, under a name that transformers knows.
        register()
        # A config object shared by two models shares the attention implementation as well.
        llama.config = copy.deepcopy(llama.config)
        for module in llama.modules():
            if getattr(module, "config", None) is not None and module is not llama:
                setattr(module, "config", llama.config)  # noqa: B010 (nn.Module types no attribute)
        llama.config._attn_implementation = ATTENTION_NAME
        llama.requires_grad_(False)
        self.encoder_layer = config.encoder_layer
        self._wanted_attention = config.attention
        self._attention: tuple[object, AttentionBackend] | None = None
        self.gradient_checkpointing = False
        with warnings.catch_warnings():
            # PEFT asks transformers by a name that is deprecated there; nothing of ours.
            warnings.simplefilter("ignore", FutureWarning)
            self.peft = get_peft_model(llama, lora_config(config), autocast_adapter_dtype=False)
            self.trains_encoder = config.encoder == "lora"
            if self.trains_encoder:
                self.peft.add_adapter(
                    ENCODER_ADAPTER, lora_config(config), autocast_adapter_dtype=False
                )
        # PEFT lets the active adapter alone be trained.
        for name, parameter in self.peft.named_parameters():
            parameter.requires_grad_("lora_" in name)
        self._lora_layers = [m for m in self.peft.modules() if isinstance(m, LoraLayer)]
        self.train(False)

    @classmethod
    def load(cls, config: ModelConfig, dtype: torch.dtype = torch.float32) -> Backbone:
        """Read the base weights from a hub id or a directory, after checking that they fit.

        Raises ValueError: not found, not a Llama, a PEFT adapter, or settings that do not fit.
        """
        llama_config = load_llama_config(config.backbone)
        check_fits(llama_config, config)
        # The module may still move, but on no machine to a device that torch does not see.
        device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
        choose_backend(config.attention, device, dtype, head_dim_of(llama_config))
        llama = LlamaForCausalLM.from_pretrained(config.backbone, dtype=dtype)
        return cls(llama, config)

    @property
    def llama(self) -> LlamaForCausalLM:
        """The Llama inside PEFT."""
        return cast(LlamaForCausalLM, self.peft.get_base_model())

    @property
    def config(self) -> LlamaConfig:
        """The Llama's own settings, with all its dimensions."""
        return self.llama.config

    @property
    def head_dim(self) -> int:
        """Width of one attention head."""
        return head_dim_of(self.config)

    @property
    def embedding_weight(self) -> Tensor:
        """The input embedding, (V, D)."""
        return cast(nn.Embedding, self.llama.get_input_embeddings()).weight

    @property
    def head_weight(self) -> Tensor:
        """The output head, (V, D); the embedding itself where the backbone ties them."""
        return cast(nn.Linear, self.llama.get_output_embeddings()).weight

    @property
    def attention(self) -> AttentionBackend:
        """The attention backend for the device and dtype that the weights have now.

        Raises ValueError when the settings name one that cannot run there.
        """
        weight = self.embedding_weight
        place = (weight.device, weight.dtype)
        if self._attention is None or self._attention[0] != place:
            backend = choose_backend(self._wanted_attention, *place, self.head_dim)
            self._attention = (place, backend)
        return self._attention[1]

    @contextmanager
    def attending_with(self, backend: AttentionBackend) -> Iterator[None]:
        """Attend through another backend inside, such as one that also looks at the weights."""
        before = self._attention
        weight = self.embedding_weight
        self._attention = ((weight.device, weight.dtype), backend)
        try:
            yield
        finally:
            self._attention = before

    @property
    def num_states(self) -> int:
        """Hidden states that `encoder_layer: mix` averages: the embedding and every layer."""
        return self.config.num_hidden_layers + 1

    def train(self, mode: bool = True) -> Backbone:
        """Set the mode of LoRA's dropout; the base stays in eval mode."""
        super().train(False)
        self.training = mode
        for layer in self._lora_layers:
            layer.lora_dropout.train(mode)
        return self

    def set_lora(self, on: bool) -> None:
        """Switch LoRA on every layer; `requires_grad` stays as it is."""
        for layer in self._lora_layers:
            layer._disable_adapters = not on

    @contextmanager
    def lora_off(self) -> Iterator[None]:
        """Switch LoRA off inside, and on again whatever happens."""
        self.set_lora(False)
        try:
            yield
        finally:
            self.set_lora(True)

    @contextmanager
    def encoder_lora(self) -> Iterator[None]:
        """Run the layers with the encoder's LoRA inside, or with none where it has none."""
        if not self.trains_encoder:
            with self.lora_off():
                yield
            return
        # PEFT's own `set_adapter` would switch requires_grad as well.
        try:
            for layer in self._lora_layers:
                layer._active_adapter = [ENCODER_ADAPTER]
            yield
        finally:
            for layer in self._lora_layers:
                layer._active_adapter = [DECODER_ADAPTER]

    def encode(self, text: PackedText, packing: Packing) -> list[Tensor]:
        """Run the encoder pass -> the hidden states that the pooling reads, each (T, D).

        One state, or for `mix` all of them: the embedding, then every layer, the last normalised.
        They carry a graph only where the encoder has a LoRA of its own.
        """
        if self.trains_encoder:
            return self._encode(text, packing)
        with torch.no_grad():
            return self._encode(text, packing)

    def _encode(self, text: PackedText, packing: Packing) -> list[Tensor]:
        # A numbered layer is the last one that runs.
        model = self.llama.model
        depth = len(model.layers)
        last = depth if isinstance(self.encoder_layer, str) else self.encoder_layer
        hidden = model.embed_tokens(text.ids)[None]
        # One of them all is read, unless they are mixed: the others need not stay.
        mixing = self.encoder_layer == "mix"
        states = [hidden[0]]
        position = model.rotary_emb(hidden, position_ids=packing.position_ids)

        def run(layer: nn.Module, hidden: Tensor) -> Tensor:
            # Switched here, as a checkpointed layer runs once more in backward.
            with self.encoder_lora():
                return layer(
                    hidden, position_embeddings=position, packing=packing, backend=self.attention
                )

        for layer in model.layers[:last]:
            if self.gradient_checkpointing and torch.is_grad_enabled():
                hidden = checkpoint(run, layer, hidden, use_reentrant=False)
            else:
                hidden = run(layer, hidden)
            states = [*states, hidden[0]] if mixing else [hidden[0]]
        # Only the Llama's own output is normalised; a numbered layer is taken as it is.
        if isinstance(self.encoder_layer, int):
            return states
        states[-1] = model.norm(hidden)[0]
        return states

    def decode(
        self, embeds_TD: Tensor, packing: Packing, prefixes: list[Prefix] | None = None
    ) -> Tensor:
        """Run the LoRA pass over packed embeddings (T, D) -> normalised hidden states (T, D).

        packing: borders of the sequences. prefixes: keys and values of the deep prefix, by layer.
        """
        model = self.llama.model
        hidden = embeds_TD[None]
        position = model.rotary_emb(hidden, position_ids=packing.position_ids)
        kwargs = {
            "position_embeddings": position,
            "packing": packing,
            "backend": self.attention,
            "prefixes": prefixes,
        }
        # Non-reentrant: a reentrant checkpoint fails where parameters serve two passes.
        for layer in model.layers:
            if self.gradient_checkpointing and torch.is_grad_enabled():
                hidden = checkpoint(layer, hidden, use_reentrant=False, **kwargs)
            else:
                hidden = layer(hidden, **kwargs)
        return model.norm(hidden)[0]

    def decode_step(self, embeds_BLD: Tensor, cache: Cache, first_position: int) -> Tensor:
        """Run L new tokens of each row (B, L, D) after what `cache` holds -> (B, L, D).

        first_position: of the new tokens, counted with the prefix.
        """
        model = self.llama.model
        length = embeds_BLD.shape[1]
        position_ids = torch.arange(
            first_position, first_position + length, device=embeds_BLD.device
        )
        position = model.rotary_emb(embeds_BLD, position_ids=position_ids[None])
        hidden = embeds_BLD
        for layer in model.layers:
            hidden = layer(
                hidden, position_embeddings=position, past_key_values=cache, use_cache=True
            )
        return model.norm(hidden)


def lora_config(config: ModelConfig) -> LoraConfig:
    """PEFT's configuration of the decoder's LoRA (Hu et al. 2021; rsLoRA: Kalajdzievski 2023)."""
    return LoraConfig(
        r=config.lora_r,
        lora_alpha=config.lora_alpha,
        lora_dropout=config.lora_dropout,
        use_rslora=config.use_rslora,
        target_modules=list(config.lora_target_modules),
        bias="none",
        task_type="CAUSAL_LM",
    )


def load_llama_config(name: str) -> LlamaConfig:
    """Read the config.json of a hub id or directory. Raises ValueError when it is not a Llama's."""
    # A directory without it is a mistake that the hub's own error would not name.
    directory = Path(name)
    if directory.is_dir() and not (directory / "config.json").exists():
        if (directory / "adapter_config.json").exists():
            raise ValueError(_adapter_message(directory))
        raise ValueError(
            f"backbone={name!r}: the directory has no config.json; a Hugging Face "
            "Llama directory (config.json, safetensors) or hub id is needed"
        )
    # What is no directory is a hub id.
    try:
        config = AutoConfig.from_pretrained(name)
    except (OSError, ValueError) as error:
        reason = str(error).strip().splitlines()[0]
        raise ValueError(
            f"backbone={name!r}: neither a directory nor a reachable hub id: {reason}"
        ) from None
    if not isinstance(config, LlamaConfig):
        raise ValueError(
            f"backbone={name!r}: its architecture is {config.model_type!r}, only 'llama' is allowed"
        )
    return config


def _adapter_message(directory: Path) -> str:
    adapter = json.loads((directory / "adapter_config.json").read_text())
    return (
        f"backbone={str(directory)!r}: this is a PEFT adapter for "
        f"{adapter.get('base_model_name_or_path')!r} (modules {adapter.get('target_modules')}), "
        "not a Llama backbone; give the Llama itself, an adapter merged into it if wanted"
    )


def head_dim_of(llama: LlamaConfig) -> int:
    """Return the width of one attention head."""
    return llama.head_dim or llama.hidden_size // llama.num_attention_heads


def kv_heads_of(llama: LlamaConfig) -> int:
    """Return the number of key and value heads."""
    return llama.num_key_value_heads or llama.num_attention_heads


def check_fits(llama: LlamaConfig, config: ModelConfig) -> None:
    """Refuse settings that the backbone's dimensions rule out; before any weight is loaded."""
    # Heads of the pooling share the hidden size, where there is a pooling.
    if llama.hidden_size % config.pooling_heads and family_of(config).reads_text:
        raise ValueError(
            f"pooling_heads={config.pooling_heads} must divide the backbone's hidden size "
            f"{llama.hidden_size}"
        )
    # The pooling can read what the backbone has, and LoRA sits where a Llama has projections.
    layer = config.encoder_layer
    if isinstance(layer, int) and layer > llama.num_hidden_layers:
        raise ValueError(
            f"encoder_layer={layer}: the backbone has layers 0 (embedding) to "
            f"{llama.num_hidden_layers}, or use 'last' or 'mix'"
        )
    known = {"q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"}
    if wrong := sorted(set(config.lora_target_modules) - known):
        raise ValueError(f"lora_target_modules={wrong}: a Llama has {sorted(known)}")


def check_vocabulary(vocab_size: int, tokens: SpecialTokens, largest_id: int, name: str) -> None:
    """Refuse a tokenizer whose ids the backbone's embedding does not hold.

    vocab_size: rows of the embedding.
    tokens: special ids.
    largest_id: the highest id the tokenizer can produce.
    name: of the tokenizer, for the error.

    Raises ValueError.
    """
    largest = max(largest_id, *tokens.no_content, *tokens.special)
    if largest >= vocab_size:
        raise ValueError(
            f"tokenizer {name!r} has ids up to {largest}, but the backbone's vocabulary holds only "
            f"0 to {vocab_size - 1}; give the tokenizer this backbone was trained with"
        )
