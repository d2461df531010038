"""The second view: what is masked how often, what never is, and that packing changes nothing.

Legend: B rows, L padded length, T packed tokens.
"""

import math

import pytest
import torch

from cdpvae.batch import PackedText
from cdpvae.compatibility.padding import TextAugmenter
from cdpvae.config import AugmentationConfig
from cdpvae.data.augmentation import span_start_probability

BOS, EOS, PAD, UNK = 1, 2, 3, 4
SPECIAL = (BOS, EOS, PAD, UNK)


def augmenter(fill_id=UNK, seed=0, **config):
    settings = {"span_mask_prob": 0.0, "word_dropout_rate": 0.0, **config}
    return TextAugmenter(
        AugmentationConfig(**settings), fill_id=fill_id, pad_id=PAD, special_ids=SPECIAL, seed=seed
    )


def rows_of(lengths, seed=0):
    """BOS and then content ids 10 ... 99."""
    generator = torch.Generator().manual_seed(seed)
    return [
        [BOS, *torch.randint(10, 100, (length - 1,), generator=generator).tolist()]
        for length in lengths
    ]


def padded(rows, left=False):
    length = max(map(len, rows))
    ids, mask = [], []
    for row in rows:
        pad, one = [PAD] * (length - len(row)), [1] * len(row)
        ids.append(pad + row if left else row + pad)
        mask.append([0] * len(pad) + one if left else one + [0] * len(pad))
    return torch.tensor(ids), torch.tensor(mask)


EVERYTHING = {"span_mask_prob": 0.3, "word_dropout_rate": 0.2, "shuffle_window": 3}


# The share itself, and that overlapping spans are accounted for: at 0.6 ignoring them gives 0.45.
@pytest.mark.parametrize("share", [0.15, 0.6])
@pytest.mark.parametrize("max_len", [1, 5])
def test_share_of_tokens_in_masked_spans(share, max_len):
    rows, length = 200, 1000
    text = PackedText.from_lists([[50] * length] * rows)
    view = augmenter(span_mask_prob=share, span_max_len=max_len).view(text, torch.arange(rows), 0)
    masked = (view.ids == UNK).view(rows, length).double()
    # Five standard errors between rows.
    per_row = masked.mean(1)
    assert abs(per_row.mean() - share) < 5 * per_row.std() / math.sqrt(rows)


# The shortest instruction kept by default, and one shorter than a span.
@pytest.mark.parametrize("length", [10, 3])
def test_every_place_of_a_short_row_is_masked_equally_often(length):
    rows = 20_000
    text = PackedText.from_lists([[50] * length] * rows)
    made = augmenter(span_mask_prob=0.15, span_max_len=5)
    masked = (made.view(text, torch.arange(rows), 0).ids == UNK).view(rows, length).double()
    # The first token of a row that was masked whole is kept; the others stand for themselves.
    error = 5 * math.sqrt(0.15 * 0.85 / rows)
    assert ((masked.mean(0)[1:] - 0.15).abs() < error).all()
    rescued = (masked[:, 1:].sum(1) == length - 1).double().mean()
    assert abs(masked.mean(0)[0] + rescued - 0.15) < error + rescued


def test_span_start_probability_solves_its_equation():
    """max_len 1 is Bernoulli; max_len 2: 1 - (1 - p)(1 - p/2) = 0.5 gives p = (3 - sqrt 5)/2."""
    assert span_start_probability(0.15, 1) == pytest.approx(0.15, rel=1e-12)
    assert span_start_probability(0.5, 2) == pytest.approx((3 - math.sqrt(5)) / 2, rel=1e-12)
    assert span_start_probability(0.0, 5) == 0.0
    assert span_start_probability(1.0, 5) == pytest.approx(1.0, rel=1e-12)


