"""What an older version has written stays readable: resumed and evaluated to the same numbers.

The fixture is described in its README.
"""

from __future__ import annotations

import json
import subprocess
import tarfile
from pathlib import Path

import pytest

from support.recorded import FIXTURE, assert_same, lines_of, recorded_lines
from support.runs import launcher, run_command, run_warm

pytestmark = pytest.mark.launch

STOPPED = 4


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
        found = lines_of(recorded / "run" / name)
        assert_same(found, recorded_lines(name))
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
