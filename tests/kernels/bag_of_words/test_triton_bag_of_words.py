"""The Triton bag-of-words losses against dense formulas in fp64, block by block.

Blocks are made small, so that programs take several blocks and the last one is ragged.
"""

import pytest
import torch
import torch.nn.functional as F
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode

from cdpvae_kernels import bow_bce, bow_categorical
from cdpvae_kernels.bag_of_words import triton_launch as kernels
from cdpvae_kernels.common import runtime
from support.triton import DEVICE, DTYPES, minima_of_a_gpu, poisoned  # noqa: F401

pytestmark = pytest.mark.usefixtures("poisoned")
# Two blocks of 64 and a ragged third.
V = 150
HALF = torch.float16


@pytest.fixture(autouse=True)
def small_blocks(monkeypatch):
    """Three blocks of the vocabulary for two programs, several blocks of tokens."""
    small = {"BLOCK_V": 64, "PROGRAMS": 2, "BLOCK_T": 32}
    shipped = runtime.launch_config

    def config(name, device):
        entry = shipped(name, device)
        return {key: min(value, small.get(key, value)) for key, value in entry.items()}

    monkeypatch.setattr(runtime, "launch_config", config)


def pack(rows):
    lengths = torch.tensor([0] + [len(row) for row in rows])
    ids = torch.tensor([token for row in rows for token in row], dtype=torch.int64)
    return ids.to(DEVICE), lengths.cumsum(0).to(DEVICE, torch.int32)


def texts(batch, draw):
    """Rows of some ids, fewer in many; repeats, empty rows and the vocabulary's ends among them."""
    longest = 8 if batch < 64 else 1
    lengths = torch.randint(0, longest + 1, (batch,), generator=draw).tolist()
    rows = [torch.randint(0, V, (n,), generator=draw).tolist() for n in lengths]
    rows[0] = [3, V - 1, 3, 3, 0, 7] * 7  # longer than a block of tokens
    if batch > 2:
        rows[1], rows[-1] = [], []
    return rows


def problem(batch, width, z_dtype=torch.float32, head_dtype=torch.float32, scale=1.0):
    # Other data for each size, the same in every run.
    draw = torch.Generator().manual_seed(batch + width)
    z = torch.randn(batch, width, generator=draw)
    weight = torch.randn(V, width, generator=draw) * (scale * width**-0.5)
    bias = torch.randn(V, generator=draw) - 1.0
    head = [x.to(DEVICE, head_dtype).requires_grad_() for x in (weight, bias)]
    return [z.to(DEVICE, z_dtype).requires_grad_(), *head], texts(batch, draw)


def dense_bce(logits, rows):
    present = torch.zeros_like(logits)
    for row, tokens in enumerate(rows):
        present[row, tokens] = 1.0
    return F.binary_cross_entropy_with_logits(logits, present)


def dense_categorical(logits, rows):
    log_p = logits.log_softmax(-1)
    bags = [log_p[row, tokens].mean() for row, tokens in enumerate(rows) if tokens]
    return -torch.stack(bags).sum() / len(rows) if bags else log_p.sum() * 0.0


LOSSES = {"bce": (bow_bce, dense_bce), "categorical": (bow_categorical, dense_categorical)}
each_loss = pytest.mark.parametrize("name", LOSSES)


def gradients(loss, operands, upstream):
    return loss.detach(), *torch.autograd.grad(loss * upstream, operands)


def computed(name, operands, rows, upstream=1.0, **settings):
    loss = LOSSES[name][0](*operands, *pack(rows), impl="triton", **settings)
    return gradients(loss, operands, upstream)


def dense(name, operands, rows, upstream, dtype):
    """The formula with operands converted to `dtype`; its logits are fp32 at least."""
    copies = [x.detach().to(dtype).requires_grad_() for x in operands]
    # Half precisions stay what they are up to the logits, as in a model.
    logits = F.linear(*copies)
    logits = logits if dtype == torch.float64 else logits.float()
    return gradients(LOSSES[name][1](logits, rows), copies, upstream)


