"""What an older version has written stays readable: resumed and evaluated to the same numbers.

The fixtures are described in their README. Where torch and the CPU are those of the recording the
numbers must agree bit for bit; elsewhere to 1e-4, which is a thousand times the rounding of fp32
and a tenth of what one skipped tensor changes.
"""

from __future__ import annotations

import json
import subprocess
import tarfile
from pathlib import Path

import pytest
import torch

from support.runs import REPOSITORY, launcher, run_command, run_warm

pytestmark = pytest.mark.launch

FIXTURE = REPOSITORY / "tests" / "fixtures" / "format_0.1.0"
STOPPED = 4


def same_machine() -> bool:
    conditions = json.loads((FIXTURE / "conditions.json").read_text())
    here = torch.backends.cpu.get_cpu_capability(), torch.__version__
    return here == (conditions["cpu"], conditions["torch"])


def assert_same(found, expected, path: str = "") -> None:
    """Equal numbers, bit for bit on the machine of the recording; every other value equal."""
    if isinstance(expected, dict):
        missing = expected.keys() - found.keys()
        assert not missing, f"{path}: {missing}"
        for key, value in expected.items():
            assert_same(found[key], value, f"{path}/{key}")
    elif isinstance(expected, list):
        assert len(found) == len(expected), path
        for index, value in enumerate(expected):
            assert_same(found[index], value, f"{path}[{index}]")
    elif isinstance(expected, float) and not same_machine():
        assert found == pytest.approx(expected, rel=1e-4, abs=1e-6), path
    else:
        assert found == expected, path


def lines(path: Path) -> list[dict]:
    return [json.loads(line) for line in path.read_text().splitlines()]


@pytest.fixture
def recorded(tmp_path) -> Path:
    """The run of the fixture, unpacked."""
    with tarfile.open(FIXTURE / "run.tar.xz") as archive:
        archive.extractall(tmp_path, filter="data")
    return tmp_path


def run_there(directory: Path, command: list[str]) -> subprocess.CompletedProcess:
    done = run_command(command, cwd=directory)
    assert done.returncode == 0, done.stderr[-3000:]
    return done


def test_the_recorded_run_continues_as_it_would_have(recorded):
    command = [*launcher("deepspeed", 2, 29671), "cdpvae.train", "--config", "settings-in.json"]
    run_there(recorded, [*command, "--resume", "latest"])
    for name in ("steps.jsonl", "checks.jsonl"):
        expected = lines(FIXTURE / name)
        found = lines(recorded / "run" / name)
        assert_same(found, expected)
        assert found[-1]["step"] == 2 * STOPPED


def test_the_recorded_checkpoint_evaluates_to_the_same_numbers(recorded):
    options = ["--checkpoint", "run/checkpoint-4", "--num-rows", "8"]
    texts = ["--num-samples", "4", "--max-length", "12", "--output", "found.json"]
    for command, flags in (
        ("cdpvae.evaluate_reconstruction", texts),
        ("cdpvae.check_latents", ["--output", "found"]),
    ):
        done = run_warm(command, *options, *flags, cwd=recorded)
        assert done.returncode == 0, done.stderr[-3000:]
    for found, expected in (
        (recorded / "found.json", FIXTURE / "reconstruction.json"),
        (recorded / "found" / "latents.json", FIXTURE / "latents.json"),
    ):
        assert_same(json.loads(found.read_text()), json.loads(expected.read_text()))
