"""A trained model on disk: safetensors and JSON only.

    config.json                       settings, special tokens, LoRA scaling, format version
    heads.safetensors                 everything trained beside LoRA
    adapter_config.json               the LoRA in PEFT's own layout, so that PEFT reads it too
    adapter_model.safetensors
    encoder/adapter_*                 the encoder's LoRA in the same layout, where it has one

The base weights are not in it; `config.json` names the backbone.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import Any, Protocol, TypeVar

import torch
from huggingface_hub import snapshot_download
from peft import get_peft_model_state_dict, set_peft_model_state_dict
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from transformers import LlamaConfig

from cdpvae.batch import SpecialTokens
from cdpvae.config import ModelConfig, parse_settings
from cdpvae.models.text_vae.backbone import (
    DECODER_ADAPTER,
    ENCODER_ADAPTER,
    Backbone,
    lora_config,
)

FORMAT_VERSION = 2
READABLE_VERSIONS = (1, 2)
# Version 1 named the tensors of the Gaussian's encoder `encoder.*`.
RENAMED_TENSORS = {"encoder.": "latent.encoder."}
CONFIG_FILE = "config.json"
HEADS_FILE = "heads.safetensors"
ADAPTER_CONFIG_FILE = "adapter_config.json"
ADAPTER_FILE = "adapter_model.safetensors"
MODEL_FILES = (
    CONFIG_FILE,
    HEADS_FILE,
    ADAPTER_CONFIG_FILE,
    ADAPTER_FILE,
    f"{ENCODER_ADAPTER}/*",
)


class Storable(Protocol):
    """What storage needs of a model."""

    config: ModelConfig
    tokens: SpecialTokens
    backbone: Backbone

    def head_modules(self) -> dict[str, nn.Module]:
        """Return the trainable modules beside LoRA, by the names they are stored under."""
        ...

    def eval(self) -> Any:
        """Switch to eval mode."""
        ...


Model = TypeVar("Model", bound=Storable)


def tokens_of(llama: LlamaConfig) -> SpecialTokens:
    """Read the special tokens off a backbone's config. Raises ValueError without BOS or EOS."""
    eos = llama.eos_token_id[0] if isinstance(llama.eos_token_id, list) else llama.eos_token_id
    if llama.bos_token_id is None or eos is None:
        raise ValueError(
            f"the backbone's config names bos={llama.bos_token_id} and eos={eos}; "
            "both are needed, or pass `tokens` from a tokenizer"
        )
    pad = eos if llama.pad_token_id is None or llama.pad_token_id < 0 else llama.pad_token_id
    special = tuple(sorted({llama.bos_token_id, eos, pad}))
    return SpecialTokens(llama.bos_token_id, eos, pad, None, special)


def save(model: Storable, directory: Path) -> None:
    """Write the files. Raises OSError when the directory cannot be written."""
    directory.mkdir(parents=True, exist_ok=True)
    config = {
        "format_version": FORMAT_VERSION,
        "model_type": "cdpvae",
        "model": model.config.model_dump(mode="json"),
        "tokens": asdict(model.tokens),
        "lora_scaling": model.config.lora_scaling,
    }
    (directory / CONFIG_FILE).write_text(json.dumps(config, indent=2) + "\n")
    # Everything that is trained beside LoRA.
    save_file(_head_state(model), directory / HEADS_FILE, metadata={"format": "pt"})
    # LoRA in the layout that PEFT reads.
    for adapter, place in _adapters(model, directory).items():
        place.mkdir(exist_ok=True)
        state = get_peft_model_state_dict(model.backbone.peft, adapter_name=adapter)
        plain = {name: _plain(tensor) for name, tensor in state.items()}
        save_file(plain, place / ADAPTER_FILE, metadata={"format": "pt"})
        peft_config = lora_config(model.config)
        peft_config.base_model_name_or_path = model.config.backbone
        peft_config.inference_mode = True
        peft_config.save_pretrained(str(place))


def _adapters(model: Storable, directory: Path) -> dict[str, Path]:
    """Return where each LoRA of the model is stored, by PEFT's name of it."""
    places = {DECODER_ADAPTER: directory}
    if model.backbone.trains_encoder:
        places[ENCODER_ADAPTER] = directory / ENCODER_ADAPTER
    return places


def load(
    build: Callable[[ModelConfig, Backbone, SpecialTokens], Model],
    directory: Path,
    *,
    backbone: str | Backbone | None,
    dtype: torch.dtype,
) -> Model:
    """Rebuild a model saved by `save`.

    build: makes a model of its settings, backbone and tokens.
    directory: of the files.
    backbone: another place of the same base weights, or a loaded `Backbone`.
    dtype: of the base weights.

    Raises ValueError naming the file and what does not fit.
    """
    config, tokens = read_config(directory)
    # What computes attention and the kernels belongs to the machine, not to the model.
    config = config.model_copy(update={"attention": "auto", "kernels": "auto"})
    if isinstance(backbone, str):
        config = config.model_copy(update={"backbone": backbone})
    check_adapter(directory, config)
    if config.encoder == "lora":
        check_adapter(directory / ENCODER_ADAPTER, config)
    if not isinstance(backbone, Backbone):
        backbone = Backbone.load(config, dtype)
    model = build(config, backbone, tokens)
    _load_heads(model, directory)
    _load_adapter(model, directory)
    model.eval()
    return model