def assert_as_good_as_torch(name, operands, rows, upstream=-2.5):
    """Every output's error is at most twice that of plain torch in the widest operand's dtype."""
    got = computed(name, operands, rows, upstream)
    truth = dense(name, operands, rows, upstream, torch.float64)
    # Plain torch computes in the widest dtype that it is given.
    widest = torch.promote_types(operands[0].dtype, operands[1].dtype)
    plain = dense(name, operands, rows, upstream, widest)
    names = ("loss", "d z", "d weight", "d bias")
    for what, ours, other, exact in zip(names, got, plain, truth, strict=True):
        allowed = 2 * (other.double() - exact).norm()
        allowed += 4 * torch.finfo(ours.dtype).eps * exact.norm()
        error = (ours.double() - exact).norm()
        assert error <= allowed, f"{what}: error {error:.3g}, allowed {allowed:.3g}"


# Both configurations, few and many rows, and a z below and at the width they are made for.
SIZES = [
    pytest.param(1, 5, id="one row, a z narrower than a block"),
    pytest.param(7, 64, id="few rows, the usual z"),
    pytest.param(64, 5, id="many rows"),
    pytest.param(256, 64, id="many rows in several turns"),
]


@each_loss
@pytest.mark.parametrize("batch, width", SIZES)
@pytest.mark.parametrize("dtype", DTYPES)
def test_error_is_at_most_twice_that_of_plain_torch(name, batch, width, dtype):
    operands, rows = problem(batch, width, dtype, dtype)
    assert_as_good_as_torch(name, operands, rows)


@each_loss
def test_an_fp32_z_and_a_half_precision_head_are_computed_in_fp32(name):
    """The three parts of z and of the errors lose nothing: only the head's gradient is rounded."""
    operands, rows = problem(7, 20, torch.float32, HALF)
    assert_as_good_as_torch(name, operands, rows)
    assert [g.dtype for g in computed(name, operands, rows)[1:]] == [torch.float32, HALF, HALF]


@each_loss
def test_half_precision_logits_are_not_rounded(name):
    operands, rows = problem(7, 20, HALF, HALF, scale=8.0)
    loss = computed(name, operands, rows)[0]
    exact = dense(name, operands, rows, 1.0, torch.float64)[0]
    assert loss.dtype == torch.float32
    torch.testing.assert_close(loss.double(), exact, rtol=1e-6, atol=0)


# e^-15 = 3e-7 is where 1 - sigmoid cancels in fp32; 60 is far below any rounding.
@pytest.mark.parametrize("margin", [15.0, 60.0])
@pytest.mark.parametrize("sign", [1.0, -1.0], ids=["right", "wrong"])
def test_confident_logits_keep_relative_precision(margin, sign):
    rows = [[0, 2, 4], [1]]
    present = torch.zeros(2, 6, device=DEVICE)
    for row, tokens in enumerate(rows):
        present[row, tokens] = 1.0
    z = torch.eye(2, device=DEVICE).requires_grad_()
    weight = (sign * margin * (2.0 * present - 1.0)).T.contiguous().requires_grad_()
    bias = torch.zeros(6, device=DEVICE).requires_grad_()
    got = computed("bce", [z, weight, bias], rows)
    # BCE as softplus of the logit with its sign turned by the target: exact on both sides.
    wrong_side = (1.0 - 2.0 * present.double()) * weight.double().T.detach()
    loss = F.softplus(wrong_side, threshold=1e9).mean()
    error = (1.0 - 2.0 * present.double()) * torch.sigmoid(wrong_side) / 12
    # The exponent of e^-60 is rounded to fp32: 60 x 2^-24, and some operations more.
    tolerance = {"rtol": 6e-6, "atol": 0.0}
    torch.testing.assert_close(got[0].double(), loss, **tolerance)
    torch.testing.assert_close(got[2].double(), error.T.contiguous(), **tolerance)


# z in the head's precision: errors are stored in it; z in fp32: they are multiplied in its parts.
@pytest.mark.parametrize("z_dtype", [HALF, torch.float32])
def test_errors_too_small_for_fp16_are_kept(z_dtype):
    """sigmoid(-16) = 1e-7 is two of fp16's smallest steps."""
    (z, weight, bias), _ = problem(4, 5, z_dtype, HALF)
    operands, rows = [z, weight, (bias.detach() * 0 - 16.0).requires_grad_()], [[]] * 4
    got = computed("bce", operands, rows, upstream=2.0**17, reduction="sum")
    exact = dense("bce", operands, rows, 2.0**17 * 4 * V, torch.float64)
    for ours, want in zip(got[1:], exact[1:], strict=True):
        assert (ours.double() - want).norm() <= 4 * torch.finfo(ours.dtype).eps * want.norm()


