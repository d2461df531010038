"""Which implementation runs, and what is said where the one asked for cannot."""

from contextlib import contextmanager
from types import SimpleNamespace

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode

from cdpvae_kernels import describe, linear_cross_entropy
from cdpvae_kernels.common import dispatch, runtime
from cdpvae_kernels.common.dispatch import choose, choose_name
from support.triton import DEVICE

# A device's name is enough: nothing runs on it.
CPU, GPU = torch.device("cpu"), torch.device("cuda", 0)
BOTH = {"reference": "plain", "triton": "kernel"}


def test_the_device_decides_where_nothing_is_asked_for():
    assert choose("op", None, CPU, BOTH) == "plain"
    assert choose("op", None, CPU, {**BOTH, "tiled": "tiles"}) == "tiles"
    assert choose("op", None, GPU, BOTH, torch.bfloat16) == "kernel"
    assert choose("op", None, GPU, {"reference": "plain"}) == "plain"


def test_fp64_is_the_references_on_every_device():
    assert choose_name("op", None, GPU, BOTH, torch.float64) == "reference"
    with pytest.raises(ValueError, match="op computes in torch.float64; kernels take"):
        choose("op", "triton", GPU, BOTH, torch.float64)


def test_without_triton_a_gpu_gets_the_reference(monkeypatch):
    monkeypatch.setattr(dispatch, "triton_is_installed", lambda: False)
    assert choose("op", None, GPU, BOTH) == "plain"
    with pytest.raises(ValueError, match="op needs the package triton, which is not installed"):
        choose("op", "triton", GPU, BOTH)


def test_kernels_on_a_cpu_need_the_interpreter(monkeypatch):
    monkeypatch.setattr(runtime, "interpreting", lambda: False)
    with pytest.raises(ValueError, match="op got tensors on cpu; kernels run on a GPU, or"):
        choose("op", "triton", CPU, BOTH)
    monkeypatch.setattr(runtime, "interpreting", lambda: True)
    assert choose("op", "triton", CPU, BOTH, torch.float32) == "kernel"
    with pytest.raises(ValueError, match="bfloat16 arithmetic silently returns garbage"):
        choose("op", "triton", CPU, BOTH, torch.bfloat16)


def test_an_unknown_implementation_names_the_known_ones():
    with pytest.raises(ValueError, match=r"impl='cuda': op has .* \['reference', 'triton'\]"):
        choose("op", "cuda", CPU, BOTH)


def test_tiles_are_for_cpus():
    tiled = {**BOTH, "tiled": "tiles"}
    assert choose("op", "tiled", CPU, tiled) == "tiles"
    with pytest.raises(ValueError, match="impl='tiled': op got tensors on cuda:0; tiles are cut"):
        choose("op", "tiled", GPU, tiled)


def test_kernels_are_launched_on_the_device_of_their_tensors(monkeypatch):
    """Triton asks for the current device alone, and autograd or a trainer need not have set it."""
    seen = []

    @contextmanager
    def current(device):
        seen.append(device)
        yield
        seen.append("before")

    launch = SimpleNamespace(draw=lambda *tensors: seen.append("launch"))
    with FakeTensorMode():
        first, second = torch.empty(2), torch.empty(2, device="cuda:1")
    monkeypatch.setattr(torch.cuda, "device", current)
    monkeypatch.setattr(dispatch.importlib, "import_module", lambda name: launch)
    dispatch.from_triton("philox", "draw")(None, first, second)
    assert seen == [torch.device("cuda", 1), "launch", "before"]
    # Without a GPU there is none to choose.
    dispatch.from_triton("philox", "draw")(first)
    assert seen[3:] == ["launch"]


@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two GPUs")
def test_a_second_gpu_computes_what_the_first_does():
    hidden, weight = torch.randn(6, 16, device="cuda:0"), torch.randn(33, 16, device="cuda:0")
    operands = (hidden, weight, torch.randint(33, (6,), device="cuda:0"))
    losses = []
    for device in ("cuda:0", "cuda:1"):
        losses.append(linear_cross_entropy(*(x.to(device) for x in operands), impl="triton").cpu())
    assert torch.equal(*losses)


def test_what_runs_is_said_for_the_log():
    assert describe(None, CPU) == "tiled (plain PyTorch)"
    assert describe("triton", DEVICE).startswith("triton (launch_configs.json: ")
