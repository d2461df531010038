"""linear_cross_entropy in plain PyTorch against F.cross_entropy on full logits in fp64.

Every test runs with the definition (`reference`), with the fast path of CPUs (`tiled`) and with the
latter in tiles so small that a handful of positions and tokens fills many.
"""

import contextlib
import sys
from functools import partial

import pytest
import torch
import torch.nn.functional as F
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode

from cdpvae_kernels import linear_cross_entropy
from cdpvae_kernels.linear_cross_entropy import reference, tiled
from cdpvae_kernels.linear_cross_entropy.interface import Options

# T and V are primes, so that no chunk or tile comes out even.
T, D, V = 13, 6, 11
POSITION_BYTES = V * 8  # the logits of one position in fp64


@pytest.fixture(autouse=True, params=["reference", "tiled", "small tiles"])
def implementation(request, monkeypatch):
    if request.param == "small tiles":
        for name, value in {"TILE_POSITIONS": 5, "TILE_COLUMNS": 4, "MIN_COLUMNS": 2}.items():
            monkeypatch.setattr(tiled, name, value)
    impl = request.param if request.param == "reference" else "tiled"
    module = sys.modules[__name__]
    monkeypatch.setattr(module, "linear_cross_entropy", partial(linear_cross_entropy, impl=impl))
    return request.param


def problem(dtype=torch.float64, scale=1.0, seed=0):
    draw = torch.Generator().manual_seed(seed)
    hidden = torch.randn(T, D, dtype=torch.float64, generator=draw) * scale
    weight = torch.randn(V, D, dtype=torch.float64, generator=draw)
    targets = torch.randint(0, V, (T,), generator=draw)
    return hidden.to(dtype).requires_grad_(), weight.to(dtype).requires_grad_(), targets


def oracle(hidden, weight, targets, *, positions=None, divisor=None, z_loss=0.0, softcap=None):
    """The formula on full logits in fp64; returns loss, nll, lse and the gradients."""
    hidden = hidden.detach().double().requires_grad_()
    weight = weight.detach().double().requires_grad_()
    logits = (hidden if positions is None else hidden[positions]) @ weight.T
    if softcap is not None:
        logits = softcap * torch.tanh(logits / softcap)
    # What the library never does: whole logits, masked afterwards.
    valid = targets != -100
    nll = F.cross_entropy(logits, targets, reduction="none", ignore_index=-100)
    lse = torch.logsumexp(logits, dim=-1) * valid
    loss = (nll + z_loss * lse**2).sum() / (valid.sum() if divisor is None else divisor)
    loss.backward()
    return loss.detach(), nll.detach(), lse.detach(), hidden.grad, weight.grad


def check(hidden, weight, targets, **settings):
    """Loss, statistics and both gradients agree with the oracle to fp64's precision."""
    formula = {k: v for k, v in settings.items() if k != "chunk_bytes"}
    loss, nll, lse, grad_hidden, grad_weight = oracle(hidden, weight, targets, **formula)
    got, stats = linear_cross_entropy(hidden, weight, targets, return_stats=True, **settings)
    got.backward()
    # fp64's precision, with some digits for sums in another order.
    tolerance = {"rtol": 1e-12, "atol": 1e-13}
    torch.testing.assert_close(got, loss, **tolerance)
    torch.testing.assert_close(stats.nll, nll, **tolerance)
    torch.testing.assert_close(stats.lse, lse, **tolerance)
    torch.testing.assert_close(hidden.grad, grad_hidden, **tolerance)
    torch.testing.assert_close(weight.grad, grad_weight, **tolerance)


# One position a chunk, an uneven last chunk, exactly all positions, more than all, the default.
@pytest.mark.parametrize(
    "chunk_bytes", [1, 5 * POSITION_BYTES, T * POSITION_BYTES, 100 * POSITION_BYTES, None]
)
@pytest.mark.parametrize("settings", [{}, {"z_loss": 0.3}, {"softcap": 1.5}])
def test_equals_cross_entropy_for_any_chunk(chunk_bytes, settings):
    hidden, weight, targets = problem()
    targets[[0, 4, 5, 12]] = -100
    check(hidden, weight, targets, chunk_bytes=chunk_bytes, **settings)


def test_z_loss_softcap_and_divisor_together():
    hidden, weight, targets = problem(scale=3.0)
    check(
        hidden,
        weight,
        targets,
        z_loss=0.1,
        softcap=4.0,
        divisor=7.0,
        chunk_bytes=4 * POSITION_BYTES,
    )


# A number or a tensor, whole or not: the same quotient.
@pytest.mark.parametrize("divisor", [29, 29.0, torch.tensor(29.0), torch.tensor(29)])
def test_divisor_number_or_tensor(divisor):
    hidden, weight, targets = problem()
    check(hidden, weight, targets, divisor=divisor)


