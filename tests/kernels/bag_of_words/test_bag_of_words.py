"""Bag-of-words losses in plain PyTorch against dense formulas in fp64.

Every test runs with the definition (`reference`), with what a CPU takes by itself, and with the
latter in tiles so small that nine tokens fill three.
"""

import sys
from functools import partial

import pytest
import torch
import torch.nn.functional as F
from torch._subclasses.fake_tensor import FakeTensorMode

from cdpvae_kernels import bow_bce, bow_categorical
from cdpvae_kernels.bag_of_words import tiled

V, Z = 9, 4
# Repeats, an empty row, a single token, the vocabulary's ends.
ROWS = [[3, 3, 0, 8, 3], [], [5], [1, 2, 2]]


@pytest.fixture(autouse=True, params=["reference", "tiled", "small tiles"])
def implementation(request, monkeypatch):
    if request.param == "reference":
        plain = partial(bow_bce, impl="reference")
        monkeypatch.setattr(sys.modules[__name__], "bow_bce", plain)
    # Four columns a tile, however few the rows are.
    elif request.param == "small tiles":
        monkeypatch.setattr(tiled, "BOW_COLUMNS", 4)
        monkeypatch.setattr(tiled, "BOW_CELLS", 0)
    return request.param


def pack(rows):
    lengths = torch.tensor([0] + [len(row) for row in rows])
    ids = torch.tensor([token for row in rows for token in row], dtype=torch.int64)
    return ids, lengths.cumsum(0).to(torch.int32)


def head(batch=4, dtype=torch.float64, scale=1.0):
    draw = torch.Generator().manual_seed(0)
    shapes = ((batch, Z), (V, Z), (V,))
    return [
        (torch.randn(shape, dtype=torch.float64, generator=draw) * scale).to(dtype).requires_grad_()
        for shape in shapes
    ]


def dense_bce(z, weight, bias, rows, reduction):
    multi_hot = torch.zeros(len(rows), V, dtype=torch.float64)
    for row, tokens in enumerate(rows):
        for token in tokens:
            multi_hot[row, token] = 1.0
    logits = z.double() @ weight.double().T + bias.double()
    return F.binary_cross_entropy_with_logits(logits, multi_hot, reduction=reduction)


def dense_categorical(z, weight, bias, rows):
    log_p = torch.log_softmax(z.double() @ weight.double().T + bias.double(), dim=-1)
    total = 0.0
    for row, tokens in enumerate(rows):
        if tokens:
            total = total - sum(log_p[row, token] for token in tokens) / len(tokens)
    return total / len(rows)


# Ours and the formula, by name.
LOSSES = {
    "mean": (
        lambda z, w, b, ids, cu: bow_bce(z, w, b, ids, cu),
        lambda z, w, b, rows: dense_bce(z, w, b, rows, "mean"),
    ),
    "sum": (
        lambda z, w, b, ids, cu: bow_bce(z, w, b, ids, cu, reduction="sum"),
        lambda z, w, b, rows: dense_bce(z, w, b, rows, "sum"),
    ),
    "categorical": (bow_categorical, dense_categorical),
}
each_loss = pytest.mark.parametrize("name", LOSSES)


@each_loss
def test_equals_the_dense_formula_with_gradients(name):
    loss, formula = LOSSES[name]
    ours, dense = head(), head()
    got = loss(*ours, *pack(ROWS))
    expected = formula(*dense, ROWS)
    torch.testing.assert_close(got, expected, rtol=1e-12, atol=0)
    # A factor other than 1: the upstream gradient must arrive.
    (1.5 * got).backward()
    (1.5 * expected).backward()
    for a, b in zip(ours, dense, strict=True):
        torch.testing.assert_close(a.grad, b.grad, rtol=1e-12, atol=1e-14)


@each_loss
def test_int32_ids(name):
    ids, cu = pack(ROWS)
    loss, _ = LOSSES[name]
    assert torch.equal(loss(*head(), ids.int(), cu), loss(*head(), ids, cu))


@each_loss
def test_gradcheck(name):
    ids, cu = pack(ROWS)
    assert torch.autograd.gradcheck(lambda *h: LOSSES[name][0](*h, ids, cu), head())


def test_a_repeat_counts_once_in_the_set_and_each_time_in_the_bag():
    # One row with and without repeats of a token.
    once, thrice = pack([[1, 4]]), pack([[1, 4, 4, 4]])
    layer = head(batch=1)
    assert torch.equal(bow_bce(*layer, *once), bow_bce(*layer, *thrice))
    log_p = torch.log_softmax(F.linear(*layer)[0], dim=-1)
    expected = -(log_p[1] + 3 * log_p[4]) / 4
    torch.testing.assert_close(bow_categorical(*layer, *thrice), expected)