@pytest.mark.usefixtures("minima_of_a_gpu")
@pytest.mark.filterwarnings("ignore:All-NaN")  # the interpreter's largest of a row of NaN
@each_loss
@pytest.mark.parametrize("bad", [0, 1], ids=["z", "weight"])
def test_nan_stays_nan(name, bad):
    operands, rows = problem(4, 5)
    with torch.no_grad():
        # A row of z that has tokens; a token of the head that no row holds.
        operands[bad][0 if bad == 0 else V - 2] = float("nan")
    loss, *grads = computed(name, operands, rows)
    assert loss.isnan() and all(grad.isnan().any() for grad in grads)


@each_loss
def test_twice_the_same_bits(name):
    operands, rows = problem(18, 20)
    first, second = (computed(name, operands, rows) for _ in range(2))
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))


def test_the_targets_are_a_set():
    operands, rows = problem(3, 5)
    # The same sets in another order and without repeats.
    other = [sorted(set(row), reverse=True) for row in rows]
    pairs = zip(computed("bce", operands, rows), computed("bce", operands, other), strict=True)
    assert all(torch.equal(a, b) for a, b in pairs)


def test_mean_and_sum():
    operands, rows = problem(3, 5)
    mean = computed("bce", operands, rows, upstream=3.0 * V)
    total = computed("bce", operands, rows, reduction="sum")
    torch.testing.assert_close(mean[0] * (3 * V), total[0], rtol=1e-6, atol=0)
    for a, b in zip(mean[1:], total[1:], strict=True):
        torch.testing.assert_close(a, b, rtol=1e-6, atol=1e-7)


@each_loss
@pytest.mark.parametrize("batch", [0, 2])
def test_no_tokens(name, batch):
    operands, _ = problem(max(batch, 1), 5)
    operands[0] = operands[0].detach()[:batch].requires_grad_()
    rows = [[]] * batch
    got = computed(name, operands, rows)
    if batch and name == "bce":
        want = dense(name, operands, rows, 1.0, torch.float64)
        torch.testing.assert_close(got[0].double(), want[0], rtol=1e-6, atol=0)
    else:
        assert all(torch.count_nonzero(x) == 0 for x in got)


@pytest.mark.filterwarnings("ignore:divide by zero")  # the interpreter's log(0), meant as -inf
def test_a_head_may_forbid_tokens():
    """A bias of -inf over more than a block: nothing is NaN, nothing flows there."""
    operands, _ = problem(2, 5)
    rows, bias = [[140], [141, 149, 141]], operands[2].detach().clone()
    bias[:130] = float("-inf")
    operands[2] = bias.requires_grad_()
    assert_as_good_as_torch("categorical", operands, rows)
    assert torch.count_nonzero(computed("categorical", operands, rows)[2][:130]) == 0


@each_loss
def test_other_layouts(name):
    """int32 ids, a z and a head that are views: the same bits."""
    operands, rows = problem(3, 5)
    want = computed(name, operands, rows)
    loss, (ids, cu_seqlens) = LOSSES[name][0], pack(rows)
    # Every second row of a tensor twice as long.
    views = [x.detach().repeat_interleave(2, dim=0)[::2].requires_grad_() for x in operands]
    got = gradients(loss(*views, ids.int(), cu_seqlens, impl="triton"), views, 1.0)
    assert all(torch.equal(a, b) for a, b in zip(got, want, strict=True))


@each_loss
@pytest.mark.parametrize("wanted", [(0,), (1,), (2,), (0, 2)])
def test_only_wanted_gradients(name, wanted):
    operands, rows = problem(3, 5)
    # All gradients at once, as the truth for some of them alone.
    every = computed(name, operands, rows)
    for index, operand in enumerate(operands):
        operand.requires_grad_(index in wanted)
    loss = LOSSES[name][0](*operands, *pack(rows), impl="triton")
    assert torch.equal(loss, every[0])
    got = torch.autograd.grad(loss, [operands[index] for index in wanted])
    assert all(torch.equal(g, every[1 + i]) for g, i in zip(got, wanted, strict=True))


