"""Every command starts, and its help describes it."""

from __future__ import annotations

import pytest

from support.runs import run_warm
from test_architecture import COMMANDS


@pytest.mark.parametrize(
    "module", [*(f"cdpvae.{name}" for name in sorted(COMMANDS)), "cdpvae_kernels.tune"]
)
def test_help_of_a_command(module):
    done = run_warm(module, "--help")
    assert done.returncode == 0, done.stderr[-2000:]
    assert "usage: " in done.stdout and "--help" in done.stdout
