"""Every setting of cdpvae, typed and validated.

Settings come from three places, later ones winning: the defaults (the description's), a JSON file
(`--config`), the command line. Unknown keys, wrong types and impossible combinations stop the run
before any weight is loaded, with one line that names the key, the value and what is allowed
(`SettingsError`). What depends on the backbone's dimensions is checked when its `config.json` is
read, in `model/backbone.py`.
"""

from __future__ import annotations

import difflib
import json
from pathlib import Path
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator


class SettingsError(ValueError):
    """A setting is unknown, of the wrong type, or impossible in this combination."""


class _Group(BaseModel):
    model_config = ConfigDict(
        extra="forbid", strict=True, allow_inf_nan=False, validate_assignment=True
    )


class ModelConfig(_Group):
    """The network. Dimensions of the Llama itself come from its own config.json."""

    backbone: str = Field(
        "meta-llama/Llama-3.1-8B", min_length=1, description="Llama causal LM: hub id or directory"
    )
    tokenizer: str | None = Field(None, description="tokenizer, when the backbone brings none")
    encoder_layer: int | Literal["last", "mix"] = Field(
        "last",
        description="hidden states the pooling reads: last, the output of layer N (the encoder "
        "pass stops there; 0 is the embedding), or mix, a learned softmax over all layers",
    )
    latent_dim: int = Field(64, ge=1, description="Z, numbers in the code z")
    pooling_heads: int = Field(8, ge=1, description="heads of the attention pooling")
    pooling_dropout: float = Field(0.1, ge=0, lt=1)
    vae_hidden_dim: int = Field(2048, ge=1, description="width of encoder and projector MLPs")
    encoder_dropout: float = Field(0.1, ge=0, lt=1)
    logvar_init_bias: float = Field(-2.0, description="constant bias of the logvar head")
    logvar_clamp: float = Field(10.0, gt=0, description="logvar is clamped to [-x, x]")
    num_soft_tokens: int = Field(32, ge=1, description="P, soft prompts before the response")
    projector_dropout: float = Field(0.1, ge=0, lt=1)
    deep_prefix: bool = Field(False, description="also inject z into every layer's keys and values")
    prefix_hidden_dim: int = Field(2048, ge=1, description="shared width of the deep prefix")
    prefix_bottleneck_dim: int = Field(256, ge=1, description="per-layer width of the deep prefix")
    prefix_scale_init: float = Field(0.1, description="initial per-layer scale of the deep prefix")
    lora_r: int = Field(64, ge=1)
    lora_alpha: int = Field(128, ge=1)
    lora_dropout: float = Field(0.05, ge=0, lt=1)
    use_rslora: bool = Field(True, description="scale alpha/sqrt(r) instead of alpha/r")
    lora_target_modules: tuple[str, ...] = (
        "q_proj",
        "k_proj",
        "v_proj",
        "o_proj",
        "gate_proj",
        "up_proj",
        "down_proj",
    )
    attention: Literal["auto", "flash_attn", "varlen", "sdpa"] = Field(
        "auto",
        description="packed attention: the flash-attn package, FlashAttention inside torch, or "
        "padded scaled_dot_product_attention; auto takes the first that runs",
    )
    kernels: Literal["auto", "triton", "reference"] = Field(
        "auto",
        description="the heavy operations: Triton kernels (auto on a GPU) or plain PyTorch",
    )
    no_latent: bool = Field(
        False, description="baseline: the same decoder and trainer without z (LoRA language model)"
    )

    @property
    def kernel_impl(self) -> str | None:
        """`kernels` as `cdpvae_kernels` takes it: None picks by device."""
        return None if self.kernels == "auto" else self.kernels

    @property
    def lora_scaling(self) -> float:
        """The factor PEFT applies to BA: alpha/sqrt(r) under rsLoRA, alpha/r otherwise."""
        return self.lora_alpha / (self.lora_r**0.5 if self.use_rslora else self.lora_r)

    @model_validator(mode="after")
    def _combinations(self) -> ModelConfig:
        if self.no_latent and self.deep_prefix:
            raise ValueError("deep_prefix=true has no effect with no_latent=true; set one of them")
        if isinstance(self.encoder_layer, int) and self.encoder_layer < 0:
            raise ValueError(
                f"encoder_layer={self.encoder_layer} must be 'last', 'mix' or a layer number >= 0"
            )
        if not self.lora_target_modules:
            raise ValueError("lora_target_modules=[] must name at least one projection")
        return self


