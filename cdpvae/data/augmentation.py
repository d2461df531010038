"""A second view of a tokenised text, for InfoNCE: span masking, word dropout, local shuffle.

Works on ids, without detokenisation. Every decision is a Philox draw keyed by (seed, strategy,
sample index, epoch, position): the same under any packing, on any rank, after a resume.

Masked tokens become UNK where the tokenizer has one. Without UNK they become pad with their
attention off; in a packed text, where nothing unattended has a place, they leave the sequence.

Legend: B rows, L padded length, T packed tokens.
"""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import Tensor

from cdpvae.batch import PackedText
from cdpvae.config import AugmentationConfig
from cdpvae_kernels import philox

__all__ = ["AugmentationConfig", "TextAugmenter"]

Stream = philox.Stream


class TextAugmenter:
    """Applies the three strategies in the order shuffle, spans, words.

    config: rates and sizes. fill_id: what masked tokens become, UNK; None uses pad_id with the
    attention off. special_ids: never masked or moved, beside pad_id.
    """

    def __init__(
        self,
        config: AugmentationConfig | None = None,
        *,
        fill_id: int | None = None,
        pad_id: int = 0,
        special_ids: Iterable[int] = (),
        seed: int = 0,
    ):
        self.config = config or AugmentationConfig()
        self.fill_id, self.pad_id, self.seed = fill_id, pad_id, seed
        self.special_ids = torch.tensor(sorted({pad_id, *special_ids}))
        self.start_probability = span_start_probability(
            self.config.span_mask_prob, self.config.span_max_len
        )

    def augment(
        self,
        ids: Tensor,
        attention_mask: Tensor,
        sample_index: Tensor | None = None,
        epoch: int = 0,
    ) -> tuple[Tensor, Tensor]:
        """Padded (B, L) ids and mask -> ids and mask of the view, both (B, L).

        sample_index: (B,) keys of the draws, 0..B-1 by default. Raises ValueError for mismatched
        shapes or a row without a token.
        """
        text = PackedText.from_padded(ids, attention_mask)
        if sample_index is None:
            sample_index = torch.arange(text.num_rows, device=ids.device)
        shuffled, masked = self._decide(text, sample_index, epoch)
        real = attention_mask.bool()
        out_ids, out_mask = ids.clone(), attention_mask.clone()
        fill = self.pad_id if self.fill_id is None else self.fill_id
        out_ids[real] = shuffled.masked_fill(masked, fill).to(ids.dtype)
        if self.fill_id is None:
            out_mask[real] = (~masked).to(attention_mask.dtype)
        return out_ids, out_mask

    def view(self, text: PackedText, sample_index: Tensor, epoch: int) -> PackedText:
        """The same view, packed: what `from_padded` makes of `augment`'s result."""
        shuffled, masked = self._decide(text, sample_index, epoch)
        if self.fill_id is not None:
            ids = shuffled.masked_fill(masked, self.fill_id)
            return PackedText(ids, text.cu_seqlens, text.max_len)
        kept = torch.nn.functional.pad((~masked).cumsum(0), (1, 0))
        cu_seqlens = kept[text.cu_seqlens.long()].to(torch.int32)
        longest = int((cu_seqlens[1:] - cu_seqlens[:-1]).max())
        return PackedText(shuffled[~masked], cu_seqlens, longest)

    def _decide(self, text: PackedText, sample_index: Tensor, epoch: int) -> tuple[Tensor, Tensor]:
        """-> ids after the shuffle (T,), and which of them are masked (T,) bool."""
        lengths = text.lengths.long()
        device = text.ids.device
        row = torch.repeat_interleave(torch.arange(text.num_rows, device=device), lengths)
        starts = text.cu_seqlens[:-1].long()
        position = torch.arange(text.ids.numel(), device=device) - starts[row]
        sample = sample_index.to(device)[row]
        ids = self._shuffle(text.ids, row, position, sample, epoch)
        content = ~torch.isin(ids, self.special_ids.to(device))
        masked = content & (
            self._spans(text, position, sample_index.to(device), epoch)
            | self._words(position, sample, epoch)
        )
        # A row that would lose every token keeps its first one.
        left = torch.zeros_like(lengths).index_add_(0, row, (~masked).long())
        masked[starts[left == 0]] = False
        return ids, masked

    def _spans(
        self, text: PackedText, position: Tensor, sample_index: Tensor, epoch: int
    ) -> Tensor:
        """(T,) bool: tokens covered by a span that starts at most span_max_len - 1 before them.

        Spans may start before their row, where nothing is masked: else its first tokens would be
        covered less often than the others, and short instructions less than span_mask_prob.
        """
        if not self.start_probability:
            return torch.zeros_like(position, dtype=torch.bool)
        longest = self.config.span_max_len
        lead = longest - 1
        lengths = text.lengths.long() + lead
        row = torch.repeat_interleave(torch.arange(text.num_rows, device=position.device), lengths)
        place = torch.arange(len(row), device=row.device) - (lengths.cumsum(0) - lengths)[row]
        sample = sample_index[row]
        starts = self._draw(Stream.AUGMENT_SPAN, sample, epoch, 2 * place) < self.start_probability
        share = self._draw(Stream.AUGMENT_SPAN, sample, epoch, 2 * place + 1)
        length = 1 + (share * longest).long()
        token = (place >= lead).nonzero().squeeze(1)
        covered = starts[token]
        for back in range(1, longest):
            covered |= starts[token - back] & (length[token - back] > back)
        return covered

    def _words(self, position: Tensor, sample: Tensor, epoch: int) -> Tensor:
        rate = self.config.word_dropout_rate
        return self._draw(Stream.AUGMENT_WORD, sample, epoch, position) < rate

    def _shuffle(
        self, ids: Tensor, row: Tensor, position: Tensor, sample: Tensor, epoch: int
    ) -> Tensor:
        """Content tokens change places within windows; special tokens keep theirs."""
        window = self.config.shuffle_window
        if window < 2:
            return ids
        content = (~torch.isin(ids, self.special_ids.to(ids.device))).nonzero().squeeze(1)
        key = self._draw(Stream.AUGMENT_SHUFFLE, sample[content], epoch, position[content])
        group = row[content] * (int(position.max()) // window + 1) + position[content] // window
        # Sorting by a random key inside each window permutes it uniformly.
        by_key = key.argsort(stable=True)
        order = by_key[group[by_key].argsort(stable=True)]
        out = ids.clone()
        out[content] = ids[content[order]]
        return out

    def _draw(self, stream: Stream, sample: Tensor, epoch: int, position: Tensor) -> Tensor:
        return philox.uniform(self.seed, stream, sample, epoch, position)


def span_start_probability(expected_share: float, max_len: int) -> float:
    """The chance that a span starts at a token, such that `expected_share` of tokens is covered.

    A token is uncovered when no span of length 1..max_len (uniform) reaches it: prod over
    d = 0..max_len-1 of (1 - p (max_len - d) / max_len). Solved for p by bisection.
    """
    if expected_share <= 0:
        return 0.0
    low, high = 0.0, 1.0
    for _ in range(60):
        middle = (low + high) / 2
        uncovered = 1.0
        for reach in range(1, max_len + 1):
            uncovered *= 1 - middle * reach / max_len
        low, high = (middle, high) if 1 - uncovered < expected_share else (low, middle)
    return high
