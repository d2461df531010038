"""torch.compile sees the reconstruction loss as one operator, forward and backward."""

import torch

from cdpvae_kernels import linear_cross_entropy


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
