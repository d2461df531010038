"""The Triton path of linear_cross_entropy against formulas in fp64, block by block.

Blocks are made small, so that every loop turns several times and ends on a ragged block.
"""

import pytest
import torch
import torch.nn.functional as F

from cdpvae_kernels import linear_cross_entropy
from cdpvae_kernels.common import runtime
from support.triton import DEVICE, DTYPES, minima_of_a_gpu, poisoned  # noqa: F401

pytestmark = pytest.mark.usefixtures("poisoned")
# V is two blocks and a ragged third, D one block and a ragged second.
T, D, V = 11, 20, 150
POSITION_BYTES = V * 8  # logits in fp32, exponentials in at most as much


@pytest.fixture(autouse=True)
def small_blocks(monkeypatch):
    blocks = {"BLOCK_V": 64, "BLOCK_D": 16, "num_warps": 4, "num_stages": 1}
    wanted = {"rows": "BLOCK_V", "error": "BLOCK_V", "finish": "BLOCK_D"}

    def config(name, device):
        block = wanted[name.rpartition(".")[2]]
        return {key: value for key, value in blocks.items() if key in (block, "num_warps")}

    monkeypatch.setattr(runtime, "launch_config", config)


def problem(dtype=torch.float32, scale=1.0, positions=T, vocab=V):
    draw = torch.Generator().manual_seed(3)
    hidden = torch.randn(positions, D, generator=draw) * scale
    weight = torch.randn(vocab, D, generator=draw)
    targets = torch.randint(0, vocab, (positions,), generator=draw)
    # The first and the last column, and a target in the ragged block.
    targets[:3] = torch.tensor([0, vocab - 1, vocab - 2])
    return (
        hidden.to(DEVICE, dtype).requires_grad_(),
        weight.to(DEVICE, dtype).requires_grad_(),
        targets.to(DEVICE),
    )


def exact(hidden, weight, targets, *, positions=None, divisor=None, z_loss=0.0, softcap=None):
    """loss, nll, lse and both gradients from full logits in fp64, without cancellation."""
    hidden, weight = (x.detach().double().requires_grad_() for x in (hidden, weight))
    logits = (hidden if positions is None else hidden[positions]) @ weight.T
    if softcap is not None:
        logits = softcap * torch.tanh(logits / softcap)
    valid = targets != -100
    column = targets.clamp(min=0)[:, None]
    # The other tokens' odds: in fp64, too, log_softmax would cancel.
    gaps = logits - logits.gather(1, column)
    others = torch.logsumexp(gaps.scatter(1, column, float("-inf")), dim=1)
    nll = F.softplus(others, threshold=1e9) * valid
    lse = torch.logsumexp(logits, dim=1) * valid
    total = (nll + z_loss * lse.square()).sum()
    loss = total / (valid.sum().clamp(min=1) if divisor is None else divisor)
    grads = torch.autograd.grad(loss, (hidden, weight))
    return loss.detach(), nll.detach(), lse.detach(), *grads


def computed(hidden, weight, targets, upstream=1.0, **settings):
    loss, stats = linear_cross_entropy(
        hidden, weight, targets, return_stats=True, impl="triton", **settings
    )
    grads = torch.autograd.grad(loss * upstream, (hidden, weight))
    return loss.detach(), *stats, *grads


def assert_as_good_as_torch(hidden, weight, targets, *, upstream=1.0, **settings):
    """Every output's error is at most twice that of the same formula in torch and this dtype."""
    formula = {k: v for k, v in settings.items() if k not in ("chunk_bytes", "ignore_index")}
    want = exact(hidden, weight, targets, **formula)
    got = computed(hidden, weight, targets, upstream, **settings)
    plain = plain_torch(hidden, weight, targets, **formula)
    # The upstream gradient scales gradients, not losses.
    factors = (1.0, 1.0, 1.0, upstream, upstream)
    names = ("loss", "nll", "lse", "d hidden", "d weight")
    for name, ours, other, truth, factor in zip(names, got, plain, want, factors, strict=True):
        # Where plain torch happens to be exact, some roundings are allowed.
        spacing = torch.finfo(ours.dtype).eps
        allowed = 2 * (other.double() - truth).norm() * abs(factor)
        allowed += 4 * spacing * (truth * factor).norm()
        error = (ours.double() - truth * factor).norm()
        assert error <= allowed, f"{name}: error {error:.3g}, allowed {allowed:.3g}"