# In order; out of order and repeated: the gradients of a repeated position add up.
@pytest.mark.parametrize("positions", [[1, 2, 3, 7, 9], [9, 0, 9, 9, 2]])
def test_positions_select_and_repeat(positions):
    hidden, weight, targets = problem()
    targets = targets[:5].clone()
    check(
        hidden, weight, targets, positions=torch.tensor(positions), chunk_bytes=2 * POSITION_BYTES
    )
    hidden.grad = weight.grad = None
    targets[1] = -100
    check(
        hidden, weight, targets, positions=torch.tensor(positions), chunk_bytes=2 * POSITION_BYTES
    )


def test_rows_the_former_name_of_positions_is_accepted_with_a_notice():
    hidden, weight, targets = problem()
    positions, targets = torch.tensor([1, 2, 7]), targets[:3]
    want = linear_cross_entropy(hidden, weight, targets, positions=positions)
    with pytest.warns(DeprecationWarning, match="rows= is now called positions=") as notices:
        got = linear_cross_entropy(hidden, weight, targets, rows=positions)
    assert torch.equal(got, want)
    assert [notice.filename for notice in notices] == [__file__]
    with pytest.raises(ValueError, match=r"got rows= and positions=, .*; pass positions="):
        linear_cross_entropy(hidden, weight, targets, rows=positions, positions=positions)


def test_one_valid_position():
    hidden, weight, targets = problem()
    targets[:] = -100
    targets[8] = 3
    check(hidden, weight, targets)
    others = [position for position in range(T) if position != 8]
    assert torch.count_nonzero(hidden.grad[others]) == 0


# 0 / 0 would be NaN, so the divisor must not matter, even a wrong one.
@pytest.mark.parametrize("divisor", [None, 0, 5.0, torch.tensor(0.0)])
@pytest.mark.parametrize("case", ["all ignored", "no positions", "an empty list of positions"])
def test_no_valid_target_gives_exactly_zero(case, divisor):
    hidden, weight, targets = problem()
    positions = None
    if case == "all ignored":
        targets[:] = -100
    elif case == "no positions":
        hidden, targets = hidden.detach()[:0].requires_grad_(), targets[:0]
    else:
        targets, positions = targets[:0], torch.zeros(0, dtype=torch.int64)
    loss, stats = linear_cross_entropy(
        hidden, weight, targets, positions=positions, divisor=divisor, z_loss=0.1, return_stats=True
    )
    loss.backward()
    assert loss.item() == 0.0
    assert torch.equal(hidden.grad, torch.zeros_like(hidden))
    assert torch.equal(weight.grad, torch.zeros_like(weight))
    assert torch.equal(stats.nll, torch.zeros(targets.shape, dtype=torch.float64))


def test_ignore_index_is_a_setting_and_none_takes_every_target():
    hidden, weight, targets = problem()
    # A target that is a token, so that ignoring it is seen.
    targets[2] = 0
    as_pad = linear_cross_entropy(hidden, weight, targets, ignore_index=0)
    marked = targets.masked_fill(targets == 0, -100)
    torch.testing.assert_close(as_pad, oracle(hidden, weight, marked)[0])
    every = linear_cross_entropy(hidden, weight, targets, ignore_index=None)
    torch.testing.assert_close(every, oracle(hidden, weight, targets)[0])


def test_upstream_gradient_scales_both_gradients_and_a_kept_graph_repeats():
    hidden, weight, targets = problem()
    _, _, _, grad_hidden, grad_weight = oracle(hidden, weight, targets)
    loss = linear_cross_entropy(hidden, weight, targets)
    # A factor that is neither 1 nor positive, then the same graph once more.
    (-2.5 * loss).backward(retain_graph=True)
    torch.testing.assert_close(hidden.grad, -2.5 * grad_hidden)
    torch.testing.assert_close(weight.grad, -2.5 * grad_weight)
    (-2.5 * loss).backward()
    torch.testing.assert_close(hidden.grad, -5.0 * grad_hidden)


@pytest.mark.parametrize("settings", [{}, {"z_loss": 0.2, "softcap": 2.0}])
def test_gradcheck(settings):
    hidden, weight, targets = problem()
    targets[3] = -100
    assert torch.autograd.gradcheck(
        lambda h, w: linear_cross_entropy(
            h, w, targets, chunk_bytes=4 * POSITION_BYTES, **settings
        ),
        (hidden, weight),
    )


def margin_problem(margin):
    """fp32 positions whose target leads each other token by `margin` nats (trails, if negative)."""
    hidden = torch.eye(4) * margin
    weight = torch.eye(64, 4)
    return hidden.requires_grad_(), weight, torch.arange(4)


