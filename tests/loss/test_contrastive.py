"""InfoNCE against the description's own formula, and the queue against `collections.deque`.

Legend: B local rows, K rows of all ranks, Q rows in the queue, Z latent.
"""

import math
from collections import deque

import pytest
import torch
import torch.nn.functional as F

from cdpvae import InfoNCELoss, MomentumQueue


def normals(*shape, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(*shape, generator=generator, dtype=torch.float64)


def described(anchor, positive, queue=None, temperature=0.07, normalize=True):
    """The positive first, the negatives with their diagonal masked, label 0."""
    if normalize:
        anchor = anchor / anchor.norm(dim=1, keepdim=True)
        positive = positive / positive.norm(dim=1, keepdim=True)
    similarity = anchor @ positive.t() / temperature
    negatives = similarity.masked_fill(torch.eye(len(anchor), dtype=torch.bool), -math.inf)
    logits = [similarity.diag()[:, None], negatives]
    if queue is not None:
        logits.append(anchor @ queue.t() / temperature)
    labels = torch.zeros(len(anchor), dtype=torch.int64)
    return F.cross_entropy(torch.cat(logits, dim=1), labels)


@pytest.mark.parametrize("with_queue", [False, True])
@pytest.mark.parametrize("normalize, temperature", [(True, 0.07), (False, 2.0)])
def test_value_and_gradients_equal_the_description(with_queue, normalize, temperature):
    anchor, positive = (normals(5, 3, seed=s).requires_grad_() for s in (1, 2))
    queue = F.normalize(normals(4, 3, seed=3), dim=1) if with_queue else None
    got = InfoNCELoss(temperature, normalize)(anchor, positive, queue).loss
    want = described(anchor, positive, queue, temperature, normalize)
    torch.testing.assert_close(got, want, rtol=1e-12, atol=0)
    for a, b in zip(
        torch.autograd.grad(got, (anchor, positive)),
        torch.autograd.grad(want, (anchor, positive)),
        strict=True,
    ):
        torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-12)


def test_one_direction_only():
    anchor, positive = normals(4, 3, seed=1), normals(4, 3, seed=2)
    loss = InfoNCELoss()
    assert loss(anchor, positive).loss.item() != loss(positive, anchor).loss.item()


def test_bound_is_its_cap_minus_the_loss():
    anchor, positive, queue = normals(5, 3, seed=1), normals(5, 3, seed=2), normals(6, 3, seed=3)
    terms = InfoNCELoss()(anchor, positive, queue)
    assert terms.mi_cap == math.log(11)
    assert terms.mi_bound.item() == pytest.approx(math.log(11) - terms.loss.item())


def test_known_values():
    # Orthogonal rows: similarity 1/t on the diagonal, 0 elsewhere.
    terms = InfoNCELoss(0.5)(torch.eye(4), torch.eye(4))
    assert terms.loss.item() == pytest.approx(math.log(1 + 3 * math.exp(-2.0)))
    # All rows alike tell nothing: the bound is 0.
    alike = InfoNCELoss()(torch.ones(4, 3), torch.ones(4, 3))
    assert alike.loss.item() == pytest.approx(math.log(4))
    assert alike.mi_bound.item() == pytest.approx(0.0, abs=1e-6)
    # One row and no queue has nobody to be confused with.
    single = InfoNCELoss()(torch.ones(1, 3), torch.ones(1, 3))
    assert (single.loss.item(), single.mi_bound.item(), single.mi_cap) == (0.0, 0.0, 0.0)


def test_gathered_rows_are_anchors_and_candidates():
    anchor, positive = normals(6, 3, seed=1), normals(6, 3, seed=2)
    unit = F.normalize(anchor, dim=1), F.normalize(positive, dim=1)
    calls = iter(unit)

    def gather(rows):
        whole = next(calls)
        torch.testing.assert_close(rows, whole[:2])  # normalised before they travel
        return torch.cat((rows, whole[2:]))

    terms = InfoNCELoss()(anchor[:2], positive[:2], gather=gather)
    torch.testing.assert_close(terms.loss, described(anchor, positive))
    assert terms.mi_cap == math.log(6)
    torch.testing.assert_close(terms.positives, unit[1])


def test_queue_rows_get_no_gradient():
    queue = normals(2, 3, seed=3).requires_grad_()
    anchor = normals(2, 3, seed=1).requires_grad_()
    InfoNCELoss()(anchor, normals(2, 3, seed=2), queue).loss.backward()
    assert queue.grad is None and anchor.grad.count_nonzero() > 0


def test_bf16_rows_are_compared_in_fp32():
    anchor, positive = normals(4, 3, seed=1).bfloat16(), normals(4, 3, seed=2).bfloat16()
    got = InfoNCELoss()(anchor, positive).loss
    assert got.dtype == torch.float32
    # fp32 cosines divided by 0.07: about 1e-6.
    want = described(anchor.double(), positive.double())
    torch.testing.assert_close(got.double(), want, rtol=0, atol=1e-5)


