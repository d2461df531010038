"""The Triton word dropout has the bits of the reference in any packing."""

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode

from cdpvae_kernels import word_dropout
from cdpvae_kernels.common import runtime
from support.triton import DEVICE

# A seed whose signed form is negative, and an id that no text holds.
SETTINGS = {"fill_id": 999, "seed": 2**64 - 3, "epoch": 7}


@pytest.fixture(autouse=True)
def small_blocks(monkeypatch):
    """Sequences begin and end inside blocks."""
    config = {"BLOCK": 32, "num_warps": 1, "num_stages": 1}
    monkeypatch.setattr(runtime, "launch_config", lambda name, device: config)


def packed(lengths, dtype=torch.int64):
    ids = torch.arange(sum(lengths), dtype=dtype, device=DEVICE) + 5
    cu_seqlens = torch.tensor([0, *lengths]).cumsum(0).to(DEVICE, torch.int32)
    # Beyond 32 bits, and never the place in the batch.
    sample = torch.arange(len(lengths), device=DEVICE) * (2**40 + 1) + 3
    return ids, cu_seqlens, sample


LENGTHS = [
    pytest.param([70], id="one sequence over several blocks"),
    pytest.param([1, 1, 1], id="first tokens only"),
    pytest.param([0, 5, 0, 0, 40, 3, 0], id="empty ones first, between and last"),
    pytest.param([4] * 33, id="more sequences than a power of two"),
]


@pytest.mark.parametrize("lengths", LENGTHS)
@pytest.mark.parametrize("dtype", [torch.int64, torch.int32])
# 0.9: the threshold passes 2^31; 1.0: it is 2^32 itself.
@pytest.mark.parametrize("rate", [0.4, 0.9, 1.0])
def test_equals_the_reference(lengths, dtype, rate):
    arguments = packed(lengths, dtype)
    got = word_dropout(*arguments, rate=rate, **SETTINGS, impl="triton")
    want = word_dropout(*arguments, rate=rate, **SETTINGS, impl="reference")
    assert got.dtype == dtype and torch.equal(got, want)
    assert rate < 1.0 or int((got != 999).sum()) == sum(n > 0 for n in lengths)


def test_the_same_in_any_packing():
    ids, cu_seqlens, sample = packed([20, 33, 17])
    together = word_dropout(ids, cu_seqlens, sample, rate=0.4, **SETTINGS, impl="triton")
    # Each sequence by itself has the decisions that it had among the others.
    for row, part in enumerate(together.split([20, 33, 17])):
        start, end = cu_seqlens[row], cu_seqlens[row + 1]
        alone = (ids[start:end], torch.stack([start - start, end - start]), sample[row : row + 1])
        assert torch.equal(word_dropout(*alone, rate=0.4, **SETTINGS, impl="triton"), part)
    assert (together == 999).any() and (together != 999).any()


def test_no_tokens_and_strided_ids():
    ids, cu_seqlens, sample = packed([0, 0])
    assert word_dropout(ids, cu_seqlens, sample, rate=0.4, **SETTINGS, impl="triton").shape == (0,)
    ids, cu_seqlens, sample = packed([9, 11])
    # Every second element of a tensor twice as long.
    strided = ids.repeat_interleave(2)[::2]
    got = word_dropout(strided, cu_seqlens, sample, rate=0.4, **SETTINGS, impl="triton")
    assert torch.equal(got, word_dropout(ids, cu_seqlens, sample, rate=0.4, **SETTINGS))


def test_the_operator_propagates_shapes():
    with FakeTensorMode():
        ids, cu_seqlens = torch.empty(9, dtype=torch.int32), torch.empty(3, dtype=torch.int32)
        sample = torch.empty(2, dtype=torch.int64)
        dropped = torch.ops.cdpvae_kernels.word_dropout(ids, cu_seqlens, sample, 1, 2, -3, 4)
        assert dropped.shape == (9,) and dropped.dtype == torch.int32


def test_the_operator_is_what_it_declares():
    """Nothing aliased, nothing written to, real shapes and dtypes those of the fake."""
    ids, cu_seqlens, sample = packed([9, 11])
    arguments = (ids, cu_seqlens, sample, 1 << 31, 2, -3, 4)
    operator = torch.ops.cdpvae_kernels.word_dropout.default
    torch.library.opcheck(operator, arguments, test_utils=("test_schema", "test_faketensor"))