def test_span_lengths_are_uniform():
    """Rare spans, so that nearly none touch: runs of 1 ... 4 occur equally often."""
    rows, length = 100, 2000
    text = PackedText.from_lists([[50] * length] * rows)
    view = augmenter(span_mask_prob=0.01, span_max_len=4).view(text, torch.arange(rows), 0)
    masked = (view.ids == UNK).view(rows, length).int()
    edges = torch.nn.functional.pad(masked, (1, 1)).diff(dim=1)
    starts, ends = (edges == 1).nonzero()[:, 1], (edges == -1).nonzero()[:, 1]
    counts = torch.bincount(ends - starts, minlength=5)[1:5].double()
    expected = counts.sum() / 4
    # About 200 of each; five standard deviations, and a margin of 2 % for spans that touch.
    assert ((counts - expected).abs() < 5 * expected.sqrt() + 0.02 * counts.sum()).all()


def test_share_of_dropped_words():
    rows, length = 100, 1000
    text = PackedText.from_lists([[50] * length] * rows)
    view = augmenter(word_dropout_rate=0.1).view(text, torch.arange(rows), 0)
    share = (view.ids == UNK).double().mean()
    assert abs(share - 0.1) < 5 * math.sqrt(0.1 * 0.9 / (rows * length))


def test_everything_off_changes_nothing():
    text = PackedText.from_lists(rows_of([5, 9, 1]))
    for fill in (UNK, None):
        view = augmenter(fill).view(text, torch.arange(3), 0)
        assert torch.equal(view.ids, text.ids) and torch.equal(view.cu_seqlens, text.cu_seqlens)


@pytest.mark.parametrize("fill_id", [UNK, None])
@pytest.mark.parametrize("left", [False, True])
def test_padded_and_packed_views_are_the_same(fill_id, left):
    rows = rows_of([12, 3, 30, 1, 7])
    ids, mask = padded(rows, left)
    index = torch.tensor([40, 7, 2**40, 0, 13])
    made = augmenter(fill_id, **EVERYTHING)
    aug_ids, aug_mask = made.augment(ids, mask, index, epoch=3)
    view = made.view(PackedText.from_lists(rows), index, 3)
    expected = PackedText.from_padded(aug_ids, aug_mask)
    assert torch.equal(view.ids, expected.ids)
    assert torch.equal(view.cu_seqlens, expected.cu_seqlens)
    assert view.max_len == expected.max_len
    assert not torch.equal(view.ids, PackedText.from_lists(rows).ids)


@pytest.mark.parametrize("fill_id", [UNK, None])
def test_a_row_is_the_same_alone_and_in_any_company(fill_id):
    """Split over micro-batches or ranks, in another order: each sample's view keeps its bits."""
    rows = rows_of([12, 3, 30, 20, 7])
    index = torch.tensor([4, 9, 11, 0, 2**33])
    made = augmenter(fill_id, **EVERYTHING)
    together = made.view(PackedText.from_lists(rows), index, 1).rows()
    order = [3, 0, 4, 2, 1]
    shuffled = made.view(PackedText.from_lists([rows[i] for i in order]), index[order], 1).rows()
    for place, row in enumerate(order):
        alone = made.view(PackedText.from_lists([rows[row]]), index[row : row + 1], 1)
        assert torch.equal(alone.ids, together[row])
        assert torch.equal(shuffled[place], together[row])


def test_seed_sample_and_epoch_each_change_the_view():
    text = PackedText.from_lists(rows_of([200]))

    def view(seed=0, sample=0, epoch=0):
        return augmenter(seed=seed, **EVERYTHING).view(text, torch.tensor([sample]), epoch).ids

    assert torch.equal(view(), view())
    for changed in ({"seed": 1}, {"sample": 1}, {"epoch": 1}):
        assert not torch.equal(view(), view(**changed)), changed


@pytest.mark.parametrize("fill_id", [UNK, None])
def test_special_tokens_survive_in_their_order_and_place(fill_id):
    """Everything is masked and shuffled: what is left are the special tokens."""
    row = [BOS, 20, 21, EOS, 22, PAD, 23, 24, EOS]
    ids, mask = torch.tensor([row]), torch.ones(1, len(row), dtype=torch.int64)
    made = augmenter(fill_id, span_mask_prob=1.0, shuffle_window=9)
    out, out_mask = made.augment(ids, mask)
    special = torch.isin(ids, torch.tensor(SPECIAL))
    assert torch.equal(out[special], ids[special])
    fill = PAD if fill_id is None else UNK
    assert (out[~special] == fill).all()
    expected = special if fill_id is None else torch.ones_like(special)
    assert torch.equal(out_mask.bool(), expected)