# p from 0.9 to beyond 1 - 1e-6, and targets 20 to 100 nats below the best token.
@pytest.mark.parametrize("margin", [6.4, 8.8, 11.1, 18.0, 30.0, -20.0, -60.0, -100.0])
def test_confident_and_very_wrong_tokens_keep_relative_precision(margin):
    hidden, weight, targets = margin_problem(margin)
    reference = hidden.detach().double().requires_grad_()
    logits = reference @ weight.double().T
    # log1p of the other tokens' odds: in fp64, too, log_softmax would cancel.
    odds = torch.exp(logits - logits.gather(1, targets[:, None]))
    others = odds * (1 - F.one_hot(targets, 64))
    exact = torch.log1p(others.sum(-1)).sum()
    exact.backward()
    loss = linear_cross_entropy(hidden, weight, targets, divisor=1)
    loss.backward()
    # Eight roundings of fp32 between the logits and the result.
    torch.testing.assert_close(loss.double(), exact, rtol=8 * 2**-23, atol=0)
    worst = (hidden.grad.double() - reference.grad).abs().max() / reference.grad.abs().max()
    assert worst <= 8 * 2**-23


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_error_is_at_most_twice_that_of_plain_torch(dtype):
    draw = torch.Generator().manual_seed(1)
    hidden = torch.randn(96, 32, generator=draw).to(dtype).requires_grad_()
    weight = torch.randn(200, 32, generator=draw).to(dtype).requires_grad_()
    targets = torch.randint(0, 200, (96,), generator=draw)
    truth = oracle(hidden, weight, targets)

    # What one writes first in this dtype, and how far it is from the truth.
    plain = F.cross_entropy((hidden @ weight.T).float(), targets)
    plain_grads = torch.autograd.grad(plain, (hidden, weight))
    loss = linear_cross_entropy(hidden, weight, targets)
    grads = torch.autograd.grad(loss, (hidden, weight))
    assert loss.dtype == torch.float32
    assert [g.dtype for g in grads] == [dtype, dtype]

    # Where plain torch happens to be exact, one spacing of the dtype is allowed.
    spacing = torch.finfo(dtype).eps
    pairs = zip((plain, *plain_grads), (loss, *grads), (truth[0], *truth[3:]), strict=True)
    for other, ours, exact in pairs:
        allowed = 2 * (other.double() - exact).norm() + spacing * exact.norm()
        assert (ours.double() - exact).norm() <= allowed


def test_fp32_logits_under_bf16_inputs():
    """The logits are not rounded to bf16: the loss is that of the bf16 inputs in fp64."""
    hidden, weight, targets = problem(torch.bfloat16, scale=8.0)
    loss = linear_cross_entropy(hidden, weight, targets)
    exact = oracle(hidden, weight, targets)[0]
    torch.testing.assert_close(loss.double(), exact, rtol=1e-6, atol=0)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
def test_twice_the_same_bits(dtype):
    def run():
        hidden, weight, targets = problem(dtype)
        loss = linear_cross_entropy(hidden, weight, targets, chunk_bytes=4 * POSITION_BYTES)
        return loss, *torch.autograd.grad(loss, (hidden, weight))

    for first, second in zip(run(), run(), strict=True):
        assert torch.equal(first, second)


def test_gradients_are_computed_only_where_wanted(monkeypatch, implementation):
    hidden, weight, targets = problem()
    loss = linear_cross_entropy(hidden, weight.detach(), targets)
    loss.backward()
    assert weight.grad is None
    torch.testing.assert_close(hidden.grad, oracle(hidden, weight, targets)[3])

    counted = CountProducts()
    # The implementation by itself, asked for no gradient.
    with torch.no_grad(), counted:
        run = tiled if implementation != "reference" else reference
        nll, _, *grads = run.linear_cross_entropy(
            hidden,
            weight,
            targets,
            None,
            torch.ones(()),
            Options(chunk_bytes=100 * T * POSITION_BYTES),
        )
    # 13 positions in fives and 11 columns in fours: nine tiles, a product each.
    tiles = 3 * 3 if implementation == "small tiles" else 1
    assert counted.products == tiles, "without gradients the logits are the only product"
    assert grads == [None, None]


class CountProducts(TorchDispatchMode):
    products = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.products += func.overloadpacket in (torch.ops.aten.mm, torch.ops.aten.addmm)
        return func(*args, **(kwargs or {}))


def test_statistics_carry_no_gradient():
    hidden, weight, targets = problem()
    _, stats = linear_cross_entropy(hidden, weight, targets, return_stats=True)
    assert not stats.nll.requires_grad and not stats.lse.requires_grad