def plain_torch(hidden, weight, targets, *, positions=None, divisor=None, z_loss=0.0, softcap=None):
    """Full logits, fp32 softmax: what one writes first."""
    x = hidden if positions is None else hidden[positions]
    logits = (x @ weight.T).float()
    if softcap is not None:
        logits = softcap * torch.tanh(logits / softcap)
    valid = targets != -100
    nll = F.cross_entropy(logits, targets, reduction="none", ignore_index=-100)
    lse = torch.logsumexp(logits, dim=1) * valid
    loss = (nll + z_loss * lse.square()).sum() / (valid.sum() if divisor is None else divisor)
    return loss.detach(), nll.detach(), lse.detach(), *torch.autograd.grad(loss, (hidden, weight))


SETTINGS = [
    pytest.param({}, id="plain"),
    pytest.param({"z_loss": 0.01}, id="z_loss"),
    pytest.param({"softcap": 5.0}, id="softcap"),
    pytest.param({"z_loss": 0.01, "softcap": 5.0, "divisor": 7.5}, id="all_at_once"),
]


@pytest.mark.parametrize("settings", SETTINGS)
@pytest.mark.parametrize("dtype", DTYPES)
def test_error_is_at_most_twice_that_of_plain_torch(dtype, settings):
    hidden, weight, targets = problem(dtype)
    targets[[2, 5]] = -100
    # Three positions a chunk: the last one is ragged.
    assert_as_good_as_torch(
        hidden, weight, targets, chunk_bytes=3 * POSITION_BYTES, upstream=-2.5, **settings
    )


