"""Numbers that version 0.1.0 has written, and how those of today are compared with them.

Where torch and the CPU are those of the recording the numbers must agree bit for bit; elsewhere to
1e-4, which is a thousand times the rounding of fp32 and a tenth of what one skipped tensor changes.
"""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from support.runs import REPOSITORY

FIXTURE = REPOSITORY / "tests" / "fixtures" / "format_0.1.0"


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


def lines_of(path: Path) -> list[dict]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def recorded_lines(name: str) -> list[dict]:
    """The lines of a file of the fixture."""
    return lines_of(FIXTURE / name)
