"""A small Llama trained on the spot, for machines that have no weights.

A byte-level BPE tokenizer and a small `LlamaForCausalLM` are trained on the given text and saved
as an ordinary Hugging Face directory, which then goes through exactly the loading code of the 8B.

Records marked `"split": "validation"`, or a random share where no record is marked, are kept out
of both trainings; their loss is recorded in `training.json`. The same seed, thread count and
versions give the same weights.

`python -m cdpvae.tiny_backbone` makes one.
"""

from __future__ import annotations

import dataclasses
import json
import random
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from cdpvae.sample.texts import read_texts, split_texts
from cdpvae.sample.tokenizer import TokenSequence, encode, train_tokenizer
from cdpvae.training.optimizer import warmup_cosine

IGNORE = -100  # the label that F.cross_entropy skips
POOL_BATCHES = 16  # batches whose rows are sorted by length together
WARMUP_STEPS_SHARE = 10  # the warm-up takes one step in so many
LEARNING_RATE_FLOOR = 0.1  # the last factor of the learning rate


# The command parses these; tests and benchmarks give them directly.
@dataclasses.dataclass
class BackboneOptions:
    """Text in, Hugging Face directory out."""

    input: str = ""
    """.json, .jsonl or .txt file, or hub data set"""
    output: str = ""
    """directory to write"""
    vocab_size: int = 4096
    """at most; small texts give fewer tokens"""
    hidden: int = 192
    """width of the hidden states"""
    layers: int = 2
    """decoder layers"""
    heads: int = 6
    """query heads"""
    kv_heads: int | None = None
    """key and value heads; default: as many as heads"""
    head_dim: int | None = None
    """default: hidden / heads"""
    intermediate: int | None = None
    """width of the MLP; default: 11/4 of hidden"""
    tie_embeddings: bool = False
    """share the input embedding with the output head"""
    positions: int = 2048
    """max_position_embeddings of the config"""
    steps: int = 350
    """optimizer steps"""
    batch_size: int = 64
    """sequences per step"""
    max_length: int = 256
    """longer sequences are cut to this many tokens for the training"""
    learning_rate: float = 2e-3
    """the highest; reached after a tenth of the steps"""
    seed: int = 0
    """of the weights, the batches and the validation share"""
    threads: int | None = None
    """torch threads; default: torch's choice"""

    def check(self) -> None:
        """Raise ValueError for a missing path or a number below its bound."""
        for name in ("input", "output"):
            if not getattr(self, name):
                raise ValueError(f"--{name} is missing")
        # Fewer than two tokens predict nothing.
        for name, low in (("steps", 1), ("batch_size", 1), ("max_length", 2), ("layers", 1)):
            if getattr(self, name) < low:
                raise ValueError(f"{name}={getattr(self, name)} must be at least {low}")


def make_backbone(options: BackboneOptions) -> dict[str, Any]:
    """Train and save tokenizer and model, and return what `training.json` records.

    Raises ValueError for options that cannot work, before anything is trained.
    """
    options.check()
    if options.threads is not None:
        torch.set_num_threads(options.threads)
    started = time.perf_counter()

    # Read the text. Validation text reaches neither the tokenizer nor the model.
    texts, skipped = read_texts(options.input)
    for reason, count in skipped.items():
        print(f"skipped {count} records: {reason}", flush=True)
    train_texts, held_out = split_texts(texts, options.seed)

    # The tokenizer comes first: it decides the size of the model's vocabulary.
    tokenizer = train_tokenizer(train_texts, options.vocab_size, options.positions)
    torch.manual_seed(options.seed)
    model = build_model(options, tokenizer)
    train = encode(tokenizer, train_texts, options.max_length)
    print(
        f"{len(train)} sequences, {len(tokenizer)} tokens in the vocabulary, "
        f"{model.num_parameters():,} parameters",
        flush=True,
    )

    # Train, then record how well the model does on the text that it has not seen.
    loss = fit(model, train, options)
    record = {
        "options": dataclasses.asdict(options),
        "vocab_size": len(tokenizer),
        "parameters": model.num_parameters(),
        "training_rows": len(train),
        "skipped": skipped,
        "threads": torch.get_num_threads(),
        "train_nll_per_token": loss,
        **evaluate(model, encode(tokenizer, held_out, options.max_length), options.batch_size),
        "seconds": round(time.perf_counter() - started, 1),
    }

    # `training.json` is written last: who finds it finds a whole backbone.
    model.save_pretrained(options.output)
    tokenizer.save_pretrained(options.output)
    Path(options.output, "training.json").write_text(json.dumps(record, indent=2) + "\n")
    return record


