"""A small Llama of one's own, for machines that have no weights.

    python -m cdpvae.tiny_backbone --input pairs.jsonl --output DIR [--steps N] [--hidden D] ...

Trains a byte-level BPE tokenizer and a small `LlamaForCausalLM` on the given text and saves both
as an ordinary Hugging Face directory, which then goes through exactly the loading code of the 8B.
Pairs are trained as `[BOS] instruction [BOS] response [EOS]`, the order in which the system shows
them to the backbone; plain text as `[BOS] line [EOS]`.

Input: whatever `cdpvae.preprocess` reads, such as `.jsonl` pairs or `.txt` lines, converted by the
same code. Records marked `"split": "validation"`, or a random share where none is marked, are kept
out of both trainings; their loss is recorded in `training.json`. The same seed, thread count and
versions give the same weights.

`--tie-embeddings`, `--head-dim` and `--kv-heads` make the other shapes of Llama that exist.
"""

from __future__ import annotations

import dataclasses
import json
import math
import random
import time
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

import torch
import torch.nn.functional as F
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from torch import Tensor
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from cdpvae.command_line import parse_options, run
from cdpvae.preprocessing.formats.convert import convert, detect
from cdpvae.preprocessing.readers.source import Source

BOS, EOS, PAD, UNK = "<s>", "</s>", "<pad>", "<unk>"
IGNORE = -100  # the label that F.cross_entropy skips
VALIDATION_SHARE, VALIDATION_ROWS = 0.02, 1_000


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
    layers: int = 2
    heads: int = 6
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
    batch_size: int = 64
    """sequences per step"""
    max_length: int = 256
    """longer sequences are cut to this many tokens for the training"""
    learning_rate: float = 2e-3
    seed: int = 0
    threads: int | None = None
    """torch threads; default: torch's choice"""


@dataclasses.dataclass(frozen=True)
class Text:
    """parts: (instruction, response), or one text. split: the record's own mark, if any."""

    parts: tuple[str, ...]
    split: str | None = None


@dataclasses.dataclass(frozen=True)
class TokenSequence:
    """One training sequence. start: the position from which the NLL per response counts."""

    ids: list[int]
    start: int


def read_texts(source: str) -> tuple[list[Text], dict[str, int]]:
    """What `cdpvae.preprocess` would convert, in order, and how many records it would not, by why.

    Raises ValueError for an input that cannot be read or has fewer than two usable records.
    """
    texts: list[Text] = []
    skipped: dict[str, int] = {}
    for record in Source.parse(source).records():
        outcome = record.problem or convert(record.value)
        if isinstance(outcome, str):
            skipped[outcome] = skipped.get(outcome, 0) + 1
            continue
        [example] = outcome  # the first exchange of a conversation
        is_text = detect(record.value) == "text"
        parts = (example.response,) if is_text else (example.instruction, example.response)
        split = record.value.get("split") if isinstance(record.value, Mapping) else None
        texts.append(Text(parts, split))
    if len(texts) < 2:
        why = "".join(f"; {count} skipped: {reason}" for reason, count in skipped.items())
        raise ValueError(
            f"{source}: {len(texts)} usable texts, at least 2 are needed, one to validate on{why}"
        )
    return texts, skipped


def split_texts(
    texts: Sequence[Text], seed: int
) -> tuple[list[tuple[str, ...]], list[tuple[str, ...]]]:
    """(training, validation): by their marks if any is marked, else a random share.

    At most VALIDATION_ROWS validation texts are kept. Raises ValueError when a side is empty.
    """
    if any(text.split == "validation" for text in texts):
        train = [text.parts for text in texts if text.split != "validation"]
        held_out = [text.parts for text in texts if text.split == "validation"]
    else:
        order = [text.parts for text in texts]
        random.Random(seed).shuffle(order)
        count = max(1, round(VALIDATION_SHARE * len(order)))
        train, held_out = order[count:], order[:count]
    if not train:
        raise ValueError("every record is marked as validation; nothing is left to train on")
    return train, held_out[:VALIDATION_ROWS]


def train_tokenizer(
    texts: Sequence[tuple[str, ...]], vocab_size: int, model_max_length: int
) -> PreTrainedTokenizerFast:
    """Byte-level BPE of at most vocab_size tokens; like Llama's, it puts BOS before a text.

    Raises ValueError when vocab_size has no room for the 256 bytes and the special tokens.
    """
    specials = [PAD, BOS, EOS, UNK]
    if vocab_size < 256 + len(specials):
        raise ValueError(
            f"vocab_size={vocab_size} must be at least {256 + len(specials)}: "
            "256 bytes and the special tokens"
        )
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=specials,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator((part for parts in texts for part in parts), trainer)
    bos = tokenizer.token_to_id(BOS)
    tokenizer.post_processor = processors.TemplateProcessing(
        single=f"{BOS} $A", pair=f"{BOS} $A {BOS} $B", special_tokens=[(BOS, bos)]
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        bos_token=BOS,
        eos_token=EOS,
        pad_token=PAD,
        unk_token=UNK,
        model_max_length=model_max_length,
        clean_up_tokenization_spaces=False,
    )


