"""Bag of words against dense multi-hot targets, counted token by token.

Legend: B rows, Z latent, V vocabulary.
"""

from typing import NamedTuple

import pytest
import torch
import torch.nn.functional as F
from torch._subclasses.fake_tensor import FakeTensorMode

from cdpvae import compute_bow_loss
from cdpvae.batch import PackedText
from cdpvae.config import LossConfig
from cdpvae.loss import content_ids
from cdpvae.loss.bow import bow_loss as loss_of_head
from support.triton import DEVICE

BOS, EOS, PAD, V, Z = 0, 1, 2, 17, 4
SPECIAL = torch.tensor([BOS, EOS, PAD])
# Repeats; special ids in the middle; nothing but special ids; the largest id.
ROWS = [[BOS, 5, 5, 9, EOS], [BOS, 7, PAD, 3, BOS, 3, EOS], [BOS, EOS], [BOS, V - 1, EOS]]
CONTENT = [[5, 5, 9], [7, 3, 3], [], [V - 1]]


class Head(NamedTuple):
    """What `nn.Linear` has, with tensors of the test's own dtype."""

    weight: torch.Tensor
    bias: torch.Tensor


def bow_loss(z, weight, bias, *rest):
    return loss_of_head(z, Head(weight, bias), *rest)


def head(seed=0):
    generator = torch.Generator().manual_seed(seed)
    shapes = ((len(ROWS), Z), (V, Z), (V,))
    return [
        torch.randn(shape, generator=generator, dtype=torch.float64).requires_grad_()
        for shape in shapes
    ]


def dense_bce(z, weight, bias):
    present = torch.zeros(len(ROWS), V, dtype=z.dtype)
    for row, tokens in enumerate(CONTENT):
        present[row, tokens] = 1.0
    return F.binary_cross_entropy_with_logits(z @ weight.t() + bias, present)


def dense_categorical(z, weight, bias):
    log_p = (z @ weight.t() + bias).log_softmax(-1)
    rows = [
        -log_p[row, tokens].sum() / len(tokens) if tokens else z.new_zeros(())
        for row, tokens in enumerate(CONTENT)
    ]
    return torch.stack(rows).mean()


def test_special_ids_are_marked_in_their_places():
    ids = content_ids(PackedText.from_lists(ROWS), SPECIAL)
    places = [token if token > PAD else -1 for row in ROWS for token in row]
    assert ids.tolist() == places and ids.dtype == torch.int64
    assert [token for token in places if token >= 0] == [t for row in CONTENT for t in row]


# "reference" is what a compiled graph takes on a CPU, "triton" what it takes on a GPU.
@pytest.mark.parametrize("impl", ["reference", "triton"])
@pytest.mark.parametrize("reduction", ["bce", "categorical"])
def test_special_ids_are_left_out_of_a_compiled_function(reduction, impl):
    inputs = [x.detach().float() for x in head()]
    text = PackedText.from_lists(ROWS)

    def loss_of(z, weight, bias, ids, cu_seqlens, special):
        packed = PackedText(ids, cu_seqlens, text.max_len)
        return loss_of_head(z, Head(weight, bias), packed, special, reduction, impl=impl)

    torch.compiler.reset()
    results = []
    for run in (loss_of, torch.compile(loss_of, backend="aot_eager", fullgraph=True)):
        leaves = [x.to(DEVICE).requires_grad_() for x in inputs]
        packed = (text.ids.to(DEVICE), text.cu_seqlens.to(DEVICE), SPECIAL.to(DEVICE))
        loss = run(*leaves, *packed)
        results.append((loss.detach(), *torch.autograd.grad(loss, leaves)))
    assert all(torch.equal(a, b) for a, b in zip(*results, strict=True))
    # The truth is the dense form, in fp64.
    oracle = dense_bce if reduction == "bce" else dense_categorical
    want = oracle(*(x.double() for x in inputs)).float().to(DEVICE)
    torch.testing.assert_close(results[0][0], want, rtol=1e-5, atol=0)


@pytest.mark.parametrize(
    "reduction, oracle", [("bce", dense_bce), ("categorical", dense_categorical)]
)
def test_value_and_gradients_equal_the_dense_form(reduction, oracle):
    inputs = head()
    got = bow_loss(*inputs, PackedText.from_lists(ROWS), SPECIAL, reduction)
    want = oracle(*inputs)
    torch.testing.assert_close(got, want, rtol=1e-12, atol=0)
    for a, b in zip(
        torch.autograd.grad(got, inputs), torch.autograd.grad(want, inputs), strict=True
    ):
        torch.testing.assert_close(a, b, rtol=1e-10, atol=1e-14)