class LossConfig(_Group):
    """Weights and variants of the four terms (`semantics.md`, Losses)."""

    loss_scale: Literal["per_token", "elbo"] = Field(
        "per_token", description="mean token CE + beta KL/Z, or the ELBO's sums per sequence"
    )
    beta_max: float = Field(1.0, ge=0)
    beta_cycles: int = Field(4, ge=1, description="cycles of the KL annealing")
    beta_ramp_ratio: float = Field(0.5, ge=0, le=1, description="rising share of each cycle")
    free_bits: float = Field(0.5, ge=0, description="nats per dimension")
    bow_weight: float = Field(1.5, ge=0)
    bow_reduction: Literal["bce", "categorical"] = Field(
        "bce", description="multi-label BCE (description) or -log softmax (literature)"
    )
    contrastive_weight: float = Field(0.1, ge=0, description="InfoNCE")
    temperature: float = Field(0.07, gt=0)
    normalize_latents: bool = Field(True, description="L2-normalise mu before the similarity")
    queue_size: int = Field(0, ge=0, description="past positives kept as further negatives")
    word_dropout: float = Field(0.4, ge=0, le=1, description="share of decoder inputs dropped")


class AugmentationConfig(_Group):
    """The second view of an instruction, for InfoNCE."""

    augmentation_probability: float = Field(
        0.5, ge=0, le=1, description="share of optimizer steps that compute the view"
    )
    span_mask_prob: float = Field(0.15, ge=0, le=1, description="expected share of tokens masked")
    span_max_len: int = Field(5, ge=1, description="span length is uniform in 1..span_max_len")
    word_dropout_rate: float = Field(0.1, ge=0, le=1, description="share of tokens replaced")
    shuffle_window: int = Field(
        0, ge=0, description="permute tokens within windows of this size; 0 or 1 is off"
    )


class CollapseConfig(_Group):
    """Thresholds, factors and bounds of the collapse monitor and its interventions."""

    enable_collapse_monitoring: bool = Field(True, description="watch, and intervene")
    collapse_interventions: bool = Field(True, description="false: watch and log only")
    check_every: int = Field(20, ge=1, description="optimizer steps between checks")
    patience: int = Field(2, ge=1, description="checks in a row before an intervention")
    window_rows: int = Field(1024, ge=2, description="posteriors kept, from all ranks")
    au_variance: float = Field(0.01, gt=0, description="a unit is active above this variance of mu")
    min_au_ratio: float = Field(0.3, ge=0, le=1)
    severe_au_ratio: float = Field(0.1, ge=0, le=1)
    min_mi: float = Field(1.0, ge=0, description="nats")
    severe_mi: float = Field(0.5, ge=0, description="nats")
    min_kl: float = Field(0.1, ge=0, description="nats per dimension")
    mild_factor: float = Field(1.1, ge=1)
    moderate_factor: float = Field(1.3, ge=1)
    moderate_dropout_factor: float = Field(0.8, gt=0, le=1)
    max_bow_weight: float = Field(3.0, ge=0)
    max_contrastive_weight: float = Field(0.5, ge=0)
    min_word_dropout: float = Field(0.1, ge=0, le=1)
    relaxation_rate: float = Field(
        0.1, ge=0, le=1, description="share of the way back to the defaults, each healthy check"
    )