def build_model(options: BackboneOptions, tokenizer: PreTrainedTokenizerFast) -> LlamaForCausalLM:
    """An untrained Llama in fp32. Raises ValueError for dimensions that do not fit together."""
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


def encode(
    tokenizer: PreTrainedTokenizerFast, texts: Sequence[tuple[str, ...]], max_length: int
) -> list[TokenSequence]:
    """`[BOS] part` for each part, then `[EOS]`; cut to max_length tokens."""
    flat = [part for parts in texts for part in parts]
    encoded = iter(tokenizer(flat, add_special_tokens=False)["input_ids"])
    sequences = []
    for parts in texts:
        ids: list[int] = []
        start = 0
        for _ in parts:
            start = len(ids)
            ids += [tokenizer.bos_token_id, *next(encoded)]
        ids = [*ids, tokenizer.eos_token_id][:max_length]
        sequences.append(TokenSequence(ids, min(start, len(ids) - 1)))
    return sequences


def batches(
    sequences: list[TokenSequence], batch_size: int, seed: int
) -> Iterator[list[TokenSequence]]:
    """Endless epochs of random batches; pools are sorted by length so that little is padding."""
    rng = random.Random(seed)
    while True:
        order = rng.sample(sequences, len(sequences))
        groups = []
        for low in range(0, len(order), 16 * batch_size):
            pool = sorted(order[low : low + 16 * batch_size], key=lambda s: len(s.ids))
            groups += [pool[i : i + batch_size] for i in range(0, len(pool), batch_size)]
        rng.shuffle(groups)
        yield from groups


def token_nll(model: LlamaForCausalLM, batch: list[TokenSequence]) -> Tensor:
    """NLL of each token after the first, 0 where there is none: (rows, longest - 1) fp32, nats.

    Padding stands on the right, where a causal model does not see it from any real token.
    """
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
    """Linear warm-up over a tenth of the steps, then a cosine down to a tenth."""
    warmup = max(1, steps // 10)
    if step < warmup:
        return (step + 1) / warmup
    progress = (step - warmup) / max(1, steps - warmup)
    return 0.1 + 0.45 * (1 + math.cos(math.pi * progress))


def fit(model: LlamaForCausalLM, train: list[TokenSequence], options: BackboneOptions) -> float:
    """Train in place with AdamW -> mean NLL per token over the last tenth of the steps."""
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
        batch = next(stream)
        loss = token_nll(model, batch).sum() / sum(len(s.ids) - 1 for s in batch)
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        schedule.step()
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
def evaluate(model: LlamaForCausalLM, sequences: list[TokenSequence], batch_size: int) -> dict:
    """NLL per token, and per response (or whole text) given what stands before it, in nats."""
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


def make_backbone(options: BackboneOptions) -> dict:
    """Train and save tokenizer and model -> what `training.json` records.

    Raises ValueError for options that cannot work, before anything is trained.
    """
    for name in ("input", "output"):
        if not getattr(options, name):
            raise ValueError(f"--{name} is missing")
    for name, low in (("steps", 1), ("batch_size", 1), ("max_length", 2), ("layers", 1)):
        if getattr(options, name) < low:
            raise ValueError(f"{name}={getattr(options, name)} must be at least {low}")
    if options.threads is not None:
        torch.set_num_threads(options.threads)
    started = time.perf_counter()
    texts, skipped = read_texts(options.input)
    for reason, count in skipped.items():
        print(f"skipped {count} records: {reason}", flush=True)
    train_texts, held_out = split_texts(texts, options.seed)
    tokenizer = train_tokenizer(train_texts, options.vocab_size, options.positions)
    torch.manual_seed(options.seed)
    model = build_model(options, tokenizer)
    train = encode(tokenizer, train_texts, options.max_length)
    print(
        f"{len(train)} sequences, {len(tokenizer)} tokens in the vocabulary, "
        f"{model.num_parameters():,} parameters",
        flush=True,
    )
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
    model.save_pretrained(options.output)
    tokenizer.save_pretrained(options.output)
    Path(options.output, "training.json").write_text(json.dumps(record, indent=2) + "\n")
    return record


def _main(argv: Sequence[str] | None) -> None:
    options = parse_options(BackboneOptions, "Train a tokenizer and a small Llama on text.", argv)
    record = make_backbone(options)
    print(
        f"{options.output}: validation {record['validation_nll_per_token']:.3f} nats/token, "
        f"{record['validation_nll_per_response']:.2f} nats per response given its instruction, "
        f"{record['seconds']} s"
    )


def main(argv: Sequence[str] | None = None) -> int:
    """Entry point -> exit status."""
    return run(_main, argv)


if __name__ == "__main__":
    raise SystemExit(main())
