"""Make a second view of a tokenised text, for InfoNCE: span masking, word dropout, local shuffle.

Works on ids, without detokenisation. Every decision is a Philox draw keyed by (seed, strategy,
sample index, epoch, position): the same under any packing, on any rank, after a resume.

Masked tokens become UNK where the tokenizer has one. A tokenizer without UNK masks by taking
tokens away from attention; in a packed text, where nothing unattended has a place, they leave the
sequence. `compatibility.TextAugmenter` makes the same view of padded tensors.

Legend: B rows, T packed tokens.
"""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import Tensor

from cdpvae.batch import PackedText
from cdpvae.config import AugmentationConfig
from cdpvae_kernels import philox

Stream = philox.Stream


class PackedAugmenter:
    """Apply the three strategies to packed text, in the order shuffle, spans, words.

    config: rates and sizes.
    fill_id: what masked tokens become, UNK; None takes them out of the text.
    pad_id: never masked or moved.
    special_ids: never masked or moved either.
    seed: of every draw.
    """

    def __init__(
        self,
        config: AugmentationConfig | None = None,
        *,
        fill_id: int | None = None,
        pad_id: int = 0,
        special_ids: Iterable[int] = (),
        seed: int = 0,
    ) -> None:
        self.config = config or AugmentationConfig()
        self.fill_id, self.pad_id, self.seed = fill_id, pad_id, seed
        self.special_ids = torch.tensor(sorted({pad_id, *special_ids}))
        self.start_probability = span_start_probability(
            self.config.span_mask_prob, self.config.span_max_len
        )

    def view(self, text: PackedText, sample_index: Tensor, epoch: int) -> PackedText:
        """Make the view of B packed rows; a row keeps at least one token.

        sample_index: (B,) int64, keys of the draws.
        """
        shuffled, masked = self.decide(text, sample_index, epoch)
        # With UNK the borders of the rows stay.
        if self.fill_id is not None:
            ids = shuffled.masked_fill(masked, self.fill_id)
            return PackedText(ids, text.cu_seqlens, text.max_len)
        # Without UNK masked tokens leave the text, and the borders move with them.
        kept = torch.nn.functional.pad((~masked).cumsum(0), (1, 0))
        cu_seqlens = kept[text.cu_seqlens.long()].to(torch.int32)
        longest = int((cu_seqlens[1:] - cu_seqlens[:-1]).max())
        return PackedText(shuffled[~masked], cu_seqlens, longest)

    def decide(self, text: PackedText, sample_index: Tensor, epoch: int) -> tuple[Tensor, Tensor]:
        """Draw the ids after the shuffle, (T,), and which of them are masked, (T,) bool."""
        # Give every token its row, its position in the row and its row's key.
        lengths = text.lengths.long()
        device = text.ids.device
        row = torch.repeat_interleave(torch.arange(text.num_rows, device=device), lengths)
        starts = text.cu_seqlens[:-1].long()
        position = torch.arange(text.ids.numel(), device=device) - starts[row]
        sample = sample_index.to(device)[row]

        # Shuffle first: masks are drawn for positions, not for the tokens that come to lie there.
        ids = self._shuffle(text.ids, row, position, sample, epoch)
        content = ~torch.isin(ids, self.special_ids.to(device))
        masked = content & (
            self._spans(text, position, sample_index.to(device), epoch)
            | self._words(position, sample, epoch)
        )

        # A row that would lose every token keeps its first.
        left = torch.zeros_like(lengths).index_add_(0, row, (~masked).long())
        masked[starts[left == 0]] = False
        return ids, masked

    def _spans(
        self, text: PackedText, position: Tensor, sample_index: Tensor, epoch: int
    ) -> Tensor:
        """Find the tokens that a span covers -> (T,) bool.

        A span covers a token when it starts at most span_max_len - 1 tokens before it. Spans may
        start before their row, where nothing is masked: else its first tokens would be covered
        less often than the others, and short instructions less than span_mask_prob.

        text: B rows.
        position (T,): of every token in its row.
        sample_index (B,): keys of the draws.
        epoch: a key of the draws as well.
        """
        if not self.start_probability:
            return torch.zeros_like(position, dtype=torch.bool)

        # Lay out the places where spans may start: every row, with `lead` places before it.
        longest = self.config.span_max_len
        lead = longest - 1
        lengths = text.lengths.long() + lead
        row = torch.repeat_interleave(torch.arange(text.num_rows, device=position.device), lengths)
        place = torch.arange(len(row), device=row.device) - (lengths.cumsum(0) - lengths)[row]
        sample = sample_index[row]

        # Draw for every place whether a span starts there, and how long it is.
        starts = self._draw(Stream.AUGMENT_SPAN, sample, epoch, 2 * place) < self.start_probability
        share = self._draw(Stream.AUGMENT_SPAN, sample, epoch, 2 * place + 1)
        length = 1 + (share * longest).long()

        # Look back from every token for a span that reaches it.
        token = (place >= lead).nonzero().squeeze(1)
        covered = starts[token]
        for back in range(1, longest):
            covered |= starts[token - back] & (length[token - back] > back)
        return covered

    def _words(self, position: Tensor, sample: Tensor, epoch: int) -> Tensor:
        """Draw the tokens that word dropout masks -> (T,) bool."""
        rate = self.config.word_dropout_rate
        return self._draw(Stream.AUGMENT_WORD, sample, epoch, position) < rate

    def _shuffle(
        self, ids: Tensor, row: Tensor, position: Tensor, sample: Tensor, epoch: int
    ) -> Tensor:
        """Let content tokens change places within windows; special tokens keep theirs -> (T,).

        ids, row, position, sample: (T,), of every token its id, its row, its position in the row
        and the key of its row. A window is `shuffle_window` positions of a row.
        """
        window = self.config.shuffle_window
        if window < 2:
            return ids

        # Give every content token a random key and the window it lies in.
        content = (~torch.isin(ids, self.special_ids.to(ids.device))).nonzero().squeeze(1)
        key = self._draw(Stream.AUGMENT_SHUFFLE, sample[content], epoch, position[content])
        group = row[content] * (int(position.max()) // window + 1) + position[content] // window

        # Sorting by a random key inside each window permutes it uniformly. The second sort is
        # stable, so that it groups by window and keeps the order of the keys.
        by_key = key.argsort(stable=True)
        order = by_key[group[by_key].argsort(stable=True)]
        out = ids.clone()
        out[content] = ids[content[order]]
        return out

    def _draw(self, stream: Stream, sample: Tensor, epoch: int, position: Tensor) -> Tensor:
        return philox.uniform(self.seed, stream, sample, epoch, position)


def span_start_probability(expected_share: float, max_len: int) -> float:
    """Compute how likely a span starts at a token if `expected_share` of all is to be covered.

    A token is uncovered when no span of length 1..max_len (uniform) reaches it: prod over
    d = 0..max_len-1 of (1 - p (max_len - d) / max_len). Solved for p by bisection.
    """
    if expected_share <= 0:
        return 0.0
    # 60 halvings of [0, 1] go below the rounding of fp64.
    low, high = 0.0, 1.0
    for _ in range(60):
        middle = (low + high) / 2
        uncovered = 1.0
        for reach in range(1, max_len + 1):
            uncovered *= 1 - middle * reach / max_len
        low, high = (middle, high) if 1 - uncovered < expected_share else (low, middle)
    return high