# One position a chunk, a ragged last chunk, exactly all positions, more than all.
@pytest.mark.parametrize("chunk_positions", [1, 4, T, 100])
@pytest.mark.parametrize("dtype", DTYPES)
def test_the_size_of_a_chunk_does_not_matter(dtype, chunk_positions):
    inputs = problem(dtype)
    position_bytes = V * (4 + torch.finfo(dtype).bits // 8)
    whole = computed(*inputs, chunk_bytes=T * position_bytes)
    parts = computed(*inputs, chunk_bytes=chunk_positions * position_bytes)
    for name, a, b in zip(("loss", "nll", "lse", "d hidden"), whole, parts, strict=False):
        # A product of other shape may add in another order; nothing else differs.
        torch.testing.assert_close(a, b, rtol=4 * torch.finfo(a.dtype).eps, atol=1e-6, msg=name)


def margin_problem(margin, dtype):
    """Logits whose target lies `margin` nats above (below, if negative) the best other token."""
    hidden = torch.zeros(4, D)
    hidden[:, 0] = 1.0
    weight = torch.zeros(V, D)
    weight[:, 0] = -torch.rand(V, generator=torch.Generator().manual_seed(5))
    weight[7, 0] = 0.0
    # Logits are exactly column 0 of the head: the other columns only matter for the gradient.
    weight[40, 0] = margin
    weight[:, 1:] = torch.randn(V, D - 1, generator=torch.Generator().manual_seed(6))
    targets = torch.full((4,), 40)
    hidden, weight = (x.to(DEVICE, dtype).requires_grad_() for x in (hidden, weight))
    return hidden, weight, targets.to(DEVICE)


# All of a row, the target's logit alone, another one's alone; a row of infinite logits is NaN too.
@pytest.mark.usefixtures("minima_of_a_gpu")
@pytest.mark.parametrize("bad", ["hidden", "target", "other", "infinite"])
@pytest.mark.parametrize("dtype", DTYPES)
def test_nan_stays_nan(dtype, bad):
    hidden, weight, targets = (x.detach().clone() for x in problem(dtype))
    if bad in ("hidden", "infinite"):
        hidden[4] = float("nan") if bad == "hidden" else float("inf")
    else:
        # A token that no other position has as its target.
        column = (
            int(targets[4])
            if bad == "target"
            else next(v for v in range(V) if v not in targets.tolist())
        )
        weight[column] = float("nan")
    loss, nll, lse, *grads = computed(hidden.requires_grad_(), weight.requires_grad_(), targets)
    assert loss.isnan() and nll[4].isnan() and lse[4].isnan()
    assert all(grad.isnan().any() for grad in grads)
    if bad in ("hidden", "infinite"):
        others = [row for row in range(T) if row != 4]
        assert nll[others].isfinite().all() and grads[0][others].isfinite().all()


# p(target) from 0.5 to beyond 1 - 1e-6, and 20 to 200 nats wrong: past 64 the row is read again.
@pytest.mark.parametrize("margin", [5.0, 11.0, 18.0, 25.0, -20.0, -63.0, -65.0, -100.0, -200.0])
@pytest.mark.parametrize("dtype", DTYPES)
def test_confident_and_very_wrong_tokens_keep_relative_precision(margin, dtype):
    inputs = margin_problem(margin, dtype)
    want, got = exact(*inputs), computed(*inputs)
    # The logits are exact here: a few roundings of fp32 and one to the dtype of e.
    torch.testing.assert_close(got[0].double(), want[0], rtol=2e-6, atol=0)
    torch.testing.assert_close(got[1].double(), want[1], rtol=2e-6, atol=0)
    for ours, truth in zip(got[3:], want[3:], strict=True):
        worst = (ours.double() - truth).abs().max()
        # exp turns the rounding of its argument, up to |margin| in size, into a relative error.
        allowed = (4 * torch.finfo(dtype).eps + abs(margin) * 2**-24) * truth.abs().max()
        # The gradient of a certain token is smaller than fp16's smallest number.
        allowed += torch.finfo(dtype).tiny / 1024
        assert worst <= allowed, f"{worst:.3g} > {allowed:.3g}"


def test_the_certain_token_is_the_point_where_softmax_minus_one_fails():
    """At 25 nats plain fp32 gives a loss of 0; the formulation of this kernel does not."""
    hidden, weight, targets = margin_problem(25.0, torch.float32)
    # exp(-25) is below the spacing of fp32 at 1.
    assert plain_torch(hidden, weight, targets)[0] == 0.0
    ours = computed(hidden, weight, targets)
    assert ours[0] > 0 and ours[3].abs().max() > 0


@pytest.mark.parametrize("targets_left", [0, 1])
def test_all_ignored_and_one_valid(targets_left):
    hidden, weight, targets = problem()
    targets[targets_left:] = -100
    got = computed(hidden, weight, targets)
    if targets_left == 0:
        assert all(torch.equal(x, torch.zeros_like(x)) for x in got)
    else:
        want = exact(hidden, weight, targets)
        for ours, truth in zip(got, want, strict=True):
            torch.testing.assert_close(ours.double(), truth, rtol=1e-5, atol=1e-5)


def test_no_positions_at_all():
    hidden = torch.zeros(0, D, device=DEVICE, requires_grad=True)
    weight = torch.zeros(V, D, device=DEVICE, requires_grad=True)
    got = computed(hidden, weight, torch.zeros(0, dtype=torch.int64, device=DEVICE))
    assert got[0] == 0 and torch.equal(got[4], torch.zeros_like(weight))


def test_a_vocabulary_of_one_token_is_certain():
    hidden, weight, targets = problem(torch.float16, vocab=3)
    weight, targets = weight.detach()[:1].requires_grad_(), torch.zeros_like(targets)
    loss, nll, lse, *grads = computed(hidden, weight, targets)
    assert loss == 0 and all(torch.equal(g, torch.zeros_like(g)) for g in grads)
    torch.testing.assert_close(lse, (hidden @ weight.T)[:, 0].float(), rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("positions", [[4, 0, 9], [2, 2, 2, 7]], ids=["distinct", "repeated"])
def test_positions_select_and_repeat(positions):
    hidden, weight, _ = problem()
    positions = torch.tensor(positions, device=DEVICE)
    targets = torch.arange(len(positions), device=DEVICE)
    assert_as_good_as_torch(hidden, weight, targets, positions=positions, ignore_index=None)


def test_views_with_strides_count_as_what_they_show():
    hidden, weight, targets = problem()
    # Every second of twice as many: the numbers between belong to no position.
    spread = torch.stack((targets, (targets + 1) % V), dim=1).flatten()[::2]
    transposed = [x.detach().T.contiguous().T.requires_grad_() for x in (hidden, weight)]
    assert_as_good_as_torch(*transposed, spread, ignore_index=None)
    positions = torch.arange(2 * T, device=DEVICE)[: 2 * T : 2] // 2
    twice = torch.stack((positions, positions * 0), dim=1).flatten()[::2]
    assert_as_good_as_torch(*transposed, spread, positions=twice, ignore_index=None)


def test_only_what_is_wanted_is_computed():
    hidden, weight, targets = problem()
    frozen = weight.detach()
    loss = linear_cross_entropy(hidden, frozen, targets, impl="triton")
    (grad,) = torch.autograd.grad(loss, hidden)
    want = exact(hidden, weight, targets)
    torch.testing.assert_close(grad.double(), want[3], rtol=1e-5, atol=1e-6)
    with torch.no_grad():
        loss = linear_cross_entropy(hidden, weight, targets, impl="triton")
    torch.testing.assert_close(loss.double(), want[0], rtol=1e-6, atol=0)
    # And the other way round: a trained head behind frozen states.
    only_weight = linear_cross_entropy(hidden.detach(), weight, targets, impl="triton")
    (grad,) = torch.autograd.grad(only_weight, weight)
    torch.testing.assert_close(grad.double(), want[4], rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("dtype", DTYPES)
def test_twice_the_same_bits(dtype):
    inputs = problem(dtype)
    # A repeated position: three gradients meet in one place.
    positions = torch.tensor([0, 3, 3, 3, 9], device=DEVICE)
    targets = torch.arange(5, device=DEVICE)
    for first, second in zip(
        computed(*inputs[:2], targets, positions=positions),
        computed(*inputs[:2], targets, positions=positions),
        strict=True,
    ):
        assert torch.equal(first, second)


@pytest.mark.skipif(DEVICE.type == "cuda", reason="only the interpreter refuses bf16")
def test_bf16_is_refused_by_the_interpreter():
    hidden, weight, targets = problem(torch.bfloat16)
    with pytest.raises(ValueError, match="bfloat16 arithmetic silently returns garbage"):
        linear_cross_entropy(hidden, weight, targets, impl="triton")


@pytest.mark.skipif(DEVICE.type != "cuda", reason="needs a GPU to wait for")
@pytest.mark.parametrize("divisor", [None, 7.0, "tensor"])
def test_the_host_does_not_wait(divisor):
    hidden, weight, targets = problem(torch.bfloat16)
    positions = torch.arange(T, device=DEVICE)
    if divisor == "tensor":
        divisor = torch.tensor(7.0, device=DEVICE)
    torch.cuda.synchronize()
    # From here on every wait of the host is an error.
    torch.cuda.set_sync_debug_mode("error")
    try:
        linear_cross_entropy(
            hidden, weight, targets, positions=positions, divisor=divisor, ignore_index=None
        ).backward()
    finally:
        torch.cuda.set_sync_debug_mode("default")


@pytest.mark.skipif(DEVICE.type != "cuda", reason="gigabytes of logits")
def test_offsets_past_two_to_the_31():
    """16,800 positions x 128,256 columns: the last positions' logits lie past 2^31 elements."""
    positions, vocab, width = 16800, 128256, 16
    draw = torch.Generator(DEVICE).manual_seed(0)
    hidden = (
        torch.randn(positions, width, device=DEVICE, generator=draw).bfloat16().requires_grad_()
    )
    weight = torch.randn(vocab, width, device=DEVICE, generator=draw).bfloat16()
    targets = torch.randint(vocab, (positions,), device=DEVICE, generator=draw)
    # All positions in one chunk, past 2^31 logits, and in chunks far below it.
    losses = [
        linear_cross_entropy(hidden, weight, targets, ignore_index=None, chunk_bytes=budget)
        for budget in (positions * vocab * 6, None)
    ]
    torch.testing.assert_close(*losses, rtol=1e-6, atol=0)
    grads = [torch.autograd.grad(loss, hidden)[0] for loss in losses]
    torch.testing.assert_close(*grads, rtol=1e-2, atol=1e-7)
