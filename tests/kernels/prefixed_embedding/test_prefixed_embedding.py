"""The packed decoder input against concatenation written out sequence by sequence."""

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode

from cdpvae_kernels import prefixed_embedding, prefixed_positions, prefixed_rows

V, D = 10, 3
LENGTHS = [4, 0, 1, 3]  # an empty sequence in between


def problem(num_prompts, dtype=torch.float64):
    draw = torch.Generator().manual_seed(0)
    embedding = torch.randn(V, D, dtype=torch.float64, generator=draw).to(dtype)
    prompts = torch.randn(len(LENGTHS), num_prompts, D, dtype=torch.float64, generator=draw).to(
        dtype
    )
    # A repeated id, so that its embedding collects more than one gradient.
    ids = torch.tensor([7, 1, 7, 0, 9, 2, 7, 3])
    cu_seqlens = torch.tensor([0, *LENGTHS]).cumsum(0).to(torch.int32)
    return embedding.requires_grad_(), ids, cu_seqlens, prompts.requires_grad_()


def written_out(embedding, ids, cu_seqlens, prompts):
    parts = []
    for sequence, (start, end) in enumerate(zip(cu_seqlens[:-1], cu_seqlens[1:], strict=True)):
        parts += [prompts[sequence], embedding[ids[start:end]]]
    return torch.cat(parts)


@pytest.mark.parametrize("num_prompts", [0, 1, 5])
def test_equals_concatenation_with_gradients(num_prompts):
    arguments = problem(num_prompts)
    packed, packed_cu = prefixed_embedding(*arguments)
    expected = written_out(*arguments)
    assert torch.equal(packed, expected)
    assert packed_cu.dtype == torch.int32
    # Every sequence has grown by its prompts.
    ends = [sum(LENGTHS[:n]) + n * num_prompts for n in range(len(LENGTHS) + 1)]
    assert packed_cu.tolist() == ends

    # Random upstream gradients, so that a misplaced one is seen.
    upstream = torch.randn_like(packed)
    leaves = (arguments[0], arguments[3])
    got = torch.autograd.grad(packed, leaves, upstream)
    for ours, theirs in zip(got, torch.autograd.grad(expected, leaves, upstream), strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-14, atol=1e-15)


def test_gradcheck():
    embedding, ids, cu_seqlens, prompts = problem(2)
    assert torch.autograd.gradcheck(
        lambda e, p: prefixed_embedding(e, ids, cu_seqlens, p)[0], (embedding, prompts)
    )


def test_a_frozen_embedding_gets_no_gradient():
    embedding, ids, cu_seqlens, prompts = problem(2, torch.bfloat16)
    # As in training: the embedding is frozen, ids may be int32.
    embedding.requires_grad_(False)
    packed, _ = prefixed_embedding(embedding, ids.int(), cu_seqlens, prompts)
    assert packed.dtype == torch.bfloat16
    packed.sum().backward()
    assert embedding.grad is None
    assert torch.equal(prompts.grad, torch.ones_like(prompts))


@pytest.mark.parametrize("num_prompts", [0, 1, 5])
def test_prefixed_positions_find_the_tokens(num_prompts):
    embedding, ids, cu_seqlens, prompts = problem(num_prompts)
    packed, _ = prefixed_embedding(embedding, ids, cu_seqlens, prompts)
    # Out of order and repeated, the first and the last position among them.
    positions = torch.tensor([7, 0, 4, 3, 3, 5])
    moved = prefixed_positions(positions, cu_seqlens, num_prompts)
    assert moved.dtype == torch.int64
    assert torch.equal(packed[moved], embedding[ids[positions]])


def test_prefixed_rows_the_former_name_is_accepted_with_a_notice():
    _, _, cu_seqlens, _ = problem(2)
    every = torch.arange(int(cu_seqlens[-1]))
    with pytest.warns(DeprecationWarning, match="prefixed_rows is now called prefixed_pos") as seen:
        moved = prefixed_rows(rows=every, cu_seqlens=cu_seqlens, num_prompts=2)
    assert torch.equal(moved, prefixed_positions(every, cu_seqlens, 2))
    assert [notice.filename for notice in seen] == [__file__]


def test_no_sequences():
    ids, cu_seqlens = torch.zeros(0, dtype=torch.int64), torch.zeros(1, dtype=torch.int32)
    packed, packed_cu = prefixed_embedding(torch.ones(V, D), ids, cu_seqlens, torch.ones(0, 4, D))
    assert packed.shape == (0, D) and packed_cu.tolist() == [0]
    assert prefixed_positions(ids, cu_seqlens, 4).shape == (0,)


def test_shapes_propagate_without_data():
    with FakeTensorMode():
        prompts = torch.empty(2, 4, D, requires_grad=True)
        ids, cu_seqlens = torch.empty(9, dtype=torch.int64), torch.empty(3, dtype=torch.int32)
        packed, packed_cu = prefixed_embedding(torch.empty(V, D), ids, cu_seqlens, prompts)
        packed.sum().backward()
        assert packed.shape == (17, D) and packed_cu.shape == (3,)
        assert prompts.grad.shape == (2, 4, D)
        assert prefixed_positions(ids, cu_seqlens, 4).shape == (9,)


def test_wrong_arguments_are_refused():
    embedding, ids, cu_seqlens, prompts = problem(2)
    good = {"embedding": embedding, "ids": ids, "cu_seqlens": cu_seqlens, "prompts": prompts}

    def refused(message, **changes):
        with pytest.raises(ValueError, match=message):
            prefixed_embedding(**(good | changes))

    # Operands and ids.
    refused(r"embedding has shape \(3,\)", embedding=torch.zeros(3))
    refused(r"ids holds 10; .*\[0, 10\)", ids=ids + 1)
    refused(r"cu_seqlens has dtype torch.int64", cu_seqlens=cu_seqlens.long())
    refused(r"prompts has shape \(3, 2, 3\); it must be \(4, P, 3\)", prompts=prompts[:3])
    refused(r"prompts has dtype torch.float32; .*float64", prompts=prompts.float())
    # Implementations that there are not, or that cannot.
    refused(r"impl='cuda': prefixed_embedding has .*'reference', 'triton'", impl="cuda")
    refused(r"impl='triton': prefixed_embedding computes in torch.float64", impl="triton")
    with pytest.raises(ValueError, match=r"num_prompts=-1"):
        prefixed_positions(ids, cu_seqlens, -1)
    with pytest.raises(ValueError, match=r"positions holds 8; .*\[0, 8\)"):
        prefixed_positions(torch.tensor([8]), cu_seqlens, 2)
    with pytest.raises(ValueError, match=r"cu_seqlens is empty"):
        prefixed_positions(ids, cu_seqlens[:0], 2)
