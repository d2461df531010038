"""The options of `train_step.py`, and what is built from them.

A child process that measures memory builds the same from the same options.
"""

from __future__ import annotations

import dataclasses
from typing import Any, Literal

import torch

from benchmarks.steps.naive import NaiveStep
from benchmarks.steps.ours import OurStep
from benchmarks.steps.stock import StockStep
from benchmarks.support.lengths import Corpus, StepBatch, open_corpus, step_batches
from benchmarks.support.step_setup import Setup, llama_for, make_setup, settings_for

# The variants; "ours" comes first because the others are compared with it.
NAMES = ("ours", "naive", "stock")
# What an 8B model is trained on, in tokens of a response.
LONG_RESPONSE = 350


@dataclasses.dataclass
class StepOptions:
    """Which model, which data, and what is measured."""

    shape: Literal["tiny", "8b"] = "tiny"
    """dimensions of the Llama, and the settings that go with them"""
    backbone: str | None = None
    """a Llama directory or hub id; default: random weights of the shape"""
    lengths: str | None = None
    """text whose rows are used: .json, .jsonl or .txt; default: shipped lengths, random ids"""
    data: str | None = None
    """processed directory whose rows are used"""
    tokenizer: str | None = None
    """for --lengths; default: one trained on the text"""
    mean_response: int | None = None
    """tokens of a response, of shipped lengths; default: as shipped (68), at 8b 350"""
    micro_batch: int = 16
    """rows per micro-batch"""
    accum: int = 1
    """micro-batches per optimizer step"""
    steps: int = 4
    """optimizer steps per measurement, even: every other one computes the view"""
    rounds: int = 7
    """timed rounds; every round measures each variant once"""
    warmup: int = 1
    """untimed rounds before them"""
    device: str | None = None
    """default: cuda where there is one"""
    precision: Literal["auto", "fp32", "bf16"] = "auto"
    """default: bf16 on cuda, else fp32"""
    engine: Literal["auto", "torch", "deepspeed"] = "auto"
    """of ours; default: deepspeed in bf16, else torch"""
    checkpointing: bool | None = None
    """activation checkpointing in all variants; default: the shape's"""
    stock_layout: Literal["flattened", "padded"] = "flattened"
    """of stock"""
    only: tuple[str, ...] = NAMES
    """variants to time, "ours" among them"""
    memory: bool = True
    """measure peak memory, in child processes"""
    double: bool = False
    """ask only whether ours runs at twice the micro-batch within naive's peak"""
    largest: float | None = None
    """ask only for the largest micro-batch (by doubling) of each variant within this many GiB"""
    threads: int | None = None
    """torch threads; default: torch's choice"""
    seed: int = 0
    """of the weights and the order of the rows"""
    results: str | None = None
    """where CSV and PNG go; default: benchmarks/results"""
    save: bool = True
    """write them"""

    @property
    def torch_device(self) -> torch.device:
        """Return the device of the run: `device`, or the default."""
        return torch.device(self.device or ("cuda" if torch.cuda.is_available() else "cpu"))

    def check(self) -> None:
        """Resolve what is "auto". Raises ValueError for options that do not go together."""
        # Half of the steps compute the view.
        if self.steps < 2 or self.steps % 2:
            raise ValueError(f"steps={self.steps}: an even number, half of them with the view")
        # The variants to time.
        if unknown := set(self.only) - set(NAMES):
            raise ValueError(f"only={sorted(unknown)}: the variants are {', '.join(NAMES)}")
        if "ours" not in self.only:
            raise ValueError(f"only={self.only}: 'ours' is what the others are compared with")
        # At 8 rows of 68 tokens an 8B step would measure the launches, the same for all variants.
        if self.shape == "8b" and not (self.lengths or self.data or self.mean_response):
            self.mean_response = LONG_RESPONSE
        # The device decides the precision, and the precision the engine.
        self.device = str(self.torch_device)
        if self.precision == "auto":
            self.precision = "bf16" if self.torch_device.type == "cuda" else "fp32"
        if self.engine == "auto":
            self.engine = "deepspeed" if self.precision == "bf16" else "torch"
        if self.threads:
            torch.set_num_threads(self.threads)


def open_setup(options: StepOptions) -> tuple[Setup, Corpus]:
    """Open settings, data and weights: the same in every process for the same options."""
    # Settings and dimensions are cheap and come first: they decide what the data must fit.
    settings = settings_for(
        options.shape,
        options.micro_batch,
        options.accum,
        options.precision,
        options.checkpointing,
        options.seed,
    )
    llama = llama_for(options.shape, options.backbone)
    corpus = open_corpus(
        options.lengths,
        options.data,
        options.tokenizer,
        llama.vocab_size,
        settings.data,
        options.mean_response,
    )
    return make_setup(settings, llama, options.backbone, corpus, options.torch_device), corpus


def build(name: str, setup: Setup, options: StepOptions) -> OurStep | NaiveStep:
    """Build one variant over the shared weights."""
    if name == "ours":
        return OurStep(setup, options.engine)
    return NaiveStep(setup) if name == "naive" else StockStep(setup, options.stock_layout)


def measured_batches(corpus: Corpus, options: StepOptions) -> list[StepBatch]:
    """Draw the step batches of one measurement."""
    endless = step_batches(corpus, options.micro_batch, options.accum, options.seed)
    return [next(endless) for _ in range(options.steps)]


def identify(name: str, options: StepOptions) -> dict[str, Any]:
    """Make the first columns of a row: variant, shape, precision and batch sizes."""
    return {
        "variant": name,
        "shape": options.shape if options.backbone is None else "backbone",
        "precision": options.precision,
        "micro_batch": options.micro_batch,
        "accum": options.accum,
    }
