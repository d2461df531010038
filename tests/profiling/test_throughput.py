"""The FLOP formula against a count by hand and by torch; the meter against a clock we set."""

from types import SimpleNamespace

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from cdpvae.profiling import ThroughputMeter, peak_flops, training_flops
from cdpvae.profiling import throughput as module
from cdpvae.profiling.throughput import mfu, peak_memory_bytes

# Grouped queries (4 heads, 2 key/value heads) and a head size that is not hidden / heads.
LLAMA = SimpleNamespace(
    hidden_size=16,
    intermediate_size=20,
    num_hidden_layers=3,
    num_attention_heads=4,
    num_key_value_heads=2,
    head_dim=8,
    vocab_size=50,
)
# q 16*32, k and v 16*16 each, o 32*16, three MLP matrices of 16*20.
PER_LAYER = 512 + 2 * 256 + 512 + 3 * 320


def test_hand_computed_step():
    flops = training_flops(
        LLAMA,
        encoder_tokens=7,
        decoder_tokens=11,
        target_tokens=5,
        encoder_layers=2,
        recompute=True,
    )
    assert PER_LAYER == 2496
    expected = 2 * 2496 * 2 * 7  # encoder: forward
    expected += 3 * 2 * 2496 * 3 * 11  # decoder: forward, input gradient, recompute
    expected += 2 * 2 * 16 * 50 * 5  # output projection: forward, input gradient
    assert flops == expected


def test_no_recompute_saves_one_forward_of_the_decoder():
    def count(recompute):
        return training_flops(
            LLAMA,
            encoder_tokens=0,
            decoder_tokens=11,
            target_tokens=0,
            encoder_layers=3,
            recompute=recompute,
        )

    assert count(True) - count(False) == 2 * PER_LAYER * 3 * 11
    assert count(False) == 4 * PER_LAYER * 3 * 11


def test_equals_what_torch_counts_in_a_frozen_layer():
    """Matrix products of one frozen Llama layer and head, forward and input gradient."""
    hidden, tokens, targets = 16, 11, 5
    shapes = [(32, 16), (16, 16), (16, 16), (16, 32), (20, 16), (20, 16), (16, 20)]
    weights = [torch.randn(shape) for shape in shapes]
    head = torch.randn(50, hidden)
    with FlopCounterMode(display=False) as counter:
        for weight in weights:
            x = torch.randn(tokens, weight.shape[1], requires_grad=True)
            (x @ weight.T).sum().backward()
        x = torch.randn(targets, hidden, requires_grad=True)
        (x @ head.T).sum().backward()
    one_layer = SimpleNamespace(**{**vars(LLAMA), "num_hidden_layers": 1})
    assert counter.get_total_flops() == training_flops(
        one_layer,
        encoder_tokens=0,
        decoder_tokens=tokens,
        target_tokens=targets,
        encoder_layers=1,
        recompute=False,
    )


# Names as CUDA reports them.
@pytest.mark.parametrize(
    "name, peak",
    [
        ("NVIDIA L40S", 362e12),
        ("NVIDIA H200", 989e12),
        ("NVIDIA H100 80GB HBM3", 989e12),
        ("NVIDIA H100 PCIe", 756e12),
        ("NVIDIA A100-SXM4-80GB", 312e12),
        ("NVIDIA GeForce RTX 4090", 165e12),
        ("NVIDIA B200", 2250e12),
        ("NVIDIA H200 NVL", 835e12),
        ("NVIDIA A100 80GB PCIe", 312e12),
        ("NVIDIA RTX 6000 Ada Generation", 364e12),
        # Other chips, or a part of one, whose names contain that of a known device.
        ("NVIDIA RTX A1000", None),
        ("NVIDIA A100-SXM4-40GB MIG 1g.5gb", None),
        ("NVIDIA GeForce RTX 4090 Laptop GPU", None),
        ("NVIDIA GeForce RTX 4090 D", None),
        ("Tesla T4", None),
        ("cpu", None),
    ],
)
def test_peak_of_known_devices(name, peak):
    assert peak_flops(name) == peak


def test_mfu():
    assert mfu(3e12, 2.0, 1e12, world_size=2) == pytest.approx(0.75)
    assert mfu(3e12, 2.0, None, world_size=2) == 0.0


def test_meter_divides_by_the_time_since_the_last_report(monkeypatch):
    now = [100.0]
    monkeypatch.setattr(module.time, "perf_counter", lambda: now[0])
    meter = ThroughputMeter(world_size=2, peak=1e3, device=torch.device("cpu"))
    meter.add(300, 5e3)
    meter.add(100, 3e3)
    now[0] = 104.0
    speed = meter.report()
    assert speed.tokens_per_second == 100.0
    assert speed.mfu == pytest.approx(8e3 / (4 * 1e3 * 2))
    meter.add(10, 0.0)
    now[0] = 105.0
    assert meter.report().tokens_per_second == 10.0
    meter.add(1000, 0.0)
    now[0] = 200.0
    meter.restart()
    meter.add(6, 0.0)
    now[0] = 202.0
    assert meter.report().tokens_per_second == 3.0


def test_peak_memory_on_cpu_is_the_resident_set_in_bytes():
    before = peak_memory_bytes(torch.device("cpu"))
    # A Python with torch holds more than 50 MB and, were it pages or KiB, not a thousandth of it.
    assert 50e6 < before < 1e12
    held = torch.ones(before // 4 + 16 * 2**20)  # fp32: `before` bytes and 64 MiB on top
    assert peak_memory_bytes(torch.device("cpu")) >= before + 32 * 2**20
    del held