def test_a_row_without_ids_is_all_negative_and_has_no_bag():
    layer = head(batch=1)
    empty = pack([[]])
    # Every token absent: softplus of each logit.
    expected = F.softplus(F.linear(*layer)).mean()
    torch.testing.assert_close(bow_bce(*layer, *empty), expected)
    loss = bow_categorical(*layer, *empty)
    loss.backward()
    assert loss.item() == 0.0
    assert all(torch.count_nonzero(p.grad) == 0 for p in layer)


@each_loss
def test_no_rows_give_zero(name):
    layer = head(batch=0)
    loss = LOSSES[name][0](*layer, *pack([]))
    loss.backward()
    assert loss.item() == 0.0
    assert all(torch.count_nonzero(p.grad) == 0 for p in layer)


@each_loss
def test_extreme_logits_stay_finite(name):
    # Logits of some thousands, past exp's range.
    layer = head(dtype=torch.float32, scale=30.0)
    loss, formula = LOSSES[name]
    got = loss(*layer, *pack(ROWS))
    got.backward()
    torch.testing.assert_close(got.double(), formula(*layer, ROWS), rtol=1e-6, atol=0)
    assert all(torch.isfinite(p.grad).all() for p in layer)


@each_loss
def test_half_precision_inputs_are_computed_in_fp32(name):
    layer = head(dtype=torch.bfloat16)
    loss, formula = LOSSES[name]
    got = loss(*layer, *pack(ROWS))
    # The truth is of the rounded inputs: only the computing must be fp32.
    assert got.dtype == torch.float32
    torch.testing.assert_close(got.double(), formula(*layer, ROWS), rtol=1e-6, atol=0)
    got.backward()
    assert {p.grad.dtype for p in layer} == {torch.bfloat16}


@each_loss
def test_twice_the_same_bits(name):
    def run():
        layer = head(dtype=torch.float32)
        got = LOSSES[name][0](*layer, *pack(ROWS))
        return got, *torch.autograd.grad(got, layer)

    assert all(torch.equal(a, b) for a, b in zip(run(), run(), strict=True))


@each_loss
def test_shapes_propagate_without_data(name):
    with FakeTensorMode():
        layer = [torch.empty(shape, requires_grad=True) for shape in ((2, Z), (V, Z), (V,))]
        ids = torch.empty(7, dtype=torch.int64)
        loss = LOSSES[name][0](*layer, ids, torch.empty(3, dtype=torch.int32))
        loss.backward()
        assert loss.shape == () and layer[1].grad.shape == (V, Z)


@each_loss
def test_wrong_arguments_are_refused(name):
    z, weight, bias = head()
    ids, cu = pack(ROWS)
    loss, _ = LOSSES[name]

    def refused(message, *arguments):
        with pytest.raises(ValueError, match=message):
            loss(*arguments)

    # Shapes and dtypes of the operands.
    refused(r"z has shape \(3, 4\); it must be \(4, Z\)", z[:3], weight, bias, ids, cu)
    refused(r"weight has shape \(9, 3\); it must be \(V, 4\)", z, weight[:, :3], bias, ids, cu)
    refused(r"bias has shape \(8,\); it must be \(9\)", z, weight, bias[:8], ids, cu)
    refused(r"z has dtype torch.int64", z.long(), weight, bias, ids, cu)
    # Ids outside the vocabulary or of a wrong dtype.
    refused(r"ids holds 9; .*\[0, 9\)", z, weight, bias, ids + 1, cu)
    refused(r"ids holds -1", z, weight, bias, ids - 1, cu)
    refused(r"ids has dtype torch.float32", z, weight, bias, ids.float(), cu)
    # Offsets that do not describe the ids.
    refused(r"cu_seqlens has dtype torch.int64", z, weight, bias, ids, cu.long())
    refused(r"cu_seqlens runs from 0 to 9; .* 8", z, weight, bias, ids[:8], cu)
    decreasing = torch.tensor([0, 6, 5, 6, 9], dtype=torch.int32)
    refused(r"cu_seqlens decreases", z, weight, bias, ids, decreasing)
    refused(r"cu_seqlens is empty", z, weight, bias, ids, cu[:0])


def test_wrong_settings_are_refused():
    layer, packed = head(), pack(ROWS)
    with pytest.raises(ValueError, match=r"reduction='none'; it must be 'mean' or 'sum'"):
        bow_bce(*layer, *packed, reduction="none")
    with pytest.raises(ValueError, match=r"impl='triton': bow_bce computes in torch.float64"):
        bow_bce(*layer, *packed, impl="triton")
    with pytest.raises(ValueError, match=r"impl='cuda': bow_categorical has .*'triton'"):
        bow_categorical(*layer, *packed, impl="cuda")