@each_loss
def test_a_kept_graph_repeats_and_a_second_derivative_is_refused(name):
    operands, rows = problem(2, 5)
    loss = LOSSES[name][0](*operands, *pack(rows), impl="triton")
    once = torch.autograd.grad(loss, operands, retain_graph=True)
    again = torch.autograd.grad(loss, operands, retain_graph=True)
    assert all(torch.equal(a, b) for a, b in zip(once, again, strict=True))
    # The loss's square has a second derivative; the operator must not answer with a wrong one.
    (grad,) = torch.autograd.grad(loss * loss, operands[:1], create_graph=True)
    with pytest.raises(RuntimeError, match="bow_backward"):
        torch.autograd.grad(grad.sum(), operands[:1])


class LargestFloats(TorchDispatchMode):
    """The most elements that a floating-point tensor made meanwhile has had."""

    def __init__(self):
        super().__init__()
        self.numel = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        for tensor in out if isinstance(out, tuple | list) else (out,):
            if isinstance(tensor, torch.Tensor) and tensor.is_floating_point():
                self.numel = max(self.numel, tensor.numel())
        return out


@each_loss
def test_neither_logits_nor_a_multi_hot_target_are_made(name):
    batch, width = 18, 5
    (z, weight, bias), rows = problem(batch, width)
    arguments = (z, weight, bias, *pack(rows), False, False)
    launch = {"bce": kernels.bce, "categorical": kernels.categorical}[name]
    with torch.no_grad(), LargestFloats() as largest:
        assert launch(*arguments).errors is None
    assert 0 < largest.numel < batch * V
    # With gradients one (B, V) tensor, the errors, in the operands' dtype.
    halves = [x.detach().to(HALF) for x in (z, weight, bias)]
    sums = launch(*halves, *pack(rows), True, True)
    assert sums.errors.shape == (batch, V) and sums.errors.dtype == HALF


@pytest.mark.parametrize("launch", [kernels.bce, kernels.categorical])
def test_an_id_outside_the_vocabulary_writes_nowhere(launch):
    """On a GPU nobody checks: it must be left out, not set a bit or an error of the next row."""
    (z, weight, bias), _ = problem(3, 5)
    inside, outside = ([[1, 2], [3], []], [[1, V, 2, -1, V + 33], [3], [V, -1]])
    found = [launch(z, weight, bias, *pack(rows), True, True) for rows in (inside, outside)]
    assert all(torch.equal(a, b) for a, b in zip(*found, strict=True))


@each_loss
def test_a_wide_z(name):
    """The widest the kernels take shrinks their blocks; a wider one goes to the reference."""
    operands, rows = problem(2, 256)
    assert_as_good_as_torch(name, operands, rows)
    operands, rows = problem(2, 257)
    with pytest.raises(ValueError, match="got z of width 257; its kernels take at most 256"):
        computed(name, operands, rows)


@pytest.mark.skipif(DEVICE.type == "cuda", reason="a GPU computes in bf16")
@each_loss
def test_bf16_is_refused_under_the_interpreter(name):
    operands, rows = problem(2, 5, torch.float32, torch.bfloat16)
    with pytest.raises(ValueError, match="in bfloat16 under TRITON_INTERPRET"):
        computed(name, operands, rows)


@pytest.mark.parametrize("z_dtype", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize("categorical", [False, True])
def test_the_operators_propagate_shapes(categorical, z_dtype):
    with FakeTensorMode():
        z = torch.empty(2, 5, dtype=z_dtype).requires_grad_()
        weight = torch.empty(V, 5, dtype=torch.bfloat16).requires_grad_()
        bias = torch.empty(V, dtype=torch.bfloat16).requires_grad_()
        ids, cu_seqlens = torch.empty(7, dtype=torch.int64), torch.empty(3, dtype=torch.int32)
        operator = torch.ops.cdpvae_kernels.bow
        loss, _, errors = operator(z, weight, bias, ids, cu_seqlens, categorical, True, True)
        assert loss.dtype == torch.float32 and errors.dtype == z_dtype
        loss.backward()
        for operand in (z, weight, bias):
            assert operand.grad.shape == operand.shape and operand.grad.dtype == operand.dtype


@pytest.mark.parametrize("categorical", [False, True])
def test_the_operator_is_what_it_declares(categorical):
    """Nothing aliased, nothing written to, real shapes and dtypes those of the fake."""
    operands, rows = problem(3, 5)
    torch.library.opcheck(
        torch.ops.cdpvae_kernels.bow.default,
        (*operands, *pack(rows), categorical, True, True),
        test_utils=("test_schema", "test_faketensor"),
    )
