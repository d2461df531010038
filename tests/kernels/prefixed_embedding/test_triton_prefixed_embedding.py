"""The Triton gather against the reference: copies, so equality is exact."""

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode

from cdpvae_kernels import prefixed_embedding
from cdpvae_kernels.common import runtime
from support.triton import DEVICE, DTYPES, poisoned  # noqa: F401

pytestmark = pytest.mark.usefixtures("poisoned")
V, D = 23, 20  # no multiple of the block below


@pytest.fixture(autouse=True)
def small_blocks(monkeypatch):
    # Blocks that sequences begin and end inside, and a ragged second block of the width.
    config = {"BLOCK_R": 4, "BLOCK_D": 16, "num_warps": 1, "num_stages": 1}
    monkeypatch.setattr(runtime, "launch_config", lambda name, device: config)


def problem(lengths, num_prompts, dtype=torch.float32, ids_dtype=torch.int64):
    draw = torch.Generator().manual_seed(0)
    embedding = torch.randn(V, D, generator=draw).to(DEVICE, dtype)
    prompts = torch.randn(len(lengths), num_prompts, D, generator=draw).to(DEVICE, dtype)
    ids = torch.randint(0, V, (sum(lengths),), generator=draw).to(DEVICE, ids_dtype)
    cu_seqlens = torch.tensor([0, *lengths]).cumsum(0).to(DEVICE, torch.int32)
    return embedding.requires_grad_(), ids, cu_seqlens, prompts.requires_grad_()


def assert_equals_the_reference(arguments):
    embedding, _, _, prompts = arguments
    got, cu = prefixed_embedding(*arguments, impl="triton")
    want, want_cu = prefixed_embedding(*arguments, impl="reference")
    assert torch.equal(got, want)
    assert cu.dtype == torch.int32 and torch.equal(cu, want_cu)
    upstream = torch.randn(want.shape, generator=torch.Generator().manual_seed(1))
    upstream = upstream.to(want)
    of_embedding, of_prompts = torch.autograd.grad(got, (embedding, prompts), upstream)
    want_embedding, want_prompts = torch.autograd.grad(want, (embedding, prompts), upstream)
    assert torch.equal(of_prompts, want_prompts)
    # A sum over the places of an id, whose order may differ.
    spacing = torch.finfo(embedding.dtype).eps
    torch.testing.assert_close(of_embedding, want_embedding, rtol=8 * spacing, atol=8 * spacing)


CASES = [
    pytest.param([5, 0, 1, 9], 3, id="an empty sequence"),
    pytest.param([7], 4, id="one sequence"),
    pytest.param([4, 6], 0, id="no prompts"),
    pytest.param([0, 0, 0], 5, id="no tokens"),
    pytest.param([3] * 17, 1, id="more sequences than a power of two"),
]


@pytest.mark.parametrize("lengths, num_prompts", CASES)
@pytest.mark.parametrize("dtype", DTYPES)
def test_equals_the_reference_with_gradients(lengths, num_prompts, dtype):
    assert_equals_the_reference(problem(lengths, num_prompts, dtype))


def test_int32_ids_and_strided_arguments():
    embedding, ids, cu_seqlens, prompts = problem([5, 2], 3, ids_dtype=torch.int32)
    # Every second column of a wider embedding, and prompts whose batch is not the first stride.
    wide = torch.randn(V, 2 * D, generator=torch.Generator().manual_seed(2)).to(DEVICE)
    strided = wide[:, ::2].requires_grad_()
    turned = prompts.detach().transpose(0, 1).contiguous().transpose(0, 1).requires_grad_()
    assert_equals_the_reference((strided, ids, cu_seqlens, turned))


def test_nothing_at_all():
    arguments = problem([], 4)
    packed, cu = prefixed_embedding(*arguments, impl="triton")
    packed.sum().backward()
    assert packed.shape == (0, D) and cu.tolist() == [0]
    assert arguments[3].grad.shape == (0, 4, D)


def test_an_expanded_gradient_and_a_frozen_embedding():
    embedding, ids, cu_seqlens, prompts = problem([5, 2], 3)
    # The gradient of a sum is one number expanded: its strides are 0.
    frozen = embedding.detach()
    packed, _ = prefixed_embedding(frozen, ids, cu_seqlens, prompts, impl="triton")
    packed.sum().backward()
    assert torch.equal(prompts.grad, torch.ones_like(prompts))


def test_a_second_derivative_is_refused():
    embedding, ids, cu_seqlens, prompts = problem([5, 2], 3)
    packed, _ = prefixed_embedding(embedding, ids, cu_seqlens, prompts, impl="triton")
    (grad,) = torch.autograd.grad(packed.square().sum(), prompts, create_graph=True)
    with pytest.raises(RuntimeError, match="prefixed_embedding_backward"):
        torch.autograd.grad(grad.sum(), prompts)


@pytest.mark.parametrize("want_embedding", [False, True])
def test_the_operators_propagate_shapes(want_embedding):
    with FakeTensorMode():
        embedding = torch.empty(V, D).requires_grad_(want_embedding)
        prompts = torch.empty(2, 4, D).requires_grad_()
        ids, cu_seqlens = torch.empty(9, dtype=torch.int64), torch.empty(3, dtype=torch.int32)
        packed = torch.ops.cdpvae_kernels.prefixed_embedding(embedding, ids, cu_seqlens, prompts)
        packed.sum().backward()
        assert packed.shape == (17, D) and prompts.grad.shape == (2, 4, D)
        assert (embedding.grad is not None) == want_embedding


@pytest.mark.skipif(DEVICE.type == "cuda", reason="a GPU computes in bf16")
def test_bf16_is_refused_under_the_interpreter():
    with pytest.raises(ValueError, match="prefixed_embedding in bfloat16 under TRITON_INTERPRET"):
        prefixed_embedding(*problem([3], 2, torch.bfloat16), impl="triton")


def test_the_operator_is_what_it_declares():
    """Nothing aliased, nothing written to, real shapes and dtypes those of the fake."""
    arguments = problem([5, 0, 2], 3)
    operator = torch.ops.cdpvae_kernels.prefixed_embedding.default
    torch.library.opcheck(operator, arguments, test_utils=("test_schema", "test_faketensor"))