class DataConfig(_Group):
    """From records to processed Arrow data (`preprocess`), and what training reads."""

    phase: Literal[1, 2, 3] = Field(1, description="hub data sets of the description's phase")
    input: tuple[str, ...] = Field((), description="local files or hub ids instead of a phase")
    format: Literal["auto", "sharegpt", "alpaca", "messages", "magicoder", "text"] = "auto"
    turns: Literal["first", "all", "last"] = Field(
        "first", description="which exchanges of a conversation become pairs"
    )
    max_samples: int | None = Field(None, ge=1, description="stop after this many kept records")
    processed_dir: str | None = Field(None, description="default: processed/phase{phase}")
    target: Literal["response", "reconstruction"] = Field(
        "response", description="what the decoder writes: the response, or the text encoded"
    )
    min_instruction_tokens: int = Field(10, ge=1)
    max_instruction_tokens: int = Field(512, ge=2)
    min_response_tokens: int = Field(20, ge=1)
    max_response_tokens: int = Field(1024, ge=3)
    language_filter: bool = Field(True, description="keep records in `languages` only")
    languages: tuple[str, ...] = Field(("en",), description="fastText's codes: en, de, zh ...")
    min_language_score: float = Field(
        0.8, ge=0, le=1, description="confidence, against the strongest other language"
    )
    language_model: str | None = Field(
        None, description="lid.176.bin or .ftz; default: the small model of an installed package"
    )
    quality_filter: bool = Field(True, description="drop damaged and degenerate text")
    max_control_share: float = Field(0.0, ge=0, le=1, description="control characters, of all")
    max_repeated_character_run: int = Field(9, ge=1, description="equal letters or digits in a row")
    max_repeated_word_share: float = Field(
        0.0, ge=0, le=1, description="words in loops of five or more repeats, of all"
    )
    max_special_share: float = Field(0.3, ge=0, le=1, description="neither letter, digit nor space")
    deduplication: Literal["none", "exact", "minhash"] = Field(
        "minhash", description="equal texts, or also near-duplicates by MinHash"
    )
    num_permutations: int = Field(128, ge=16, le=1024, description="numbers in a MinHash signature")
    shingle_words: int = Field(5, ge=1, description="words per shingle")
    similarity: float = Field(0.85, gt=0, le=1, description="Jaccard from which texts are the same")
    decontaminate: tuple[str, ...] = Field(
        (), description="evaluation files whose texts must not be in the result"
    )
    validation_fraction: float = Field(0.02, ge=0, lt=1)
    workers: int | None = Field(None, ge=1, description="preprocessing processes; default: cores")
    shard_records: int = Field(
        2_000, ge=1, description="records a worker takes at a time, and a killed run can lose"
    )
    engine: Literal["local", "ray"] = Field(
        "local", description="where workers run: this machine, or a Ray cluster"
    )
    streaming: bool = Field(
        False, description="train on records as they are read, without preprocessing"
    )

    @property
    def processed(self) -> Path:
        return Path(self.processed_dir or f"processed/phase{self.phase}")

    @model_validator(mode="after")
    def _bounds(self) -> DataConfig:
        for what in ("instruction", "response"):
            low, high = (getattr(self, f"{end}_{what}_tokens") for end in ("min", "max"))
            if low > high:
                raise ValueError(
                    f"min_{what}_tokens={low} must not be above max_{what}_tokens={high}"
                )
        return self

    @model_validator(mode="after")
    def _no_idle_setting(self) -> DataConfig:
        """A changed setting that its switch makes idle is a mistake of the user's."""
        minhash = self.deduplication == "minhash"
        exact = f"deduplication={self.deduplication}"
        for active, switch, names in (
            (self.language_filter, "language_filter=false", _LANGUAGE_SETTINGS),
            (self.quality_filter, "quality_filter=false", _QUALITY_SETTINGS),
            (minhash, exact, _SIGNATURE_SETTINGS),
            (minhash or self.decontaminate, f"{exact} and no decontaminate", _NEAR_SETTINGS),
        ):
            for name in () if active else names:
                value, default = getattr(self, name), type(self).model_fields[name].default
                if value != default:
                    raise ValueError(f"{name}={value!r} has no effect with {switch}; drop one")
        if self.language_filter and not self.languages:
            raise ValueError("languages=[] keeps no record; name one, or set language_filter=false")
        return self


