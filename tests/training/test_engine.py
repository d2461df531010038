"""DeepSpeed's corners: which steps happen, what a NaN does, what its JSON may say."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest
import torch
from deepspeed.utils.config import get_timers_config

from cdpvae.config import TrainingConfig
from cdpvae.training.distributed import World
from cdpvae.training.engine import DS_CONFIGS, resolve_ds_config
from support.runs import merged, run_command

WORKER = Path(__file__).with_name("engine_worker.py")
CPU = World(0, 2, 0, torch.device("cpu"))


@pytest.fixture(scope="module")
def outcome(small_settings, tmp_path_factory) -> dict:
    """What the worker saw on two ranks, by case."""
    out = tmp_path_factory.mktemp("engine")
    base = merged(
        small_settings,
        training={"gradient_accumulation_steps": 4, "per_device_batch_size": 2, "max_steps": 6},
    )
    (out / "settings.json").write_text(json.dumps(base))
    done = run_command(
        [
            sys.executable,
            "-m",
            "torch.distributed.run",
            "--nproc_per_node",
            "2",
            "--master_port",
            "29671",
            str(WORKER),
            str(out),
        ]
    )
    assert done.returncode == 0, done.stderr[-3000:]
    return json.loads((out / "outcome.json").read_text())


@pytest.mark.launch
def test_coalesced_gradients_take_every_step(outcome):
    """With accumulation in the config DeepSpeed would otherwise take one step in four."""
    assert outcome["coalesced"]["global_steps"] == outcome["plain"]["global_steps"] == 6
    assert outcome["coalesced"]["losses"] == pytest.approx(outcome["plain"]["losses"], rel=1e-5)


@pytest.mark.launch
def test_bf16_keeps_fp32_masters_and_learns(outcome):
    assert outcome["bf16"]["parameter_dtype"] == "torch.bfloat16"
    assert outcome["bf16"]["master_dtype"] == "torch.float32"
    # bf16 rounds to 3 digits: the curve follows fp32's, and ends lower than it began.
    assert outcome["bf16"]["losses"] == pytest.approx(outcome["plain"]["losses"], rel=0.05)


@pytest.mark.launch
@pytest.mark.parametrize("case", ["nan_fp32", "nan_bf16"])
def test_a_nan_on_one_rank_skips_the_step_on_both(outcome, case):
    result = outcome[case]
    assert result["steps"] == 6 and result["skipped"] == 1
    assert result["finite_on_every_rank"]
    assert result["beta_steps"] == list(range(6)), "schedules count steps that happened"
    assert result["equal_on_both_ranks"]


@pytest.mark.parametrize("path", sorted(DS_CONFIGS.glob("*.json")), ids=lambda p: p.name)
def test_shipped_files_resolve_and_spell_out_the_defaults(path):
    config = resolve_ds_config(TrainingConfig(ds_config=str(path)), CPU)
    assert config["train_batch_size"] == 8 * 12 * 2
    assert config["gradient_clipping"] == 1.0
    assert config["bf16"] == {"enabled": True, "check_grad_overflow": True}
    assert config["data_types"]["grad_accum_dtype"] == "fp32"
    assert config["communication_data_type"] == "fp32"
    # DeepSpeed's own timer makes the host wait for the GPU twice a micro-batch.
    assert not get_timers_config(config).enabled
    zero = config["zero_optimization"]
    assert zero["stage"] == 2 and zero["overlap_comm"] is False
    assert zero["reduce_bucket_size"] <= 5e7
    assert "optimizer" not in config and "scheduler" not in config


@pytest.mark.parametrize(
    ("content", "words"),
    [
        ({"optimizer": {"type": "Adam"}}, ["optimizer"]),
        ({"scheduler": {}}, ["scheduler"]),
        ({"gradient_clipping": 5.0}, ["gradient_clipping", "5.0", "1.0"]),
        ({"bf16": {"enabled": False}}, ["bf16.enabled"]),
        ({"zero_optimization": {"stage": "auto"}}, ["zero_optimization.stage"]),
    ],
)
def test_a_ds_config_that_contradicts_is_refused(tmp_path, content, words):
    path = tmp_path / "ds.json"
    path.write_text(json.dumps(content))
    with pytest.raises(ValueError) as refused:
        resolve_ds_config(TrainingConfig(ds_config=str(path)), CPU)
    assert "\n" not in str(refused.value)
    for word in words:
        assert word in str(refused.value)
