"""A small Llama trained on the spot, for machines that have no weights.

A tokenizer (byte-level BPE, or whole words for text that is tokenised already) and a small
`LlamaForCausalLM` are trained on the given text and saved as an ordinary Hugging Face directory,
which then goes through exactly the loading code of the 8B.

A text of its own, records marked `"split": "validation"`, or a random share where no record is
marked, are kept out of both trainings; their loss is recorded in `training.json`, and with
`epochs` it decides when the training ends. The same seed, thread count and versions give the same
weights.

`python -m cdpvae.tiny_backbone` makes one.
"""

from __future__ import annotations

import dataclasses
import json
import time
from pathlib import Path
from typing import Any, Literal

import torch
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from cdpvae.sample.language_model import FitOptions, evaluate, fit
from cdpvae.sample.texts import Parts, read_texts, split_texts
from cdpvae.sample.tokenizer import encode, train_tokenizer


# The command parses these; tests and benchmarks give them directly.
@dataclasses.dataclass
class BackboneOptions:
    """Text in, Hugging Face directory out."""

    input: str = ""
    """.json, .jsonl or .txt file, or hub data set"""
    output: str = ""
    """directory to write"""
    validation_input: str = ""
    """file of texts to validate on; default: marked records, or a share of the input"""
    tokenizer: Literal["bpe", "word"] = "bpe"
    """byte-level BPE, or one token for each word between blanks (text that is tokenised already)"""
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
    dropout: float = 0.0
    """share of embeddings and of what every layer adds that is dropped in training"""
    steps: int = 350
    """optimizer steps, where epochs is not given"""
    epochs: int | None = None
    """passes over the text instead; each is followed by a validation, and the best one is kept"""
    patience: int = 2
    """with epochs: so many validations in a row without gain end the training"""
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
        bounds = {"steps": 1, "batch_size": 1, "max_length": 2, "layers": 1, "patience": 1}
        for name, low in {**bounds, **({} if self.epochs is None else {"epochs": 1})}.items():
            if getattr(self, name) < low:
                raise ValueError(f"{name}={getattr(self, name)} must be at least {low}")
        if not 0 <= self.dropout < 1:
            raise ValueError(f"dropout={self.dropout} must lie in [0, 1)")

    def fit_options(self) -> FitOptions:
        """Return what concerns the training alone."""
        names = [field.name for field in dataclasses.fields(FitOptions)]
        return FitOptions(**{name: getattr(self, name) for name in names})


def make_backbone(options: BackboneOptions) -> dict[str, Any]:
    """Train and save tokenizer and model, and return what `training.json` records.

    Raises ValueError for options that cannot work, before anything is trained.
    """
    options.check()
    if options.threads is not None:
        torch.set_num_threads(options.threads)
    started = time.perf_counter()

    # Read the text. Validation text reaches neither the tokenizer nor the model.
    train_texts, held_out_texts, skipped = _read(options)

    # The tokenizer comes first: it decides the size of the model's vocabulary.
    tokenizer = train_tokenizer(
        train_texts, options.vocab_size, options.positions, options.tokenizer
    )
    torch.manual_seed(options.seed)
    model = build_model(options, tokenizer)
    train = encode(tokenizer, train_texts, options.max_length)
    held_out = encode(tokenizer, held_out_texts, options.max_length)
    print(
        f"{len(train)} sequences, {len(tokenizer)} tokens in the vocabulary, "
        f"{model.num_parameters():,} parameters",
        flush=True,
    )

    # Train, then record how well the model does on the text that it has not seen.
    fitted = fit(model, train, held_out, options.fit_options())
    record = {
        "options": dataclasses.asdict(options),
        "vocab_size": len(tokenizer),
        "parameters": model.num_parameters(),
        "training_rows": len(train),
        "skipped": skipped,
        "threads": torch.get_num_threads(),
        **fitted,
        **evaluate(model, held_out, options.batch_size),
        "seconds": round(time.perf_counter() - started, 1),
    }

    # `training.json` is written last: who finds it finds a whole backbone.
    model.save_pretrained(options.output)
    tokenizer.save_pretrained(options.output)
    Path(options.output, "training.json").write_text(json.dumps(record, indent=2) + "\n")
    return record


def _read(options: BackboneOptions) -> tuple[list[Parts], list[Parts], dict[str, int]]:
    """Return texts to train on, texts to validate on, and how many records were skipped by why."""
    texts, skipped = read_texts(options.input)
    if options.validation_input:
        # A file of its own holds out all of its texts, and nothing of the input.
        held_out, more = read_texts(options.validation_input)
        skipped = {why: skipped.get(why, 0) + more.get(why, 0) for why in {**skipped, **more}}
        train_parts = [text.parts for text in texts]
        held_out_parts = [text.parts for text in held_out]
    else:
        train_parts, held_out_parts = split_texts(texts, options.seed)
    for reason, count in skipped.items():
        print(f"skipped {count} records: {reason}", flush=True)
    return train_parts, held_out_parts, skipped


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