_LANGUAGE_SETTINGS = ("languages", "min_language_score", "language_model")
_QUALITY_SETTINGS = (
    "max_control_share",
    "max_repeated_character_run",
    "max_repeated_word_share",
    "max_special_share",
)
_SIGNATURE_SETTINGS = ("num_permutations",)
_NEAR_SETTINGS = ("shingle_words", "similarity")


class TrainingConfig(_Group):
    """The optimizer, the schedule, and what a run writes."""

    output_dir: str = Field("checkpoints", min_length=1, description="checkpoints and logs")
    ds_config: str | None = Field(
        None, description="DeepSpeed JSON; default: ds_configs/ by device"
    )
    precision: Literal["bf16", "fp32"] = Field("bf16", description="compute dtype; masters fp32")
    per_device_batch_size: int = Field(8, ge=1, description="rows per micro-batch and rank")
    gradient_accumulation_steps: int = Field(12, ge=1)
    batching: Literal["rows", "tokens"] = Field(
        "rows", description="what a micro-batch has a fixed number of"
    )
    tokens_per_micro_batch: int | None = Field(
        None,
        ge=1,
        description="with batching=tokens, per rank: instruction, response and soft-prompt tokens "
        "(per_device_batch_size then counts for evaluation only)",
    )
    prefetch: int = Field(2, ge=0, description="optimizer steps of batches built ahead; 0 is off")
    num_epochs: int = Field(10, ge=1)
    max_steps: int | None = Field(None, ge=1, description="optimizer steps; default: num_epochs")
    learning_rate: float = Field(2e-4, gt=0)
    lora_learning_rate: float | None = Field(None, gt=0, description="default: learning_rate")
    eta_min: float = Field(2e-5, ge=0, description="learning rate at the end of the cosine")
    warmup_ratio: float = Field(0.1, ge=0, lt=1)
    weight_decay: float = Field(0.01, ge=0)
    adam_beta1: float = Field(0.9, ge=0, lt=1)
    adam_beta2: float = Field(0.999, ge=0, lt=1)
    adam_eps: float = Field(1e-8, gt=0)
    max_grad_norm: float = Field(1.0, ge=0, description="0 switches clipping off")
    gradient_checkpointing: bool = Field(True, description="decoder pass only, non-reentrant")
    coalesce_gradients: bool = Field(
        False, description="one reduction per step instead of one per micro-batch (bf16 sums)"
    )
    memory_efficient: bool = Field(False, description="contrastive learning and augmentation off")
    save_steps: int = Field(100, ge=1)
    keep_checkpoints: int | None = Field(None, ge=1, description="older ones go; default: keep all")
    logging_steps: int = Field(100, ge=1)
    eval_steps: int = Field(100, ge=1)
    eval_rows: int = Field(512, ge=0, description="validation rows per evaluation; 0 is off")
    sample_rows: int = Field(2, ge=0, description="sample generations per evaluation")
    sample_max_length: int = Field(64, ge=1, description="tokens per sample generation")
    resume: str | None = Field(None, description="continue: 'latest', or a checkpoint directory")
    stop_after: int | None = Field(
        None, ge=1, description="save and stop after this many steps of the planned schedule"
    )
    seed: int = Field(0, ge=0, lt=2**63)
    num_threads: int | None = Field(None, ge=1, description="torch threads per process")

    @model_validator(mode="after")
    def _combinations(self) -> TrainingConfig:
        if self.eta_min > self.learning_rate:
            raise ValueError(
                f"eta_min={self.eta_min} must not be above learning_rate={self.learning_rate}"
            )
        if self.batching == "tokens" and self.tokens_per_micro_batch is None:
            raise ValueError("batching='tokens' needs tokens_per_micro_batch, the budget of a rank")
        if self.batching == "rows" and self.tokens_per_micro_batch is not None:
            raise ValueError(
                f"tokens_per_micro_batch={self.tokens_per_micro_batch} has no effect with "
                "batching='rows'; set batching='tokens' or drop it"
            )
        return self


