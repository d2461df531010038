"""torch.compile sees the reconstruction loss as one operator, forward and backward."""

import pytest
import torch

from cdpvae_kernels import linear_cross_entropy
from support.triton import DEVICE


def test_one_node_without_a_graph_break():
    # A backend that keeps the graphs it is given and runs them as they are.
    graphs = []

    def backend(graph, inputs):
        graphs.append(graph)
        return graph.forward

    def loss_of(hidden, weight, targets, positions):
        return 2.0 * linear_cross_entropy(
            hidden, weight, targets, positions=positions, divisor=7.0, ignore_index=None
        )

    torch.manual_seed(0)
    hidden = torch.randn(13, 6, requires_grad=True)
    weight, positions = torch.randn(11, 6), torch.tensor([0, 2, 4, 6, 8])
    targets = torch.randint(0, 11, (5,))
    compiled = torch.compile(loss_of, backend=backend, fullgraph=True)
    loss = compiled(hidden, weight, targets, positions)
    # Neither products nor exponentials: all of it is inside the operator.
    called = [node.target for node in graphs[0].graph.nodes if node.op == "call_function"]
    assert called.count(torch.ops.cdpvae_kernels.linear_cross_entropy.default) == 1
    assert not any("mm" in str(target) or "exp" in str(target) for target in called)

    # Compiled or not: the same bits.
    want = loss_of(hidden, weight, targets, positions)
    assert torch.equal(loss, want)
    assert torch.equal(torch.autograd.grad(loss, hidden)[0], torch.autograd.grad(want, hidden)[0])


def test_the_backward_pass_is_traced_too():
    torch.manual_seed(0)
    hidden = torch.randn(13, 6, requires_grad=True)
    weight = torch.randn(11, 6, requires_grad=True)
    targets = torch.randint(0, 11, (13,))

    def loss_of(hidden, weight, targets):
        return linear_cross_entropy(hidden, weight, targets, ignore_index=None)

    # aot_eager traces the backward pass too, ahead of time.
    grads = [
        torch.autograd.grad(run(hidden, weight, targets), (hidden, weight))
        for run in (loss_of, torch.compile(loss_of, backend="aot_eager", fullgraph=True))
    ]
    for plain, compiled in zip(*grads, strict=True):
        assert torch.equal(plain, compiled)


def test_a_second_derivative_is_refused():
    hidden, weight = torch.randn(4, 6, requires_grad=True), torch.randn(11, 6)
    loss = linear_cross_entropy(hidden, weight, torch.randint(0, 11, (4,)))
    (grad,) = torch.autograd.grad(loss * loss, hidden, create_graph=True)
    try:
        torch.autograd.grad(grad.sum(), hidden)
    except RuntimeError as error:
        assert "scaled_gradient" in str(error)
    else:
        raise AssertionError("a second derivative was returned")


# Every, some and no position counts; -1 is what the operator itself marks with, 3 is a token.
@pytest.mark.parametrize("impl", ["reference", "tiled", "triton"])
@pytest.mark.parametrize("divisor", [None, 7.0])
@pytest.mark.parametrize("ignore_index, ignored", [(-100, []), (-100, [0, 3]), (-1, [3]), (3, [4])])
def test_ignored_targets_stay_ignored_in_a_compiled_function(impl, divisor, ignore_index, ignored):
    if impl == "tiled" and DEVICE.type != "cpu":
        pytest.skip("tiles are for CPUs")
    torch.manual_seed(0)
    hidden = torch.randn(6, 16, device=DEVICE)
    weight = torch.randn(33, 16, device=DEVICE)
    targets = torch.randint(4, 33, (6,), device=DEVICE)
    targets[ignored] = ignore_index
    # What an ignored position holds must not matter, not even in the weight's gradient.
    hidden[ignored] = float("nan")

    def loss_of(hidden, weight, targets):
        return linear_cross_entropy(
            hidden,
            weight,
            targets,
            ignore_index=ignore_index,
            divisor=divisor,
            z_loss=0.1,
            softcap=None if impl == "tiled" else 5.0,
            return_stats=True,
            impl=impl,
        )

    # Each case is a graph of its own: torch gives up after eight of one function.
    torch.compiler.reset()
    results = []
    for run in (loss_of, torch.compile(loss_of, backend="aot_eager", fullgraph=True)):
        inputs = hidden.clone().requires_grad_(), weight.clone().requires_grad_(impl != "tiled")
        loss, stats = run(*inputs, targets)
        wanted = [x for x in inputs if x.requires_grad]
        results.append((loss.detach(), *stats, *torch.autograd.grad(loss, wanted)))
    # The weight's gradient adds rows of zeros where eager has none.
    for plain, compiled in zip(*results, strict=True):
        assert plain.isfinite().all()
        torch.testing.assert_close(compiled, plain, rtol=1e-6, atol=1e-7)


def test_nothing_but_ignored_targets_is_zero_in_a_compiled_function():
    hidden, weight = torch.randn(4, 6, requires_grad=True), torch.randn(11, 6)
    compiled = torch.compile(linear_cross_entropy, backend="aot_eager", fullgraph=True)
    loss = compiled(hidden, weight, torch.full((4,), -100))
    loss.backward()
    assert loss == 0 and torch.equal(hidden.grad, torch.zeros_like(hidden))
