"""The optimizer, the schedule of a run, and what it writes."""

from __future__ import annotations

from typing import Literal

from pydantic import Field, model_validator

from cdpvae.config.base import Group


class TrainingConfig(Group):
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