@pytest.mark.parametrize("temperature", [0.0, -1.0, float("inf"), float("nan")])
def test_bad_temperature_is_refused(temperature):
    with pytest.raises(ValueError, match=f"temperature={temperature}"):
        InfoNCELoss(temperature)


@pytest.mark.parametrize(
    "anchor, positive",
    [
        pytest.param((2, 3), (3, 3), id="other_rows"),
        pytest.param((0, 3), (0, 3), id="no_rows"),
        pytest.param((3,), (3,), id="no_batch"),
    ],
)
def test_unpaired_rows_are_refused(anchor, positive):
    with pytest.raises(ValueError, match="anchor"):
        InfoNCELoss()(torch.zeros(anchor), torch.zeros(positive))


def test_queue_of_another_width_is_refused():
    with pytest.raises(ValueError, match=r"\(2, 4\).*\(rows, 3\)"):
        InfoNCELoss()(torch.ones(2, 3), torch.ones(2, 3), torch.zeros(2, 4))


# Smaller, as large and larger than the queue; nothing; several in a row that wrap around.
@pytest.mark.parametrize("sizes", [(2,), (5,), (9,), (0, 3), (2, 2, 2, 2), (4, 1, 7, 2)])
def test_queue_is_first_in_first_out(sizes):
    queue, model = MomentumQueue(5, dim=2), deque(maxlen=5)
    next_value = 0
    for size in sizes:
        rows = torch.arange(next_value, next_value + size).float()[:, None].expand(-1, 2)
        next_value += size
        queue.push(rows)
        model.extend(rows[:, 0].tolist())
        held = queue.rows()
        assert ([] if held is None else held[:, 0].tolist()) == list(model)
        assert len(queue) == len(model)


def test_queue_of_size_zero_holds_nothing():
    queue = MomentumQueue(dim=2)
    queue.push(torch.ones(3, 2))
    assert queue.rows() is None and len(queue) == 0


def test_queue_copies_what_it_takes():
    queue = MomentumQueue(4, dim=2)
    rows = torch.ones(2, 2, requires_grad=True)
    queue.push(rows)
    with torch.no_grad():
        rows.zero_()
    assert queue.rows().sum().item() == 4.0 and not queue.rows().requires_grad


def test_queue_state_round_trip_through_a_file(tmp_path):
    queue = MomentumQueue(4, dim=2)
    queue.push(torch.arange(12.0).reshape(6, 2))
    torch.save(queue.state_dict(), tmp_path / "queue.pt")
    restored = MomentumQueue(4, dim=2)
    restored.load_state_dict(torch.load(tmp_path / "queue.pt", weights_only=True))
    for twin in (queue, restored):
        twin.push(torch.full((1, 2), 99.0))
    assert torch.equal(restored.rows(), queue.rows())
    assert restored.rows()[:, 0].tolist() == [6.0, 8.0, 10.0, 99.0]


def test_queue_state_is_a_snapshot():
    queue = MomentumQueue(4, dim=2)
    queue.push(torch.ones(2, 2))
    state = queue.state_dict()
    restored = MomentumQueue(4, dim=2)
    restored.load_state_dict(state)
    state["rows"].zero_()
    assert torch.equal(queue.rows(), torch.ones(2, 2))
    assert torch.equal(restored.rows(), torch.ones(2, 2))


@pytest.mark.parametrize(
    "change, message",
    [
        pytest.param({"size": 8}, "size 8", id="other_size"),
        pytest.param({"dim": 3}, "dim 3", id="other_dim"),
        pytest.param({"rows": torch.zeros(5, 2)}, r"\(5, 2\)", id="too_many_rows"),
        pytest.param({"rows": torch.zeros(2, 3)}, r"\(2, 3\)", id="other_width"),
    ],
)
def test_queue_refuses_a_state_that_does_not_fit(change, message):
    queue = MomentumQueue(4, dim=2)
    with pytest.raises(ValueError, match=message):
        queue.load_state_dict(queue.state_dict() | change)


def test_queue_refuses_an_incomplete_state():
    with pytest.raises(ValueError, match=r"lacks \['rows'\]"):
        MomentumQueue(4, dim=2).load_state_dict({"size": 4, "dim": 2})


def test_queue_refuses_bad_settings_and_rows():
    with pytest.raises(ValueError, match="size=-1"):
        MomentumQueue(-1, dim=2)
    with pytest.raises(ValueError, match="dim=0"):
        MomentumQueue(1, dim=0)
    with pytest.raises(ValueError, match=r"\(1, 3\)"):
        MomentumQueue(0, dim=2).push(torch.zeros(1, 3))


def test_an_empty_queue_of_another_dimension_is_taken_over():
    """Version 0.1.0 gave the queue of a model without a latent the default dimension."""
    queue = MomentumQueue(0, dim=1)
    queue.load_state_dict(MomentumQueue(0, dim=64).state_dict())
    assert len(queue) == 0 and queue.dim == 1
