"""The optimizer, the schedule of a run, and what it writes."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field, model_validator

from cdpvae.config.base import Group


class TrainingConfig(Group):
    """The optimizer, the schedule, and what a run writes."""

    output_dir: str = Field(default="checkpoints", min_length=1, description="checkpoints and logs")
    ds_config: str | None = Field(
        default=None, description="DeepSpeed JSON; default: ds_configs/ by device"
    )
    precision: Literal["bf16", "fp32"] = Field(
        default="bf16", description="compute dtype; master weights are fp32"
    )
    # What a micro-batch and an optimizer step consist of.
    per_device_batch_size: int = Field(default=8, ge=1, description="rows per micro-batch and rank")
    gradient_accumulation_steps: int = Field(
        default=12, ge=1, description="micro-batches per optimizer step and rank"
    )
    batching: Literal["rows", "tokens"] = Field(
        default="rows", description="what a micro-batch has a fixed number of"
    )
    tokens_per_micro_batch: int | None = Field(
        default=None,
        ge=1,
        description="with batching=tokens, per rank: instruction, response and soft-prompt tokens "
        "(per_device_batch_size then counts for evaluation only)",
    )
    prefetch: int = Field(
        default=2, ge=0, description="optimizer steps of batches built ahead; 0 is off"
    )
    # How long the run is.
    num_epochs: int = Field(
        default=10, ge=1, description="passes over the data, where max_steps is not given"
    )
    max_steps: int | None = Field(
        default=None, ge=1, description="optimizer steps; default: num_epochs"
    )
    # AdamW (Loshchilov & Hutter 2019), linear warm-up, then half a cosine.
    learning_rate: float = Field(default=2e-4, gt=0, description="learning rate after the warm-up")
    lora_learning_rate: float | None = Field(
        default=None, gt=0, description="learning rate of LoRA; default: learning_rate"
    )
    part_learning_rates: dict[str, Annotated[float, Field(ge=0)]] = Field(
        default_factory=dict,
        description="learning rates of parts of the model that shall have one of their own, by "
        "name (pooling, latent, projector, lora, ...); 0 freezes a part as it starts",
    )
    eta_min: float = Field(default=2e-5, ge=0, description="learning rate at the end of the cosine")
    warmup_ratio: float = Field(
        default=0.1, ge=0, lt=1, description="share of the optimizer steps that warm up"
    )
    weight_decay: float = Field(
        default=0.01, ge=0, description="AdamW's weight decay of matrices; other parameters: 0"
    )
    adam_beta1: float = Field(
        default=0.9, ge=0, lt=1, description="decay of AdamW's mean of gradients"
    )
    adam_beta2: float = Field(
        default=0.999, ge=0, lt=1, description="decay of AdamW's mean of squared gradients"
    )
    adam_eps: float = Field(default=1e-8, gt=0, description="added to AdamW's denominator")
    max_grad_norm: float = Field(
        default=1.0, ge=0, description="gradients are clipped to this norm; 0 is off"
    )
    # Memory and communication.
    gradient_checkpointing: bool = Field(
        default=True, description="decoder pass only, non-reentrant"
    )
    coalesce_gradients: bool = Field(
        default=False,
        description="one reduction per step instead of one per micro-batch (bf16 sums)",
    )
    memory_efficient: bool = Field(
        default=False, description="contrastive learning and augmentation off"
    )
    # What is saved, logged and evaluated, and how often.
    save_steps: int = Field(default=100, ge=1, description="optimizer steps between checkpoints")
    keep_checkpoints: int | None = Field(
        default=None, ge=1, description="older ones are removed; default: keep all"
    )
    keep_best: str | None = Field(
        default=None,
        pattern=r"^[+-]?\w+$",
        description="validation figure whose best checkpoint stays, linked as output_dir/best; "
        "+NAME: higher is better, -NAME: lower (write --keep-best=-NAME)",
    )
    stop_after_no_gain: int | None = Field(
        default=None,
        ge=1,
        description="evaluations without gain in keep_best after which the run ends",
    )
    logging_steps: int = Field(
        default=100, ge=1, description="optimizer steps between lines of log"
    )
    eval_steps: int = Field(default=100, ge=1, description="optimizer steps between evaluations")
    eval_rows: int = Field(
        default=512, ge=0, description="validation rows per evaluation; 0 is off"
    )
    sample_rows: int = Field(default=2, ge=0, description="sample generations per evaluation")
    sample_max_length: int = Field(default=64, ge=1, description="tokens per sample generation")
    # Continuing and repeating a run.
    resume: str | None = Field(
        default=None, description="continue: 'latest', or a checkpoint directory"
    )
    stop_after: int | None = Field(
        default=None,
        ge=1,
        description="save and stop after this many steps of the planned schedule",
    )
    seed: int = Field(
        default=0, ge=0, lt=2**63, description="seed of every random decision of the run"
    )
    deterministic: bool = Field(
        default=False,
        description="on a GPU, only algorithms whose sums have a fixed order (docs/kernels.md)",
    )
    num_threads: int | None = Field(default=None, ge=1, description="torch threads per process")

    @model_validator(mode="after")
    def _combinations(self) -> TrainingConfig:
        if self.eta_min > self.learning_rate:
            raise ValueError(
                f"eta_min={self.eta_min} must not be above learning_rate={self.learning_rate}"
            )
        if self.lora_learning_rate is not None and "lora" in self.part_learning_rates:
            raise ValueError(
                f"lora_learning_rate={self.lora_learning_rate} and a rate of 'lora' in "
                "part_learning_rates: drop one"
            )
        if self.stop_after_no_gain is not None and self.keep_best is None:
            raise ValueError(
                f"stop_after_no_gain={self.stop_after_no_gain} needs keep_best, the figure whose "
                "gains count"
            )
        if self.batching == "tokens" and self.tokens_per_micro_batch is None:
            raise ValueError("batching='tokens' needs tokens_per_micro_batch, the budget of a rank")
        if self.batching == "rows" and self.tokens_per_micro_batch is not None:
            raise ValueError(
                f"tokens_per_micro_batch={self.tokens_per_micro_batch} has no effect with "
                "batching='rows'; set batching='tokens' or drop it"
            )
        return self
