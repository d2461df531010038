"""Every shipped configuration compiles for both architectures within its limits, without a GPU."""

import csv
import json
import os
import re
import subprocess
import sys

import pytest

from cdpvae_kernels import resources
from cdpvae_kernels.common.launch_configs import SHIPPED


@pytest.fixture(scope="module")
def usages(tmp_path_factory):
    """Compiled in another process: in this one the kernels may be the interpreter's."""
    path = tmp_path_factory.mktemp("resources") / "usage.csv"
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    result = subprocess.run(
        [sys.executable, "-m", "cdpvae_kernels.resources", "--check", "--csv", str(path)],
        env=environment,
        capture_output=True,
        text=True,
    )
    print(result.stdout)
    assert result.returncode == 0, result.stderr
    with path.open() as file:
        return list(csv.DictReader(file))


@pytest.mark.parametrize("arch", resources.DEFAULT_ARCHITECTURES)
def test_hot_kernels_do_not_spill_and_blocks_fit(usages, arch):
    rows = [row for row in usages if row["arch"] == arch]
    assert rows
    for row in rows:
        assert row["hot"] == "False" or row["spills"] == "0", row
        assert int(row["shared"]) <= resources.SHARED_MEMORY_LIMIT[arch], row
        assert 16 <= int(row["registers"]) <= 255, row


def test_a_gpu_keeps_nan_what_it_is(usages):
    """`min.f32` of NaN and a number is the number; the interpreter would not show it."""
    wanted = {name for name, spec in resources.specializations().items() if spec.keeps_nan}
    assert len(wanted) == 2 and all("linear_cross_entropy.rows" in name for name in wanted)
    assert {row["drops_nan"] for row in usages if row["kernel"] in wanted} == {"False"}


@pytest.mark.parametrize("arch", resources.DEFAULT_ARCHITECTURES)
def test_half_the_warps_of_a_multiprocessor_share_the_pass_over_the_logits(usages):
    """Fewer do not hide the latency of its loads: a block of 16 warps x 91 registers was alone."""
    most_warps = {"sm_89": 48, "sm_90": 64}
    for row in usages:
        if row["kernel"].startswith("linear_cross_entropy.rows"):
            warps = int(re.search(r"num_warps=(\d+)", row["config"])[1])
            # Registers are handed out in eights; a multiprocessor has 65,536.
            registers = -(-int(row["registers"]) // 8) * 8
            blocks = 65536 // (registers * 32 * warps)
            assert 2 * blocks * warps >= most_warps[row["arch"]], row


def test_every_configured_kernel_is_compiled(usages, arch):
    configured = set(json.loads(SHIPPED.read_text())[arch])
    compiled = {row["kernel"].split()[0] for row in usages if row["arch"] == arch}
    assert compiled == configured


def test_what_passes_a_limit_is_named():
    fine = resources.Usage("sm_89", "op.kernel", "BLOCK=1", 64, 0, 101376, True)
    assert fine.problem() is None
    spilling = resources.Usage("sm_89", "op.kernel", "BLOCK=1", 255, 3, 0, True)
    assert spilling.problem() == "sm_89 op.kernel (BLOCK=1): 3 spills"
    # Under triton 3.6, which torch 2.11 brings, up to eight stores are let through.
    assert spilling.problem(resources.accepted_spills("3.6.0")) is None
    many = resources.Usage("sm_89", "op.kernel", "BLOCK=1", 255, 9, 0, True)
    assert many.problem(resources.accepted_spills("3.6.0")).endswith("9 spills")
    assert resources.accepted_spills("3.7.1") == resources.accepted_spills("4.0.0") == 0
    dropping = resources.Usage("sm_89", "op.kernel", "BLOCK=1", 64, 0, 0, True, drops_nan=True)
    assert dropping.problem().endswith("NaN becomes a number")
    large = resources.Usage("sm_89", "op.kernel", "BLOCK=1", 64, 0, 101377, False)
    assert "101377 bytes > 101376" in large.problem()


def test_an_unknown_architecture_is_refused():
    with pytest.raises(ValueError, match="arch='sm_12'; known are sm_80"):
        resources.measure("sm_12")