def test_default_reduction_is_the_descriptions():
    inputs = head()
    reduction = LossConfig().bow_reduction
    got = bow_loss(*inputs, PackedText.from_lists(ROWS), SPECIAL, reduction)
    torch.testing.assert_close(got, dense_bce(*inputs), rtol=1e-12, atol=0)


def test_padded_form_equals_the_dense_form():
    width = max(map(len, CONTENT))
    padded = torch.tensor([row + [-100] * (width - len(row)) for row in CONTENT])
    z, weight, bias = head()
    got = compute_bow_loss(z @ weight.t() + bias, padded)
    torch.testing.assert_close(got, dense_bce(z, weight, bias), rtol=1e-12, atol=0)


def test_padded_form_takes_ignored_positions_anywhere():
    padded = torch.tensor(
        [[-100, 5, 5, -100, 9], [7, -100, 3, 3, -100], [-100] * 5, [-100, V - 1] + [-100] * 3]
    )
    inputs = head()
    z, weight, bias = inputs
    got = compute_bow_loss(z @ weight.t() + bias, padded)
    want = dense_bce(*inputs)
    torch.testing.assert_close(got, want, rtol=1e-12, atol=0)
    for a, b in zip(
        torch.autograd.grad(got, inputs), torch.autograd.grad(want, inputs), strict=True
    ):
        torch.testing.assert_close(a, b, rtol=1e-12, atol=1e-15)


def test_ignored_positions_do_not_mark_token_zero():
    logits = torch.zeros(1, 3).index_fill_(1, torch.tensor([0]), -20.0)
    # Token 0 is certain to be absent: were -100 taken for it, the loss would be 20 / 3 higher.
    got = compute_bow_loss(logits, torch.tensor([[-100, -100]]))
    want = F.binary_cross_entropy_with_logits(logits, torch.zeros(1, 3))
    torch.testing.assert_close(got, want)


def test_empty_batch_is_zero():
    assert compute_bow_loss(torch.zeros(0, V), torch.zeros(0, 2, dtype=torch.int64)).item() == 0.0


def test_only_special_tokens_categorical_is_zero():
    z, weight, bias = (x.detach() for x in head())
    z = z[:1].requires_grad_()
    loss = bow_loss(z, weight, bias, PackedText.from_lists([[BOS, EOS]]), SPECIAL, "categorical")
    loss.backward()
    assert loss.item() == 0.0 and z.grad.count_nonzero() == 0


def test_bce_fades_with_the_vocabulary_and_categorical_does_not():
    # The remark in the module: the same text and z, 64 times the vocabulary.
    def gradient(vocab, reduction):
        generator = torch.Generator().manual_seed(5)
        weight = torch.randn(vocab, Z, generator=generator) * 0.02
        z = torch.randn(1, Z, generator=generator).requires_grad_()
        text = PackedText.from_lists([[5, 6, 7, 8]])
        loss = bow_loss(z, weight, torch.full((vocab,), -8.0), text, SPECIAL, reduction)
        return torch.autograd.grad(loss, z)[0].norm().item()

    assert gradient(64 * 32, "bce") < gradient(32, "bce") / 16
    assert gradient(64 * 32, "categorical") > gradient(32, "categorical") / 4


def test_shapes_propagate_without_data():
    with FakeTensorMode():
        z = torch.empty(2, Z, requires_grad=True)
        text = PackedText(
            torch.empty(9, dtype=torch.int64), torch.empty(3, dtype=torch.int32), max_len=6
        )
        special = torch.empty(3, dtype=torch.int64)
        loss = bow_loss(z, torch.empty(V, Z), torch.empty(V), text, special, "categorical")
        loss.backward()
        assert loss.shape == () and z.grad.shape == (2, Z)


def test_other_reductions_are_refused():
    with pytest.raises(ValueError, match="bow_reduction='mean'.*categorical"):
        bow_loss(*head(), PackedText.from_lists(ROWS), SPECIAL, "mean")


@pytest.mark.parametrize("wrong", [V, -1])
def test_padded_ids_outside_the_vocabulary_are_refused(wrong):
    with pytest.raises(ValueError, match=f"holds {wrong}"):
        compute_bow_loss(torch.zeros(1, V), torch.tensor([[3, wrong]]))


def test_padded_form_refuses_another_batch():
    with pytest.raises(ValueError, match=r"\(2, 17\).*\(1, 3\)"):
        compute_bow_loss(torch.zeros(2, V), torch.zeros(1, 3, dtype=torch.int64))
