"""Word dropout: the decision per token, its rate, and its independence of the packing."""

import math

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode

from cdpvae_kernels import Stream, philox, word_dropout

FILL = 999
SETTINGS = {"rate": 0.4, "fill_id": FILL, "seed": 7, "epoch": 2}


def samples():
    """Sample index -> ids; lengths 0 and 1 included, indices beyond 32 bits too."""
    lengths = {5: 17, 2**40: 1, 3: 0, 12: 64, 2**62: 33}
    return {index: torch.arange(n) + 100 for index, n in lengths.items()}


def drop(order, **changes):
    """Pack the samples in `order`, drop words, and give back {sample: ids}."""
    # Other neighbours for every order: only a sample's own draws may decide.
    texts = samples()
    ids = torch.cat([texts[index] for index in order])
    lengths = [len(texts[index]) for index in order]
    cu_seqlens = torch.tensor([0, *lengths]).cumsum(0).to(torch.int32)
    dropped = word_dropout(ids, cu_seqlens, torch.tensor(order), **(SETTINGS | changes))
    return dict(zip(order, dropped.split(lengths), strict=True))


def test_the_decision_is_philox_below_the_threshold():
    dropped = drop(list(samples()))
    for index, ids in samples().items():
        for position, token in enumerate(ids.tolist()):
            # The definition, token by token.
            word = int(philox.bits(7, Stream.WORD_DROPOUT, index, 2, position))
            gone = position > 0 and word < math.floor(0.4 * 2**32)
            assert int(dropped[index][position]) == (FILL if gone else token)


def test_the_same_in_any_packing_and_order():
    order = list(samples())
    together = drop(order)
    backwards = drop(order[::-1])
    for index in order:
        assert torch.equal(together[index], backwards[index])
        assert torch.equal(together[index], drop([index])[index])


def test_rate_zero_returns_the_ids_and_rate_one_keeps_only_the_first():
    ids = torch.arange(6)
    cu_seqlens, sample = torch.tensor([0, 2, 6], dtype=torch.int32), torch.tensor([0, 1])
    assert word_dropout(ids, cu_seqlens, sample, **SETTINGS | {"rate": 0.0}) is ids
    dropped = word_dropout(ids, cu_seqlens, sample, **SETTINGS | {"rate": 1.0})
    assert dropped.tolist() == [0, FILL, 2, FILL, FILL, FILL]
    # The ids themselves are untouched.
    assert ids.tolist() == [0, 1, 2, 3, 4, 5]


@pytest.mark.parametrize("rate", [0.1, 0.4, 0.9])
def test_the_expected_share_is_dropped(rate):
    length, batch = 1001, 40
    cu_seqlens = (torch.arange(batch + 1) * length).to(torch.int32)
    ids = torch.zeros(batch * length, dtype=torch.int32)
    settings = SETTINGS | {"rate": rate}
    dropped = word_dropout(ids, cu_seqlens, torch.arange(batch), **settings)
    assert dropped.dtype == torch.int32
    share = (dropped.view(batch, length)[:, 1:] == FILL).double().mean()
    # Five standard errors of 40,000 draws.
    assert abs(share - rate) < 5 * math.sqrt(rate * (1 - rate) / (batch * (length - 1)))


@pytest.mark.parametrize("changes", [{"seed": 8}, {"epoch": 3}])
def test_seed_and_epoch_change_the_decision(changes):
    order = list(samples())
    assert not torch.equal(drop(order)[12], drop(order, **changes)[12])


def test_more_is_dropped_at_a_higher_rate_never_other_tokens():
    # One draw a token: a higher rate drops all that a lower one does.
    low, high = drop([12], rate=0.2)[12] == FILL, drop([12], rate=0.6)[12] == FILL
    assert low.any() and (high & ~low).any() and not (low & ~high).any()


def test_shapes_propagate_without_data():
    with FakeTensorMode():
        ids = torch.empty(9, dtype=torch.int64)
        cu_seqlens = torch.empty(3, dtype=torch.int32)
        sample = torch.empty(2, dtype=torch.int64)
        assert word_dropout(ids, cu_seqlens, sample, **SETTINGS).shape == (9,)


def test_wrong_arguments_are_refused():
    cu_seqlens = torch.tensor([0, 2, 6], dtype=torch.int32)
    good = {"ids": torch.arange(6), "cu_seqlens": cu_seqlens, "sample_index": torch.tensor([0, 1])}

    def refused(message, **changes):
        with pytest.raises(ValueError, match=message):
            word_dropout(**(good | SETTINGS | changes))

    # Settings.
    refused(r"rate=1.5; it must lie in \[0, 1\]", rate=1.5)
    refused(r"rate=-0.1", rate=-0.1)
    refused(r"rate=nan", rate=float("nan"))
    refused(r"fill_id=-1", fill_id=-1)
    # Tensors.
    refused(r"ids has shape \(1, 6\)", ids=torch.arange(6)[None])
    refused(r"cu_seqlens runs from 0 to 6; .* 5", ids=torch.arange(5))
    refused(r"sample_index has shape \(1,\); it must be \(2\)", sample_index=torch.tensor([0]))
    refused(r"sample_index has dtype torch.float32", sample_index=torch.zeros(2))
    refused(r"sample_index holds -1", sample_index=torch.tensor([0, -1]))
    refused(r"epoch=-1", epoch=-1)
    refused(r"seed=-1", seed=-1)
    refused(r"impl='cuda': word_dropout has .*'reference', 'triton'", impl="cuda")
