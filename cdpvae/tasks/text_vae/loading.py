"""The data a run reads: opened, checked against each other, and cut into optimizer steps.

Everything here is cheap and comes before any weight is loaded.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from cdpvae.batch import VAEBatch
from cdpvae.config import Settings
from cdpvae.data import (
    LlamaTokenizerWrapper,
    Loader,
    PreprocessedDataset,
    RowCountSampler,
    StepLoader,
    TokenBudgetSampler,
    TokenDataset,
    VAECollator,
    evaluation_batches,
)
from cdpvae.data.sampler import StepSampler
from cdpvae.latents import family_of
from cdpvae.models.text_vae import check_vocabulary
from cdpvae.models.text_vae.backbone import check_fits, load_llama_config
from cdpvae.training.distributed import World

Splits = dict[str, PreprocessedDataset]


def open_data(settings: Settings) -> tuple[LlamaTokenizerWrapper, Splits]:
    """Tokenizer and splits, checked against each other and the backbone's vocabulary.

    A streaming run has no train split, and validation rows only where processed_dir is given.
    """
    model, data = settings.model, settings.data
    # The backbone's dimensions and the tokenizer's ids must fit, before data is opened.
    llama = load_llama_config(model.backbone)
    check_fits(llama, model)
    name = model.tokenizer or model.backbone
    tokenizer = LlamaTokenizerWrapper.from_pretrained(name)
    check_vocabulary(llama.vocab_size, tokenizer.special_tokens(), tokenizer.largest_id, str(name))
    # A stream brings its own training rows.
    splits = {} if data.streaming else {"train": PreprocessedDataset(data.processed, "train")}
    wanted = not data.streaming or data.processed_dir is not None
    if wanted and (Path(data.processed) / "validation").exists():
        splits["validation"] = PreprocessedDataset(data.processed, "validation")
    for split in splits.values():
        split.check_tokenizer(tokenizer)
        if model.reads_instruction:
            split.check_may_be_read()
    return tokenizer, splits


def build_loader(
    settings: Settings,
    world: World,
    tokenizer: LlamaTokenizerWrapper,
    splits: Mapping[str, TokenDataset],
) -> Loader[Any]:
    """Make the loader of this rank that `batching` and `streaming` ask for.

    settings: of the run.
    world: this rank among its peers.
    tokenizer: of a stream; processed rows have their tokens.
    splits: processed data.

    Raises ValueError for settings that give no step.
    """
    if settings.data.streaming:
        return _stream_loader(settings, world, tokenizer)
    model, training, train = settings.model, settings.training, splits["train"]
    # How many rows a micro-batch has: as many as fit a number of tokens, or always the same.
    sampler: StepSampler
    if training.tokens_per_micro_batch is not None:
        sampler = TokenBudgetSampler(
            train.response_lengths,
            train.instruction_lengths,
            tokens_per_micro_batch=training.tokens_per_micro_batch,
            prompt_tokens=model.num_soft_tokens if family_of(model).reads_text else 0,
            grad_accum=training.gradient_accumulation_steps,
            world_size=world.world_size,
            seed=training.seed,
            instruction_passes=model.instruction_passes,
        )
    else:
        sampler = RowCountSampler(
            train.response_lengths,
            train.instruction_lengths,
            rows_per_micro_batch=training.per_device_batch_size,
            grad_accum=training.gradient_accumulation_steps,
            world_size=world.world_size,
            seed=training.seed,
            instruction_passes=model.instruction_passes,
        )
    # Read this rank's share of the rows that it chooses.
    return StepLoader(train, VAECollator(), sampler, world.rank, training.prefetch)


def _stream_loader(
    settings: Settings, world: World, tokenizer: LlamaTokenizerWrapper
) -> Loader[Any]:
    from cdpvae.preprocessing.readers.source import PHASES, Source
    from cdpvae.preprocessing.streaming.loader import StreamLoader
    from cdpvae.preprocessing.streaming.records import RecordStream

    # Refuse what a stream cannot do.
    data, training = settings.data, settings.training
    if training.max_steps is None:
        raise ValueError("streaming=true needs max_steps: a stream does not say how long it is")
    if training.batching == "tokens":
        raise ValueError("batching='tokens' needs all lengths, which streaming=true does not know")
    for name in ("decontaminate", "validation_input"):
        if value := getattr(data, name):
            raise ValueError(
                f"{name}={list(value)} has no effect with streaming=true; "
                "preprocess the data, or drop it"
            )
    # Read, convert and batch records as they come.
    sources = [Source.parse(text) for text in data.input or PHASES[data.phase]]
    return StreamLoader(
        RecordStream(sources, data, tokenizer),
        VAECollator(),
        rows_per_micro_batch=training.per_device_batch_size,
        grad_accum=training.gradient_accumulation_steps,
        world_size=world.world_size,
        seed=training.seed,
        rank=world.rank,
        prefetch=training.prefetch,
    )


def planned_steps(settings: Settings, loader: Loader[Any]) -> int:
    """Count the optimizer steps of the whole schedule.

    Under `batching: tokens` epochs may differ by a step or so; the first one counts.
    Raises ValueError without max_steps where the loader does not know the length of an epoch.
    """
    training = settings.training
    if training.max_steps is not None:
        return training.max_steps
    if loader.steps_per_epoch is None:
        raise ValueError(
            "max_steps is not set, and the length of an epoch is not known; set max_steps"
        )
    return training.num_epochs * loader.steps_per_epoch


def evaluation_rows(
    settings: Settings, world: World, split: PreprocessedDataset
) -> tuple[list[VAEBatch], VAEBatch | None]:
    """Return this rank's share of the validation rows, and the rows whose texts are generated."""
    # Each rank measures its share; two rows at least, so that z can be shuffled.
    training, collator = settings.training, VAECollator()
    rows = max(2, training.per_device_batch_size)
    share = evaluation_batches(
        split,
        collator,
        rows,
        limit=training.eval_rows,
        rank=world.rank,
        world_size=world.world_size,
    )
    # The rows that are written out are the same on every rank.
    wanted = training.sample_rows
    samples = evaluation_batches(split, collator, max(1, wanted), limit=wanted)
    return list(share), next(samples, None)
