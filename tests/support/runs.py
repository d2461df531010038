"""Small training runs: their data, and starting them as a user would."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path
from types import MappingProxyType

from support.warm import WarmPython

REPOSITORY = Path(__file__).resolve().parents[2]
COLOURS = ("red", "green", "blue", "yellow", "black", "white")
THINGS = ("house", "river", "horse", "garden", "engine", "mountain", "letter", "window")


def sentences(count: int) -> list[dict[str, str]]:
    """Pairs of unequal length, all different."""
    rows = []
    for n in range(count):
        colour, thing = COLOURS[n % 6], THINGS[(n // 6) % 8]
        tail = " again" * (n % 5) + f" number {n}"
        rows.append(
            {
                "instruction": f"Please describe the {colour} {thing} to me now{tail}",
                "output": f"The {thing} is {colour} and stands there for everyone to see{tail}",
            }
        )
    return rows


def merged(settings: dict, **groups: dict) -> dict:
    """A copy with some settings replaced, group by group."""
    return {
        group: {**settings.get(group, {}), **groups.get(group, {})}
        for group in {*settings, *groups}
    }


def launcher(kind: str, ranks: int, port: int) -> list[str]:
    """The command that starts `-m`-style modules on `ranks` processes."""
    bin_dir = Path(sys.executable).parent
    if kind == "deepspeed":
        return [
            str(bin_dir / "deepspeed"),
            "--num_accelerators",
            str(ranks),
            "--master_port",
            str(port),
            "--module",
        ]
    if kind == "torchrun":
        return [
            sys.executable,
            "-m",
            "torch.distributed.run",
            "--nproc_per_node",
            str(ranks),
            "--master_port",
            str(port),
            "-m",
        ]
    assert kind == "python" and ranks == 1
    return [sys.executable, "-m"]


def run_command(
    command: list[str],
    timeout: float = 300,
    cwd: Path = REPOSITORY,
    variables: Mapping[str, str] = MappingProxyType({}),
) -> subprocess.CompletedProcess:
    """Run from the repository root, as a user would; output is captured as text."""
    environment = {
        **os.environ,
        **variables,
        "OMP_NUM_THREADS": "1",
        "DS_ACCELERATOR": "cpu",
        "PATH": f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}",
    }
    for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT"):
        environment.pop(name, None)
    return subprocess.run(
        command,
        cwd=cwd,
        env=environment,
        capture_output=True,
        text=True,
        timeout=timeout,
    )


_warm: list[WarmPython] = []


def run_warm(module: str, *arguments: str, cwd: Path = REPOSITORY) -> subprocess.CompletedProcess:
    """Run a command of ours in a fork of a process that has imported everything."""
    if not _warm:
        _warm.append(WarmPython())
    return _warm[0].run(module, list(arguments), cwd)


def train(
    kind: str,
    ranks: int,
    settings: dict,
    directory: Path,
    *flags: str,
    port: int = 29611,
    fresh: bool = False,
) -> subprocess.CompletedProcess:
    """Write the settings and run `cdpvae.train` -> the finished process.

    A lone process is forked from a warm one, but for tests of the start itself (`fresh`).
    """
    directory.mkdir(parents=True, exist_ok=True)
    config = directory / "settings-in.json"
    config.write_text(json.dumps(settings))
    arguments = ["--config", str(config), "--output-dir", str(directory / "run"), *flags]
    if kind == "python" and not fresh:
        return run_warm("cdpvae.train", *arguments)
    return run_command([*launcher(kind, ranks, port), "cdpvae.train", *arguments])
