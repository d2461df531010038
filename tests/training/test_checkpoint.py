"""Checkpoints are complete, verified and refuse what they must."""

from __future__ import annotations

import json
import pickle
import shutil
from pathlib import Path

import pytest
import torch

from cdpvae import files
from cdpvae.config import parse_settings
from cdpvae.files import publish, verify
from cdpvae.training.checkpoint import (
    CheckpointManager,
    read_pickle_safely,
    rng_state,
    set_rng_state,
)
from cdpvae.training.distributed import World
from support.runs import merged, train


@pytest.fixture(scope="module")
def finished(small_settings, tmp_path_factory) -> Path:
    """The directory of a run of one process with three checkpoints, two of them kept."""
    root = tmp_path_factory.mktemp("checkpoint")
    settings = merged(
        small_settings,
        training={"max_steps": 6, "save_steps": 2, "keep_checkpoints": 2, "eval_rows": 0},
    )
    done = train("python", 1, settings, root)
    assert done.returncode == 0, done.stderr[-3000:]
    return root


@pytest.fixture
def copy(finished, tmp_path) -> Path:
    shutil.copytree(finished, tmp_path / "copy")
    return tmp_path / "copy"


def settings_of(root: Path, **training) -> dict:
    content = json.loads((root / "settings-in.json").read_text())
    return merged(content, training=training)


def test_retention_keeps_the_newest(finished):
    manager = CheckpointManager(
        parse_settings(settings_of(finished, output_dir=str(finished / "run"))),
        World(0, 1, 0, torch.device("cpu")),
    )
    assert [p.name for p in manager.existing()] == ["checkpoint-4", "checkpoint-6"]
    assert manager.find("latest").name == "checkpoint-6"


@pytest.mark.parametrize(
    "damage",
    [
        lambda p: (p / "heads.safetensors").unlink(),
        lambda p: (p / "heads.safetensors").write_bytes(b"x"),
        lambda p: _flip_byte(p / "rank_0.pt"),
        lambda p: (p / "manifest.json").unlink(),
    ],
    ids=["missing", "truncated", "one byte", "no manifest"],
)
def test_damage_is_found_before_anything_is_loaded(copy, damage):
    damage(copy / "run" / "checkpoint-6")
    done = train("python", 1, settings_of(copy, max_steps=6), copy, "--resume", "latest")
    assert done.returncode == 2
    (line,) = [text for text in done.stderr.splitlines() if text.startswith("error: ")]
    assert "checkpoint-6" in line


def _flip_byte(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(bytes(content))


@pytest.mark.parametrize(
    ("change", "word"),
    [
        ({"learning_rate": 0.5}, "training.learning_rate"),
        ({"max_steps": 60}, "training.max_steps"),
        ({"seed": 9}, "training.seed"),
    ],
)
def test_a_continuation_keeps_the_settings(copy, change, word):
    done = train("python", 1, settings_of(copy, **change), copy, "--resume", "latest")
    assert done.returncode == 2
    assert word in done.stderr and "Traceback" not in done.stderr


@pytest.mark.launch
def test_another_world_size_is_refused(copy):
    settings = settings_of(copy, per_device_batch_size=2)
    done = train("torchrun", 2, settings, copy, "--resume", "latest", port=29681)
    assert done.returncode != 0
    assert "saved by 1 ranks, this run has 2" in done.stderr


def test_a_tensor_that_is_neither_loaded_nor_renamed_is_an_error(copy):
    """DeepSpeed would skip it without a word; the refused run keeps its loss curve."""
    checkpoint = copy / "run" / "checkpoint-4"
    (copy / "run" / "latest").write_text("checkpoint-4\n")
    states = checkpoint / "deepspeed" / "state" / "mp_rank_00_model_states.pt"
    content = torch.load(states, weights_only=False)
    module = content["module"]
    module["model.latent.encoder.mu_head.other"] = module.pop("model.latent.encoder.mu_head.weight")
    torch.save(content, states)
    manifest = json.loads((checkpoint / "manifest.json").read_text())
    manifest["deepspeed/state/mp_rank_00_model_states.pt"] = {
        "bytes": states.stat().st_size,
        "sha256": files.sha256(states),
    }
    (checkpoint / "manifest.json").write_text(json.dumps(manifest))
    curve = (copy / "run" / "steps.jsonl").read_text()
    done = train("python", 1, settings_of(copy), copy, "--resume", "latest")
    assert done.returncode == 2
    assert "1 tensors are not ours, first 'model.latent.encoder.mu_head.other'" in done.stderr
    assert (copy / "run" / "steps.jsonl").read_text() == curve


class Evil:
    def __reduce__(self):
        return (print, ("code ran",))


def test_a_pickle_that_would_run_code_is_refused(tmp_path, capsys):
    path = tmp_path / "state.pt"
    path.write_bytes(pickle.dumps(Evil()))
    with pytest.raises(ValueError, match=r"state\.pt: refused"):
        read_pickle_safely(path)
    torch.save({"x": Evil()}, path)
    with pytest.raises(ValueError, match=r"state\.pt: refused"):
        read_pickle_safely(path)
    assert "code ran" not in capsys.readouterr().out


def test_rng_state_round_trip():
    import random

    import numpy as np

    state = rng_state()
    first = (torch.rand(3), np.random.rand(3).tolist(), random.random())
    set_rng_state(state)
    second = (torch.rand(3), np.random.rand(3).tolist(), random.random())
    assert torch.equal(first[0], second[0]) and first[1:] == second[1:]


def test_a_write_cut_short_leaves_no_checkpoint(tmp_path, monkeypatch):
    """Whatever fails before the rename, the final name does not exist."""
    temporary = tmp_path / ".checkpoint-1.writing"
    temporary.mkdir()
    (temporary / "a.bin").write_bytes(b"content")
    monkeypatch.setattr(files, "flush", lambda path: (_ for _ in ()).throw(OSError("disk full")))
    with pytest.raises(OSError, match="disk full"):
        publish(temporary, tmp_path / "checkpoint-1")
    assert not (tmp_path / "checkpoint-1").exists()
    monkeypatch.undo()
    publish(temporary, tmp_path / "checkpoint-1")
    verify(tmp_path / "checkpoint-1")
