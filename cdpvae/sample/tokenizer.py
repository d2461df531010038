"""A tokenizer trained on the text itself, and the token sequences a small backbone learns from.

Pairs become `[BOS] instruction [BOS] response [EOS]`, the order in which the system shows them to
the backbone; plain text becomes `[BOS] line [EOS]`.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from transformers import PreTrainedTokenizerFast

from cdpvae.sample.texts import Parts

BOS, EOS, PAD, UNK = "<s>", "</s>", "<pad>", "<unk>"
SPECIALS = (PAD, BOS, EOS, UNK)  # in the order of their ids
UNKNOWN_WORD = "<|unknown|>"  # of a word tokenizer
BYTES = 256  # the alphabet of a byte-level BPE


@dataclass(frozen=True)
class TokenSequence:
    """One training sequence. start: the position from which the NLL per response counts."""

    ids: list[int]
    start: int


def train_tokenizer(
    texts: Sequence[Parts], vocab_size: int, model_max_length: int, kind: str = "bpe"
) -> PreTrainedTokenizerFast:
    """Train a tokenizer of at most vocab_size tokens; like Llama's, it puts BOS before a text.

    texts: what it is trained on.
    vocab_size: special tokens included.
    model_max_length: recorded in the tokenizer, in tokens.
    kind: `bpe`, byte-level; or `word`, the most frequent words between blanks.

    Raises ValueError for another kind, and when vocab_size has no room for what each kind needs.
    """
    kinds = {"bpe": _train_bpe, "word": _train_words}
    if kind not in kinds:
        raise ValueError(f"tokenizer={kind!r} must be one of {', '.join(kinds)}")
    tokenizer, unknown = kinds[kind](texts, vocab_size)

    # BOS is added by the tokenizer itself, as Llama's does.
    bos = tokenizer.token_to_id(BOS)
    tokenizer.post_processor = processors.TemplateProcessing(
        single=f"{BOS} $A", pair=f"{BOS} $A {BOS} $B", special_tokens=[(BOS, bos)]
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        bos_token=BOS,
        eos_token=EOS,
        pad_token=PAD,
        unk_token=unknown,
        model_max_length=model_max_length,
        clean_up_tokenization_spaces=False,
    )


def _train_words(texts: Sequence[Parts], vocab_size: int) -> tuple[Tokenizer, str]:
    """Count words between blanks -> the tokenizer, and its unknown token.

    A corpus may spell its own `<unk>`, a word like any other; ours has another name.
    """
    specials = (PAD, BOS, EOS, UNKNOWN_WORD)
    if vocab_size <= len(specials):
        raise ValueError(f"vocab_size={vocab_size} must be above {len(specials)}: special tokens")
    tokenizer = Tokenizer(models.WordLevel(unk_token=UNKNOWN_WORD))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    trainer = trainers.WordLevelTrainer(
        vocab_size=vocab_size, special_tokens=list(specials), show_progress=False
    )
    tokenizer.train_from_iterator((part for parts in texts for part in parts), trainer)
    return tokenizer, UNKNOWN_WORD


def _train_bpe(texts: Sequence[Parts], vocab_size: int) -> tuple[Tokenizer, str]:
    """Train a byte-level BPE -> the tokenizer, and its unknown token, which it never needs."""
    if vocab_size < BYTES + len(SPECIALS):
        raise ValueError(
            f"vocab_size={vocab_size} must be at least {BYTES + len(SPECIALS)}: "
            "256 bytes and the special tokens"
        )
    # Every byte is in the alphabet, so that any text can be encoded without UNK.
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=list(SPECIALS),
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator((part for parts in texts for part in parts), trainer)
    return tokenizer, UNK


def encode(
    tokenizer: PreTrainedTokenizerFast, texts: Sequence[Parts], max_length: int
) -> list[TokenSequence]:
    """Encode each text as `[BOS] part` per part and `[EOS]`, cut to max_length tokens."""
    # One call for all parts: the tokenizer's own threads then share the work.
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
        # A cut may fall before the last part; the NLL then counts from the last token.
        sequences.append(TokenSequence(ids, min(start, len(ids) - 1)))
    return sequences