def build_model(options: BackboneOptions, tokenizer: PreTrainedTokenizerFast) -> LlamaForCausalLM:
    """Build an untrained Llama in fp32, from torch's global random state.

    Raises ValueError for dimensions that do not fit together.
    """
    # Llama leaves these to fail inside a layer, where the message names no option.
    kv_heads = options.heads if options.kv_heads is None else options.kv_heads
    if options.head_dim is None and options.hidden % options.heads:
        raise ValueError(
            f"hidden={options.hidden} must be a multiple of heads={options.heads}, "
            "or head_dim must be given"
        )
    head_dim = options.head_dim or options.hidden // options.heads
    if kv_heads < 1 or options.heads % kv_heads:
        raise ValueError(f"heads={options.heads} must be a multiple of kv_heads={kv_heads}")
    if head_dim % 2:
        raise ValueError(f"head_dim={head_dim} must be even: rotary embeddings turn pairs")

    # The special ids in the config are those of the tokenizer, as with any published Llama.
    return LlamaForCausalLM(
        LlamaConfig(
            vocab_size=len(tokenizer),
            hidden_size=options.hidden,
            intermediate_size=options.intermediate or options.hidden * 11 // 4,
            num_hidden_layers=options.layers,
            num_attention_heads=options.heads,
            num_key_value_heads=kv_heads,
            head_dim=head_dim,
            max_position_embeddings=options.positions,
            tie_word_embeddings=options.tie_embeddings,
            bos_token_id=tokenizer.bos_token_id,
            eos_token_id=tokenizer.eos_token_id,
            pad_token_id=tokenizer.pad_token_id,
        )
    )


def batches(
    sequences: Sequence[TokenSequence], batch_size: int, seed: int
) -> Iterator[list[TokenSequence]]:
    """Draw random batches for endless epochs; rows of similar length share a batch."""
    rng = random.Random(seed)
    while True:
        # Every epoch shows each sequence once.
        order = rng.sample(sequences, len(sequences))
        groups = []
        # Sorting within pools keeps padding small without fixing who meets whom.
        for low in range(0, len(order), POOL_BATCHES * batch_size):
            pool = sorted(order[low : low + POOL_BATCHES * batch_size], key=lambda s: len(s.ids))
            groups += [pool[i : i + batch_size] for i in range(0, len(pool), batch_size)]
        rng.shuffle(groups)
        yield from groups


def token_nll(model: LlamaForCausalLM, batch: Sequence[TokenSequence]) -> Tensor:
    """Compute the NLL of each token after the first: (rows, longest - 1) fp32, nats.

    It is 0 at padding, which stands on the right, where a causal model does not see it from any
    real token.
    """
    # Labels are the ids one position later; a label that is skipped has an NLL of 0.
    width = max(len(sequence.ids) for sequence in batch)
    pad = model.config.pad_token_id
    ids = torch.tensor([s.ids + [pad] * (width - len(s.ids)) for s in batch])
    labels = torch.tensor([s.ids[1:] + [IGNORE] * (width - len(s.ids)) for s in batch])
    logits = model(input_ids=ids, use_cache=False).logits[:, :-1].float()
    nll = F.cross_entropy(
        logits.flatten(0, 1), labels.flatten(), ignore_index=IGNORE, reduction="none"
    )
    return nll.view_as(labels)


def learning_rate_factor(step: int, steps: int) -> float:
    """Compute the factor of the highest learning rate: a tenth of the steps up, a cosine down."""
    warmup_steps = max(1, steps // WARMUP_STEPS_SHARE)
    return warmup_cosine(step, warmup_steps, steps, LEARNING_RATE_FLOOR)


def fit(model: LlamaForCausalLM, train: Sequence[TokenSequence], options: BackboneOptions) -> float:
    """Train in place with AdamW, and return the mean NLL per token of the last tenth of steps."""
    optimizer = torch.optim.AdamW(
        model.parameters(), lr=options.learning_rate, betas=(0.9, 0.95), weight_decay=0.01
    )
    schedule = torch.optim.lr_scheduler.LambdaLR(
        optimizer, lambda step: learning_rate_factor(step, options.steps)
    )
    stream = batches(train, options.batch_size, options.seed)
    last: list[float] = []
    started = time.perf_counter()
    model.train()
    for step in range(1, options.steps + 1):
        # The loss is a mean over real tokens, not over the padded width.
        batch = next(stream)
        loss = token_nll(model, batch).sum() / sum(len(s.ids) - 1 for s in batch)

        # One optimizer step.
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        schedule.step()

        # Keep the losses of the last tenth of the steps: single batches are noisy.
        last = [*last, loss.item()][-max(1, options.steps // 10) :]
        if step % 50 == 0 or step == options.steps:
            rate = step / (time.perf_counter() - started)
            print(
                f"step {step}/{options.steps}  loss {sum(last) / len(last):.3f} nats/token  "
                f"{rate:.1f} it/s",
                flush=True,
            )
    return sum(last) / len(last)


@torch.no_grad()
def evaluate(
    model: LlamaForCausalLM, sequences: Sequence[TokenSequence], batch_size: int
) -> dict[str, float]:
    """Compute the NLL per token, and per response (or whole text) given its instruction, in nats.

    The keys are those of `training.json`. sequences: held-out text, at least one.
    """
    # Sums first, so that a short last batch does not weigh more.
    model.eval()
    total = tail = 0.0
    for low in range(0, len(sequences), batch_size):
        batch = sequences[low : low + batch_size]
        nll = token_nll(model, batch)
        total += nll.sum().item()
        tail += sum(row[s.start :].sum().item() for row, s in zip(nll, batch, strict=True))
    tokens = sum(len(s.ids) - 1 for s in sequences)
    return {
        "validation_nll_per_token": total / tokens,
        "validation_nll_per_response": tail / len(sequences),
        "validation_rows": len(sequences),
    }