@pytest.mark.parametrize("run, softcap", [(reference, None), (reference, 3.0), (tiled, None)])
def test_no_more_than_one_chunk_of_logits_is_held(run, softcap):
    """Storage of the largest tensor that the operation makes, by watching every allocation."""

    class Largest(TorchDispatchMode):
        elements = 0

        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            result = func(*args, **(kwargs or {}))
            for tensor in result if isinstance(result, tuple | list) else [result]:
                if isinstance(tensor, torch.Tensor):
                    stored = tensor.untyped_storage().nbytes() // tensor.element_size()
                    self.elements = max(self.elements, stored)
            return result

    # Sixteen chunks, and a D so small that only logits can be the largest tensor.
    positions, vocab = 512, 256
    hidden, weight = torch.randn(positions, 4), torch.randn(vocab, 4)
    targets, scale = torch.randint(0, vocab, (positions,)), torch.ones(())
    options = Options(chunk_bytes=32 * vocab * 4, softcap=softcap, want_hidden=True)
    # The implementation, not the operator: a mode sees the latter as one call.
    with Largest() as largest:
        run.linear_cross_entropy(hidden, weight, targets, None, scale, options)
    # A softcap keeps its tanh beside the logits: half as many fit.
    chunk = 32 * vocab // (1 if softcap is None else 2)
    assert hidden.numel() <= largest.elements <= chunk < positions * vocab


# Fake CPU tensors, as in tracing a large model; "meta" takes the path of a GPU, whose products read
# bf16 and return fp32. The weight's gradient and z-loss with it, so that every branch runs.
@pytest.mark.parametrize(
    "mode, device, dtype",
    [
        (FakeTensorMode, "cpu", torch.float32),
        (FakeTensorMode, "cpu", torch.bfloat16),
        (contextlib.nullcontext, "meta", torch.bfloat16),
    ],
)
@pytest.mark.parametrize("divisor", [200, None])
def test_shapes_propagate_without_data(mode, device, dtype, divisor):
    with mode():
        hidden = torch.empty(300, 64, device=device, dtype=dtype, requires_grad=True)
        weight = torch.empty(1000, 64, device=device, dtype=dtype, requires_grad=True)
        targets = torch.empty(200, device=device, dtype=torch.int64)
        positions = torch.empty(200, device=device, dtype=torch.int64)
        loss, stats = linear_cross_entropy(
            hidden,
            weight,
            targets,
            positions=positions,
            divisor=divisor,
            z_loss=0.1,
            return_stats=True,
        )
        loss.backward()
        assert loss.shape == () and loss.dtype == torch.float32
        assert stats.nll.shape == (200,)
        assert hidden.grad.shape == (300, 64) and hidden.grad.dtype == dtype
        assert weight.grad.shape == (1000, 64) and weight.grad.dtype == dtype


def refused(message, **changes):
    hidden, weight, targets = problem(torch.float32)
    arguments = {"hidden": hidden, "weight": weight, "targets": targets} | changes
    with pytest.raises(ValueError, match=message):
        linear_cross_entropy(**arguments)


def test_wrong_arguments_are_refused():
    ints = torch.zeros(T, dtype=torch.int64)
    # Shapes and dtypes.
    refused(r"hidden has shape \(13,\)", hidden=torch.zeros(13))
    refused(r"hidden has dtype torch.int64", hidden=torch.zeros(T, D, dtype=torch.int64))
    refused(r"weight has shape \(11, 5\); it must be \(V, 6\)", weight=torch.zeros(V, 5))
    refused(r"weight has dtype torch.float64", weight=torch.zeros(V, D, dtype=torch.float64))
    refused(r"targets has shape \(12,\); it must be \(13\)", targets=ints[:12])
    refused(r"targets has dtype torch.float32", targets=torch.zeros(T))
    # Values out of range.
    refused(r"targets .* holds 11; .*\[0, 11\)", targets=ints + V)
    refused(r"targets .* holds -1", targets=ints - 1)
    refused(r"targets holds -100", targets=ints - 100, ignore_index=None)
    refused(r"targets has shape \(13,\); it must be \(3\)", positions=ints[:3])
    refused(r"positions holds 13; .*\[0, 13\)", positions=ints + T)
    refused(r"positions has dtype", positions=torch.zeros(T))
    refused(r"divisor=0 with 13 valid targets", divisor=0)
    refused(r"divisor=-1.0", divisor=torch.tensor(-1.0))
    refused(r"divisor=nan", divisor=float("nan"))
    refused(r"divisor has shape \(1,\)", divisor=torch.ones(1))
    refused(r"chunk_bytes=0", chunk_bytes=0)
    refused(r"z_loss=-0.1", z_loss=-0.1)
    # Settings outside their rules, and implementations that there are not or that cannot.
    refused(r"softcap=0.0", softcap=0.0)
    refused(
        r"impl='cuda': linear_cross_entropy has .*\['reference', 'tiled', 'triton'\]", impl="cuda"
    )
    refused(
        r"impl='triton': .* computes in torch.float64",
        **{name: torch.zeros(T, D, dtype=torch.float64) for name in ("hidden", "weight")},
        impl="triton",
    )