class Settings(_Group):
    """All groups; saved as `settings.json` with every run."""

    model: ModelConfig = Field(default_factory=ModelConfig)
    loss: LossConfig = Field(default_factory=LossConfig)
    augmentation: AugmentationConfig = Field(default_factory=AugmentationConfig)
    collapse: CollapseConfig = Field(default_factory=CollapseConfig)
    data: DataConfig = Field(default_factory=DataConfig)
    training: TrainingConfig = Field(default_factory=TrainingConfig)

    @model_validator(mode="after")
    def _combinations(self) -> Settings:
        if self.training.memory_efficient or self.model.no_latent:
            _set(self.loss, contrastive_weight=0.0, queue_size=0)
            _set(self.augmentation, augmentation_probability=0.0)
        if self.model.no_latent:
            _set(self.loss, bow_weight=0.0, beta_max=0.0)
            _set(self.collapse, enable_collapse_monitoring=False)
        views = self.augmentation.augmentation_probability > 0
        if self.loss.contrastive_weight > 0 and not views:
            raise ValueError(
                f"contrastive_weight={self.loss.contrastive_weight} has no effect with "
                "augmentation_probability=0; set both above 0 or both to 0"
            )
        if self.loss.queue_size and not self.loss.contrastive_weight:
            raise ValueError(
                f"queue_size={self.loss.queue_size} has no effect with contrastive_weight=0"
            )
        return self

    def dump(self) -> str:
        """The resolved settings as JSON text that `load_settings` reads back."""
        return self.model_dump_json(indent=2) + "\n"


def _set(group: _Group, **values: Any) -> None:
    """Assign resolved values without running the validators again."""
    for name, value in values.items():
        group.__dict__[name] = value
        group.__pydantic_fields_set__.add(name)


def load_settings(path: str | Path) -> Settings:
    """Read a settings JSON file. Raises SettingsError with one line for anything wrong in it."""
    try:
        text = Path(path).read_text()
        content = json.loads(text)
    except (OSError, UnicodeDecodeError, json.JSONDecodeError) as error:
        raise SettingsError(f"--config {path}: cannot be read as JSON: {error}") from None
    if not isinstance(content, dict):
        raise SettingsError(
            f"--config {path}: must be a JSON object, found {type(content).__name__}"
        )
    return parse_settings(content, source=f"--config {path}")


def parse_settings(content: dict[str, Any], source: str = "settings") -> Settings:
    """Validate a nested dict. Raises SettingsError: one line, the first thing that is wrong."""
    try:
        return Settings.model_validate_json(json.dumps(content))
    except ValidationError as error:
        raise SettingsError(f"{source}: {describe_validation_error(error)}") from None


def describe_validation_error(error: ValidationError) -> str:
    """One line for the first error: the key, the value, what is allowed."""
    errors = error.errors()
    first = errors[0]
    # Groups are one level deep; what follows is pydantic's name for an alternative or an index.
    key = ".".join(str(part) for part in first["loc"][:2])
    if first["type"] == "extra_forbidden":
        hint = difflib.get_close_matches(str(first["loc"][-1]), _all_keys(), n=1)
        return f"unknown key {key!r}" + (f", did you mean {hint[0]!r}?" if hint else "")
    message = first["msg"].removeprefix("Value error, ")
    if first["type"] == "value_error":
        return f"{key}: {message}" if key else message
    # A setting of several types fails once for each of them.
    alternatives = [e["msg"] for e in errors if e["loc"][:2] == first["loc"][:2]]
    return f"{key}={first['input']!r}: {' or '.join(alternatives)}"


def _all_keys() -> list[str]:
    """Every group and setting name."""
    groups = {name: field.annotation for name, field in Settings.model_fields.items()}
    leaves = [key for group in groups.values() for key in group.model_fields]
    return [*groups, *leaves]
