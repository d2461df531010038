"""Turn text into the ids the model reads, and back.

The encoder reads `[BOS] tokens`, the decoder writes `[BOS] tokens [EOS]`; lengths count BOS and
EOS, and truncation keeps EOS. Special ids are placed here and nowhere else: the text itself is
encoded as plain text, so that a record which spells `</s>` cannot end a response early.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Sequence
from pathlib import Path

from tokenizers import Tokenizer
from transformers import AutoTokenizer, PreTrainedTokenizerBase

from cdpvae.batch import SpecialTokens
from cdpvae.config import DataConfig

# The original description's API has the limits of the settings as defaults.
DEFAULT = DataConfig()
# What Llama 3.1 reserves for padding, without declaring it as its pad token.
LLAMA_31_PAD = "<|finetune_right_pad_id|>"

# Letters, digits, spaces, code, accents, other scripts and an emoji: tokenizers that agree on the
# vocabulary but not on normalisation or splitting differ on at least one of these.
_PROBES = (
    "The quick brown fox jumps over the lazy dog.",
    "  two spaces,\ttab\nnewline\r\n",
    "def f(x):\n    return x ** 2  # 12345 67,890.01",
    "ÀÉÎõü ﬁ ½ Привет 你好 こんにちは 🙂",
    "don't DON'T it's </s> <s> <|eot_id|> [INST]",
)


class LlamaTokenizerWrapper:
    """Give a Hugging Face fast tokenizer the special ids and limits of this model.

    tokenizer: stays as it is.
    max_instruction_tokens, max_response_tokens: limits of a row, BOS and EOS counted.

    `bos_id`, `eos_id`, `pad_id`: int; `unk_id`: int or None; `special_ids`: every special id.
    The pad id is the tokenizer's own, else Llama 3.1's `<|finetune_right_pad_id|>` when the
    vocabulary has it, else EOS.
    Raises ValueError for a slow tokenizer, one without BOS or EOS, or limits too small.
    """

    def __init__(
        self,
        tokenizer: PreTrainedTokenizerBase,
        max_instruction_tokens: int = DEFAULT.max_instruction_tokens,
        max_response_tokens: int = DEFAULT.max_response_tokens,
    ) -> None:
        # Refuse what the rest of the project cannot work with.
        self.name = tokenizer.name_or_path or type(tokenizer).__name__
        if not tokenizer.is_fast:
            raise ValueError(
                f"tokenizer {self.name}: only fast tokenizers (tokenizer.json) are supported"
            )
        for role in ("bos", "eos"):
            if getattr(tokenizer, f"{role}_token_id") is None:
                raise ValueError(
                    f"tokenizer {self.name}: has no {role.upper()} token, which every sequence "
                    f"needs; set {role}_token in its tokenizer_config.json"
                )
        if max_instruction_tokens < 2 or max_response_tokens < 3:
            raise ValueError(
                f"max_instruction_tokens={max_instruction_tokens} must be at least 2 and "
                f"max_response_tokens={max_response_tokens} at least 3: one token and BOS, EOS"
            )

        # Read the special ids from the tokenizer.
        self.tokenizer = tokenizer
        self.max_instruction_tokens = max_instruction_tokens
        self.max_response_tokens = max_response_tokens
        self._backend = _plain_text_backend(tokenizer)
        self._vocabulary: dict[str, int] = self._backend.get_vocab(with_added_tokens=True)
        self.bos_id: int = tokenizer.bos_token_id
        self.eos_id: int = tokenizer.eos_token_id
        self.unk_id: int | None = tokenizer.unk_token_id
        pad_id = tokenizer.pad_token_id
        self.pad_id: int = (
            self._vocabulary.get(LLAMA_31_PAD, self.eos_id) if pad_id is None else pad_id
        )
        # Tokenizers declare special ids in two places, and neither needs to have all of them.
        marked = {i for i, token in tokenizer.added_tokens_decoder.items() if token.special}
        self.special_ids: set[int] = marked | set(tokenizer.all_special_ids) | {self.pad_id}
        self._no_content = {self.bos_id, self.eos_id, self.pad_id}

    @classmethod
    def from_pretrained(
        cls,
        name_or_dir: str,
        max_instruction_tokens: int = DEFAULT.max_instruction_tokens,
        max_response_tokens: int = DEFAULT.max_response_tokens,
    ) -> LlamaTokenizerWrapper:
        """Load by hub id or directory. Raises ValueError when there is no usable tokenizer."""
        try:
            tokenizer = AutoTokenizer.from_pretrained(name_or_dir)
        except (OSError, ValueError, KeyError, ImportError) as error:
            reason = str(error).strip().split("\n")[0]
            raise ValueError(
                f"tokenizer {name_or_dir!r} cannot be loaded: {reason}; give a hub id or a "
                "directory with tokenizer.json and tokenizer_config.json"
            ) from None
        return cls(tokenizer, max_instruction_tokens, max_response_tokens)

    def __len__(self) -> int:
        """Count the vocabulary, added tokens included."""
        return len(self._vocabulary)

    @property
    def largest_id(self) -> int:
        """Find the largest id this tokenizer can produce; an embedding needs one row more."""
        return max(self._vocabulary.values())

    def special_tokens(self) -> SpecialTokens:
        """Collect the ids the network treats apart."""
        special = tuple(sorted(self.special_ids))
        return SpecialTokens(self.bos_id, self.eos_id, self.pad_id, self.unk_id, special)

    def encode_instruction(self, text: str) -> list[int]:
        """Encode as `[BOS] tokens`, at most max_instruction_tokens of them."""
        return self.encode_instructions([text])[0]

    def encode_response(self, text: str) -> list[int]:
        """Encode as `[BOS] tokens [EOS]`, at most max_response_tokens; EOS is always the last."""
        return self.encode_responses([text])[0]

    def encode_instructions(self, texts: Sequence[str], truncate: bool = True) -> list[list[int]]:
        """Encode each as `encode_instruction` does; `truncate=False` leaves the length as it is."""
        # One place is for BOS.
        keep = self.max_instruction_tokens - 1 if truncate else None
        return [[self.bos_id, *tokens[:keep]] for tokens in self._encode(texts)]

    def encode_responses(self, texts: Sequence[str], truncate: bool = True) -> list[list[int]]:
        """Encode each as `encode_response` does; `truncate=False` leaves the length as it is."""
        # Two places are for BOS and EOS, so that truncation never costs the EOS.
        keep = self.max_response_tokens - 2 if truncate else None
        return [[self.bos_id, *tokens[:keep], self.eos_id] for tokens in self._encode(texts)]

    def decode(self, ids: Iterable[int]) -> str:
        """Turn a list or 1-D tensor of ids into text; special ids are left out."""
        # Not left to the backend, which does not know every special id.
        plain = [int(i) for i in ids]
        return self._backend.decode(
            [i for i in plain if i not in self.special_ids], skip_special_tokens=False
        )

    def content(self, ids: Iterable[int]) -> list[int]:
        """Leave out BOS, EOS and pad."""
        return [int(i) for i in ids if int(i) not in self._no_content]

    def save_pretrained(self, path: str | Path) -> None:
        """Write the tokenizer's files; `from_pretrained(path)` has the same fingerprint."""
        self.tokenizer.save_pretrained(str(path))

    def fingerprint(self) -> str:
        """Hash vocabulary, special ids and how some probes are encoded with SHA-256.

        The same in every process; limits are not part of it.
        """
        content = {
            "vocabulary": sorted(self._vocabulary.items()),
            "special": [self.bos_id, self.eos_id, self.pad_id, self.unk_id],
            "special_ids": sorted(self.special_ids),
            "probes": self._encode(_PROBES),
        }
        return hashlib.sha256(json.dumps(content).encode()).hexdigest()

    def _encode(self, texts: Sequence[str]) -> list[list[int]]:
        """Encode texts as plain text, without special ids."""
        encodings = self._backend.encode_batch_fast(list(texts), add_special_tokens=False)
        return [encoding.ids for encoding in encodings]


def _plain_text_backend(tokenizer: PreTrainedTokenizerBase) -> Tokenizer:
    """Copy the Rust tokenizer, and let the copy neither truncate, pad nor read special tokens.

    A copy, because these are settings of the object and the caller's tokenizer stays as it is.
    """
    backend = Tokenizer.from_str(tokenizer.backend_tokenizer.to_str())
    backend.no_truncation()
    backend.no_padding()
    backend.encode_special_tokens = True
    return backend