def test_shuffle_permutes_content_within_its_window():
    """Windows of 3 from the start of the row; EOS at place 4 stays, 13 and 15 may change places."""
    row = [BOS, 11, 12, 13, EOS, 15, 16, 17]
    text = PackedText.from_lists([row] * 300)
    view = augmenter(shuffle_window=3).view(text, torch.arange(300), 0)
    out = view.ids.view(300, 8)
    assert (out[:, 0] == BOS).all() and (out[:, 4] == EOS).all()
    assert torch.equal(view.cu_seqlens, text.cu_seqlens)
    for window in ([1, 2], [3, 5], [6, 7]):
        original = torch.tensor([row[i] for i in window])
        found = out[:, window]
        assert torch.equal(found.sort(1).values, original.expand(300, -1))
        kept = (found == original).all(1).double().mean()
        # One of two orders, each half of the time; five standard errors.
        assert abs(kept - 0.5) < 5 * math.sqrt(0.25 / 300)


def test_shuffle_reaches_every_order_equally():
    text = PackedText.from_lists([[11, 12, 13]] * 3000)
    out = augmenter(shuffle_window=3).view(text, torch.arange(3000), 0).ids.view(-1, 3)
    orders, counts = out.unique(dim=0, return_counts=True)
    assert len(orders) == 6
    assert ((counts - 500).abs() < 5 * math.sqrt(3000 / 6 * 5 / 6)).all()


@pytest.mark.parametrize("fill_id", [UNK, None])
def test_no_row_is_emptied(fill_id):
    """A row without special token keeps its first; a row of BOS alone stays; BOS is enough."""
    rows = [[20, 21, 22], [BOS], [BOS, 23, 24]]
    view = augmenter(fill_id, span_mask_prob=1.0).view(
        PackedText.from_lists(rows), torch.arange(3), 0
    )
    kept = [[token for token in row.tolist() if token != UNK] for row in view.rows()]
    assert kept == [[20], [BOS], [BOS]]
    assert view.max_len == (3 if fill_id else 1)


def test_input_is_not_changed():
    ids, mask = padded(rows_of([12, 5]))
    before = ids.clone(), mask.clone()
    for fill in (UNK, None):
        augmenter(fill, **EVERYTHING).augment(ids, mask)
        text = PackedText.from_padded(ids, mask)
        packed = text.ids.clone()
        augmenter(fill, **EVERYTHING).view(text, torch.arange(2), 0)
        assert torch.equal(text.ids, packed)
    assert torch.equal(ids, before[0]) and torch.equal(mask, before[1])


def test_without_unk_masked_positions_are_pad_and_unattended():
    ids, mask = padded(rows_of([40, 25]))
    out, out_mask = augmenter(None, word_dropout_rate=0.5).augment(ids, mask)
    gone = mask.bool() & ~out_mask.bool()
    assert 10 < gone.sum() < 50
    assert (out[gone] == PAD).all()
    assert torch.equal(out[out_mask.bool()], ids[out_mask.bool()])
    assert not out_mask[~mask.bool()].any()


def test_the_descriptions_snippet():
    """Two settings, nothing else: pad is 0, and masked tokens lose their attention."""
    made = TextAugmenter(AugmentationConfig(span_mask_prob=0.15, word_dropout_rate=0.1))
    input_ids = torch.randint(5, 90, (8, 60), generator=torch.Generator().manual_seed(0))
    attention_mask = torch.ones_like(input_ids)
    attention_mask[:, 50:] = 0
    aug_ids, aug_mask = made.augment(input_ids, attention_mask)
    masked = attention_mask.bool() & ~aug_mask.bool()
    # 1 - 0.85 * 0.9 = 0.235 of 400 tokens; spans correlate, so a wide margin.
    assert 0.1 < masked[:, :50].double().mean() < 0.4
    assert (aug_ids[masked] == 0).all()
    assert torch.equal(aug_ids[~masked], input_ids[~masked])


def test_a_row_without_tokens_is_refused():
    with pytest.raises(ValueError, match="at least one token"):
        augmenter().augment(torch.full((1, 3), PAD), torch.zeros(1, 3, dtype=torch.int64))
