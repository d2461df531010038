"""What a process is told about its generators and its algorithms."""

from __future__ import annotations

import os

import pytest
import torch

from cdpvae.config import parse_settings
from cdpvae.models.text_vae.attention_backends import flash_attn_kernel
from cdpvae.tasks.text_vae import setup
from cdpvae.training.distributed import World


@pytest.fixture(autouse=True)
def as_before(monkeypatch):
    """Leave the process as it was."""
    on = torch.are_deterministic_algorithms_enabled()
    warn = torch.is_deterministic_algorithms_warn_only_enabled()
    monkeypatch.delenv("CUBLAS_WORKSPACE_CONFIG", raising=False)
    yield
    torch.use_deterministic_algorithms(on, warn_only=warn)


@pytest.mark.parametrize("on", [True, False])
def test_the_setting_reaches_torch_and_flash_attention(monkeypatch, on):
    """Nothing set it before: FlashAttention's backward added in any order on every GPU."""

    class Enough(Exception):
        pass

    def stop(*_):
        raise Enough

    # The first thing after it; nothing is loaded.
    monkeypatch.setattr(setup, "resolve_ds_config", stop)
    torch.use_deterministic_algorithms(not on)
    with pytest.raises(Enough):
        setup.build_trainer(
            parse_settings({"training": {"deterministic": on}}),
            World(0, 1, 0, torch.device("cpu")),
        )
    assert torch.are_deterministic_algorithms_enabled() is on
    assert ("CUBLAS_WORKSPACE_CONFIG" in os.environ) is on
    # An operation without such an algorithm warns and goes on.
    assert torch.is_deterministic_algorithms_warn_only_enabled()

    def function(
        q, k, v, *_, dropout_p, softmax_scale, causal, window_size=None, deterministic=False
    ):
        return deterministic

    assert flash_attn_kernel(function)(None, None, None, None, None, 1, 1, 1.0) is on
