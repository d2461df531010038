"""What rarely occurs: on the GPU where there is one, else in Triton's interpreter."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from cdpvae_kernels import (
    bow_bce,
    bow_categorical,
    linear_cross_entropy,
    prefixed_embedding,
    word_dropout,
)
from cdpvae_kernels.bag_of_words import triton_launch as bow_launch
from cdpvae_kernels.linear_cross_entropy import triton_launch as cross_entropy_launch
from cdpvae_kernels.linear_cross_entropy.interface import Options
from cdpvae_kernels.prefixed_embedding import triton_launch as gather_launch
from support.triton import DEVICE, poisoned  # noqa: F401

needs_a_gpu = pytest.mark.skipif(DEVICE.type != "cuda", reason="gigabytes, or a GPU's own")
V, D, Z = 37, 16, 8
# Empty sequences at both ends and between; no sequence longer than a token; nothing but empty ones.
LENGTHS = {"empty": [0, 3, 0, 5, 0], "one token each": [1, 1, 1], "all empty": [0, 0]}
each_lengths = pytest.mark.parametrize("lengths", LENGTHS.values(), ids=LENGTHS)


def packed(lengths):
    ids = torch.arange(sum(lengths), device=DEVICE) % V
    return ids, torch.tensor([0, *lengths], device=DEVICE).cumsum(0).to(torch.int32)


def random(*shape):
    draw = torch.Generator().manual_seed(len(shape))
    return torch.randn(*shape, generator=draw).to(DEVICE).requires_grad_()


@pytest.mark.usefixtures("poisoned")
@each_lengths
def test_empty_sequences_and_single_tokens(lengths):
    """An instruction may be empty; where no sequence has a second token, nothing is predicted."""
    ids, cu_seqlens = packed(lengths)
    rows = len(lengths)
    sample = torch.arange(rows, device=DEVICE)
    losses = []
    for impl in ("reference", "triton"):
        operands = [random(rows, Z), random(V, Z), random(V), random(V, D), random(rows, 2, D)]
        z, weight, bias, embedding, prompts = operands
        dropped = word_dropout(
            ids, cu_seqlens, sample, rate=0.5, fill_id=1, seed=3, epoch=1, impl=impl
        )
        hidden, _ = prefixed_embedding(embedding, dropped, cu_seqlens, prompts, impl=impl)
        # Every token but the first of its sequence is predicted from where it is.
        first = torch.isin(torch.arange(len(ids), device=DEVICE), cu_seqlens)
        targets = ids[~first]
        loss = linear_cross_entropy(
            hidden,
            embedding,
            targets,
            positions=torch.arange(len(targets), device=DEVICE),
            ignore_index=None,
            impl=impl,
        )
        if lengths != [0, 3, 0, 5, 0]:
            assert loss == 0
        for bow in (bow_bce, bow_categorical):
            loss = loss + bow(z, weight, bias, ids, cu_seqlens, impl=impl)
        gradients = torch.autograd.grad(loss, operands, allow_unused=True)
        losses.append((dropped, loss.detach(), *gradients))
    for want, got in zip(*losses, strict=True):
        assert want is None or got.isfinite().all()
        torch.testing.assert_close(got, want, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("impl", ["reference", "triton"] + ["tiled"] * (DEVICE.type == "cpu"))
def test_statistics_have_no_gradient_to_mistake_for_one(impl):
    hidden, weight = random(6, D), random(V, D)
    targets = torch.tensor([3, -100, 5, 7, 0, 36], device=DEVICE)
    loss, stats = linear_cross_entropy(hidden, weight, targets, return_stats=True, impl=impl)
    assert not stats.nll.requires_grad and not stats.lse.requires_grad
    with pytest.raises(RuntimeError, match="does not require grad"):
        stats.nll.sum().backward()
    # Added to the loss they change its value alone.
    (alone,) = torch.autograd.grad(loss, hidden, retain_graph=True)
    (beside,) = torch.autograd.grad(loss + stats.nll.sum() + stats.lse.sum(), hidden)
    assert torch.equal(alone, beside) and alone.abs().sum() > 0


def wrong_targets():
    targets = torch.tensor([3, V, 5], device=DEVICE)
    scale = torch.ones((), device=DEVICE)
    operands = random(3, D).detach(), random(V, D).detach(), targets
    cross_entropy_launch.linear_cross_entropy(*operands, None, scale, Options())


def negative_target():
    targets = torch.tensor([3, -100, 5], device=DEVICE)
    scale = torch.ones((), device=DEVICE)
    operands = random(3, D).detach(), random(V, D).detach(), targets
    cross_entropy_launch.linear_cross_entropy(*operands, None, scale, Options())


def wrong_bag():
    ids, cu_seqlens = packed([2, 1])
    head = random(2, Z).detach(), random(V, Z).detach(), random(V).detach()
    bow_launch.bce(*head, ids.fill_(V), cu_seqlens, False, False)


def wrong_tokens():
    ids, cu_seqlens = packed([2, 1])
    gather_launch.pack(random(V, D).detach(), ids.fill_(-1), cu_seqlens, random(2, 1, D).detach())


WRONG = {f.__name__: f for f in (wrong_targets, negative_target, wrong_bag, wrong_tokens)}


@pytest.mark.parametrize("name", WRONG)
def test_the_debug_flag_finds_what_is_out_of_range(name, monkeypatch):
    """On a GPU nobody reads the values; under TRITON_DEBUG=1 the kernels look at them."""
    if DEVICE.type == "cuda":
        # An assertion on the device ends what its process can do with it.
        here = Path(__file__).parent
        paths = [str(here), str(here.parent)]
        command = f"import sys; sys.path[:0] = {paths}; import test_situations as t"
        command += f"; t.{name}(); t.wait()"
        done = subprocess.run(
            [sys.executable, "-c", command],
            env=os.environ | {"TRITON_DEBUG": "1"},
            capture_output=True,
            text=True,
        )
        assert done.returncode != 0 and "assert" in done.stderr.lower()
        return
    from triton.runtime import interpreter

    builder = interpreter.interpreter_builder
    monkeypatch.setattr(builder, "options", interpreter.InterpreterOptions(debug=True))
    with pytest.raises(Exception, match="outside the vocabulary|is negative"):
        WRONG[name]()


def wait():
    """Wait for the GPU, which is when it reports what its kernels have found."""
    torch.cuda.synchronize()


@needs_a_gpu
def test_the_gather_past_two_to_the_31():
    """540,000 positions x 4,096 columns: the last ones lie past 2^31 elements."""
    tokens, width = 540_000, 4096
    embedding = torch.randn(V, width, device=DEVICE).bfloat16()
    ids = torch.randint(V, (tokens,), device=DEVICE)
    cu_seqlens = torch.tensor([0, tokens - 3, tokens], dtype=torch.int32, device=DEVICE)
    prompts = torch.randn(2, 4, width, device=DEVICE).bfloat16().requires_grad_()
    hidden, _ = prefixed_embedding(embedding, ids, cu_seqlens, prompts, impl="triton")
    assert hidden.numel() > 2**31
    assert torch.equal(hidden[-3:], embedding[ids[-3:]])
    assert torch.equal(hidden[-7:-3], prompts[1])
    upstream = torch.zeros_like(hidden)
    upstream[-7:-3] = 3.0
    (grad,) = torch.autograd.grad(hidden, prompts, upstream)
    assert torch.equal(grad[1], torch.full_like(grad[1], 3.0)) and grad[0].abs().sum() == 0


@needs_a_gpu
@pytest.mark.parametrize("launch", [bow_launch.bce, bow_launch.categorical])
def test_the_bags_errors_past_two_to_the_31(launch):
    """16,800 rows x 128,256 tokens: the last rows' errors lie past 2^31 elements."""
    rows, vocab, width = 16_800, 128_256, 16
    head = [torch.randn(n, width, device=DEVICE).bfloat16() for n in (rows, vocab)]
    bias = torch.randn(vocab, device=DEVICE).bfloat16()
    ids = torch.randint(vocab, (rows,), device=DEVICE)
    cu_seqlens = torch.arange(rows + 1, dtype=torch.int32, device=DEVICE)
    _, grad_z, errors = launch(*head, bias, ids, cu_seqlens, True, True)
    assert errors.numel() > 2**31
    # The last 32 rows alone: the same blocks of rows, so the same products.
    alone = launch(head[0][-32:], head[1], bias, ids[-32:], cu_seqlens[:33], True, True)
    torch.testing.assert_close(errors[-32:], alone.errors, rtol=1e-2, atol=1e-6)
    torch.testing.assert_close(grad_z[-32:], alone.grad_z, rtol=1e-2, atol=1e-4)
