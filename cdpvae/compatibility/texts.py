"""Texts in memory as a data set: a class of the description's API.

Training does not use this module; it reads what `cdpvae.preprocess` wrote.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Literal

from cdpvae.data.dataset import TokenColumn, TokenDataset
from cdpvae.data.example import Example, apply_target
from cdpvae.data.tokenizer import LlamaTokenizerWrapper


class InstructionDataset(TokenDataset):
    """Tokenise and truncate (instruction, response) pairs in memory.

    target: "response", or "reconstruction" (the encoder reads the response too).
    Raises ValueError for another target.
    """

    def __init__(
        self,
        examples: Iterable[Example | tuple[str, str]],
        wrapper: LlamaTokenizerWrapper,
        target: Literal["response", "reconstruction"] = "response",
    ) -> None:
        # Read the examples once: an iterator is spent afterwards.
        pairs = [e if isinstance(e, Example) else Example(*e) for e in examples]
        pairs = [apply_target(pair, target) for pair in pairs]
        instruction = wrapper.encode_instructions([pair.instruction for pair in pairs])
        response = wrapper.encode_responses([pair.response for pair in pairs])
        super().__init__(
            TokenColumn.from_lists(instruction),
            TokenColumn.from_lists(response),
            wrapper.name,
            wrapper.fingerprint(),
        )