def read_config(directory: Path) -> tuple[ModelConfig, SpecialTokens]:
    """Read config.json of a saved model. Raises ValueError when it is missing or not ours."""
    path = Path(directory) / CONFIG_FILE
    if not path.exists():
        raise ValueError(
            f"{directory}: no {CONFIG_FILE}; expected a directory written by save_pretrained "
            "(a checkpoint-N of a training run is one)"
        )
    content = _read_json(path)
    # Refuse what another program, or a version to come, has written.
    if content.get("model_type") != "cdpvae":
        raise ValueError(
            f"{path}: model_type={content.get('model_type')!r}, expected 'cdpvae': this is not a "
            "model written by save_pretrained"
        )
    if content.get("format_version") not in READABLE_VERSIONS:
        raise ValueError(
            f"{path}: format_version={content.get('format_version')!r}, this version of cdpvae "
            f"reads {' and '.join(map(str, READABLE_VERSIONS))}"
        )
    tokens = dict(content["tokens"], special=tuple(content["tokens"]["special"]))
    return parse_settings({"model": content["model"]}, source=str(path)).model, SpecialTokens(
        **tokens
    )


def check_adapter(directory: Path, config: ModelConfig) -> None:
    """Refuse a PEFT adapter of another architecture or shape before any weight is loaded."""
    path = Path(directory) / ADAPTER_CONFIG_FILE
    if not path.exists():
        raise ValueError(f"{directory}: no {ADAPTER_CONFIG_FILE}; the LoRA is missing")
    adapter = _read_json(path)
    # The same projections, with the same rank and scaling.
    modules = sorted(adapter.get("target_modules") or [])
    if modules != sorted(config.lora_target_modules):
        raise ValueError(
            f"{path}: the adapter targets modules {modules} of "
            f"{adapter.get('base_model_name_or_path')!r}, but this Llama is set up with LoRA on "
            f"{sorted(config.lora_target_modules)}"
        )
    for key, expected in (
        ("r", config.lora_r),
        ("lora_alpha", config.lora_alpha),
        ("use_rslora", config.use_rslora),
    ):
        if adapter.get(key) != expected:
            raise ValueError(f"{path}: {key}={adapter.get(key)!r}, the model's is {expected!r}")


def locate(model_id: str, hub: dict[str, Any]) -> Path:
    """Return a directory as it is, or download the files of a hub id."""
    if Path(model_id).is_dir():
        return Path(model_id)
    keys = ("revision", "cache_dir", "force_download", "local_files_only", "token")
    kwargs = {key: hub[key] for key in keys if hub.get(key) is not None}
    return Path(snapshot_download(model_id, allow_patterns=list(MODEL_FILES), **kwargs))


def current_name(stored: str) -> str:
    """Return the name that a tensor stored by an older version has now."""
    for old, new in RENAMED_TENSORS.items():
        if stored.startswith(old):
            return new + stored.removeprefix(old)
    return stored


def _head_state(model: Storable) -> dict[str, Tensor]:
    return {key: _plain(value) for key, value in _named_heads(model).items()}


def _named_heads(model: Storable) -> dict[str, Tensor]:
    """Return every tensor of the heads under the name it is stored by; not copied."""
    return {
        f"{name}.{key}": tensor
        for name, module in model.head_modules().items()
        for key, tensor in module.state_dict().items()
    }


def _plain(tensor: Tensor) -> Tensor:
    """Copy a tensor: safetensors refuses views and shared storage."""
    return tensor.detach().cpu().clone(memory_format=torch.contiguous_format)


@torch.no_grad()
def _load_heads(model: Storable, directory: Path) -> None:
    stored = _read_tensors(directory / HEADS_FILE)
    state = {current_name(name): tensor for name, tensor in stored.items()}
    heads = _named_heads(model)
    _check_shapes(directory / HEADS_FILE, state, heads)
    for key, tensor in heads.items():
        tensor.copy_(state[key])


def _load_adapter(model: Storable, directory: Path) -> None:
    peft = model.backbone.peft
    for adapter, place in _adapters(model, directory).items():
        state = _read_tensors(place / ADAPTER_FILE)
        wanted = get_peft_model_state_dict(peft, adapter_name=adapter)
        _check_shapes(place / ADAPTER_FILE, state, wanted)
        set_peft_model_state_dict(peft, state, adapter_name=adapter)


def _check_shapes(path: Path, found: dict[str, Tensor], wanted: dict[str, Tensor]) -> None:
    # Every tensor of the model is stored, nothing else is, and each has its shape.
    if missing := sorted(wanted.keys() - found.keys()):
        raise ValueError(f"{path}: {len(missing)} tensors are missing, first {missing[0]!r}")
    if extra := sorted(found.keys() - wanted.keys()):
        raise ValueError(f"{path}: {len(extra)} tensors are not ours, first {extra[0]!r}")
    for key, tensor in wanted.items():
        if found[key].shape != tensor.shape:
            raise ValueError(
                f"{path}: {key!r} has shape {tuple(found[key].shape)}, the backbone asks for "
                f"{tuple(tensor.shape)}: it was trained on another one"
            )


def _read_json(path: Path) -> dict[str, Any]:
    try:
        return json.loads(path.read_text())
    except (OSError, json.JSONDecodeError, UnicodeDecodeError) as error:
        raise ValueError(f"{path}: cannot be read as JSON: {error}") from None


def _read_tensors(path: Path) -> dict[str, Tensor]:
    try:
        return load_file(path)
    except (OSError, SafetensorError) as error:
        raise ValueError(f"{path}: cannot be read as safetensors: {error}") from None
