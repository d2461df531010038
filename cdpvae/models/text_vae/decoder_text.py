"""Lay out the tokens that the decoder reads after the prompts: the response, or more before it.

    decoder_reads: nothing        prompts | [BOS] response [EOS]
    decoder_reads: instruction    prompts | [BOS] instruction | [BOS] response [EOS]

Positions run on from part to part, and a row's tokens stay one sequence: there is no padding
between them. Only the response is predicted, and only its words are dropped, before they come here.

Legend: B rows, T tokens of the responses, I tokens of the instructions.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from cdpvae.batch import PackedText, SpecialTokens
from cdpvae.config import ModelConfig
from cdpvae.models.text_vae.packing import row_of_tokens
from cdpvae_kernels.common.checks import readable


@dataclass(frozen=True)
class DecoderText:
    """What the decoder reads of B rows, packed.

    text: I + T tokens, or T where it reads nothing else. positions (T,) int64: where each token of
    the response is in `text.ids`.
    """

    text: PackedText
    positions: Tensor

    @classmethod
    def of(
        cls, input_ids: Tensor, response: PackedText, instruction: PackedText | None
    ) -> DecoderText:
        """Lay each row's instruction before its response; None lays nothing.

        input_ids (T,): laid out like `response.ids`, with words dropped in training.
        Raises ValueError where the two have different numbers of rows.
        """
        token = torch.arange(input_ids.numel(), device=input_ids.device)
        if instruction is None:
            whole = PackedText(input_ids, response.cu_seqlens, response.max_len)
            return cls(whole, token)
        if instruction.num_rows != response.num_rows:
            raise ValueError(
                f"{instruction.num_rows} instructions but {response.num_rows} responses; the "
                "decoder reads one before each"
            )
        # A token moves by what stands before it of the other kind: the instructions up to its own
        # row for one of a response, the responses of earlier rows for one of an instruction.
        positions = (
            token
            + instruction.cu_seqlens[1:].long()[row_of_tokens(response.cu_seqlens, len(token))]
        )
        before = torch.arange(instruction.ids.numel(), device=input_ids.device)
        before = (
            before
            + response.cu_seqlens[:-1].long()[row_of_tokens(instruction.cu_seqlens, len(before))]
        )
        ids = input_ids.new_empty(len(positions) + len(before))
        ids = ids.index_copy(0, before, instruction.ids).index_copy(0, positions, input_ids)
        cu_seqlens = instruction.cu_seqlens + response.cu_seqlens
        # A bound serves as the longest row where reading it back would wait for the device.
        longest = instruction.max_len + response.max_len
        if readable(cu_seqlens):
            longest = int(cu_seqlens.diff().max())
        return cls(PackedText(ids, cu_seqlens, longest), positions)


def text_read(config: ModelConfig, instruction: PackedText | None) -> PackedText | None:
    """Return what of the instructions a decoder reads, None for nothing of them.

    Raises ValueError where it reads them and there are none.
    """
    if not config.reads_instruction:
        return None
    if instruction is None:
        raise ValueError(
            "this model was trained with decoder_reads='instruction': its decoder needs the "
            "instruction of every row"
        )
    return instruction


def text_begun(tokens: SpecialTokens, num_rows: int, instruction: PackedText | None) -> PackedText:
    """Return what stands before the first written token of each row: up to the response's BOS.

    tokens: their BOS. num_rows: B. instruction: of each row, None for nothing.
    """
    device = None if instruction is None else instruction.ids.device
    bos = PackedText.from_lists([[tokens.bos]] * num_rows)
    bos = bos if device is None else bos.to(device)
    return DecoderText.of(bos.ids, bos, instruction).text
