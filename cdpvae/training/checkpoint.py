"""Checkpoints that can be trusted: complete, verified, and enough to continue bit for bit.

What repeats its bits on which device: docs/kernels.md.

    checkpoint-{step}/
      config.json heads.safetensors adapter_*      the model, as `save_pretrained` writes it
      tokenizer/ settings.json                     what it takes to use it
      state.json                                   step, epoch, position, world size
      rank_{r}.pt                                  RNG of every rank; shared: monitor, queue
      deepspeed/                                   ZeRO shards, for resuming only
      manifest.json                                size and SHA-256 of every file
    best -> checkpoint-{step}                      under `keep_best`, the best evaluated so far

A checkpoint is written under another name, hashed, synced to disk and renamed; only then does
`latest`, and `best` where it is that, point to it. Loading verifies the manifest first, and reads
every pickled file with `weights_only=True` and three allow-listed classes before DeepSpeed, which
never does, sees it.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from cdpvae.config import Settings, load_settings
from cdpvae.config.renames import by_key
from cdpvae.files import MANIFEST, publish, replace_link, verify, write_text
from cdpvae.training.distributed import World, barrier
from cdpvae.training.engine import Engine
from cdpvae.training.random_state import rng_state, set_rng_state

PREFIX = "checkpoint-"
DS_TAG = "state"
BEST = "best"

# What may differ between a run and its continuation without changing a single bit of it.
FREE_TO_CHANGE = {
    "training": {
        "output_dir",
        "resume",
        "save_steps",
        "stop_after",
        "keep_checkpoints",
        "keep_best",
        "stop_after_no_gain",
        "logging_steps",
        "eval_steps",
        "eval_rows",
        "sample_rows",
        "sample_max_length",
        "prefetch",
    },
    "data": {"processed_dir", "max_samples", "input", "workers", "shard_records", "executor"},
}


@dataclass
class TrainState:
    """Where a run stands.

    step: optimizer steps that happened. skipped: steps not applied (NaN). best: state of the
    `BestTracker`. evaluated: step and figures of the latest evaluation, as in `Evaluated`.
    """

    step: int = 0
    epoch: int = 0
    step_in_epoch: int = 0
    skipped: int = 0
    best: dict[str, Any] = field(default_factory=dict)
    evaluated: dict[str, Any] | None = None


class CheckpointManager:
    """Write, find, verify and remove the checkpoints of one output directory."""

    def __init__(self, settings: Settings, world: World):
        self.settings = settings
        self.world = world
        self.root = Path(settings.training.output_dir)

    def save(
        self,
        engine: Engine,
        state: TrainState,
        shared: dict[str, Any],
        save_pretrained: Callable[[Path], None],
        is_best: bool = False,
    ) -> Path:
        """Write a checkpoint -> its directory; every rank calls it.

        engine: saved for resuming.
        state: where the run stands.
        shared: state of further parts by name, equal on every rank.
        save_pretrained: writes the result for use into a directory; rank 0 calls it.
        is_best: `best` points to it from here on.
        """
        # Collect everything under a temporary name.
        final = self.root / f"{PREFIX}{state.step}"
        temporary = self.root / f".{final.name}.writing"
        if self.world.is_main:
            shutil.rmtree(temporary, ignore_errors=True)
            temporary.mkdir(parents=True)
        barrier()
        engine.save_checkpoint(
            str(temporary / "deepspeed"), tag=DS_TAG, exclude_frozen_parameters=True
        )
        rank_file = temporary / f"rank_{self.world.rank}.pt"
        torch.save({"rng": rng_state(), "shared": shared}, rank_file)
        if self.world.is_main:
            save_pretrained(temporary)
            (temporary / "settings.json").write_text(self.settings.dump())
            content = {**asdict(state), "world_size": self.world.world_size}
            (temporary / "state.json").write_text(json.dumps(content, indent=2) + "\n")
        barrier()
        # Only what is complete and on the disk gets its name.
        if self.world.is_main:
            publish(temporary, final)
            write_text(self.root / "latest", final.name + "\n")
            if is_best:
                replace_link(self.root / BEST, final.name)
            self._retire()
        barrier()
        return final

    def _retire(self) -> None:
        """Remove what is older than the newest `keep_checkpoints`, never the best."""
        keep, best = self.settings.training.keep_checkpoints, (self.root / BEST).resolve()
        if keep is not None:
            for old in self.existing()[:-keep]:
                if old.resolve() != best:
                    shutil.rmtree(old)

    def point_best_to(self, step: int) -> None:
        """Link `best` to the checkpoint of a step again, where that is still there; rank 0."""
        name = f"{PREFIX}{step}"
        if self.world.is_main and (self.root / name / MANIFEST).exists():
            replace_link(self.root / BEST, name)

    def existing(self) -> list[Path]:
        """Return complete checkpoints, oldest first."""
        found = [p for p in self.root.glob(f"{PREFIX}*") if (p / MANIFEST).exists()]
        return sorted(found, key=lambda path: int(path.name.removeprefix(PREFIX)))

    def find(self, resume: str) -> Path:
        """'latest' or a directory -> a checkpoint. Raises ValueError when there is none."""
        if resume != "latest":
            path = Path(resume)
            if not path.is_dir():
                raise ValueError(f"resume={resume!r}: no such checkpoint directory")
            return path
        pointer = self.root / "latest"
        if not pointer.exists():
            raise ValueError(
                f"resume='latest': {self.root} holds no checkpoint; leave --resume out to start"
            )
        return self.root / pointer.read_text().strip()

    def check(self, path: Path) -> None:
        """Verify a checkpoint and that this run may continue it; before any weight is loaded.

        Raises ValueError: damaged, other world size, or settings that would change the run.
        """
        verify(path)
        world_size = json.loads((path / "state.json").read_text())["world_size"]
        if world_size != self.world.world_size:
            raise ValueError(
                f"{path}: saved by {world_size} ranks, this run has {self.world.world_size}; "
                "resume with the same number"
            )
        self._check_settings(path)

    def load(
        self, engine: Engine, path: Path, current_name: Callable[[str], str]
    ) -> tuple[TrainState, dict[str, Any]]:
        """Restore engine and RNG -> where the run stood, and the shared state.

        `check` comes first. current_name: the name that a tensor stored by an older version has
        now. Raises ValueError for a state file that is more than plain data, and for a stored
        tensor that the model does not have or lacks.
        """
        for file in sorted((path / "deepspeed").rglob("*.pt")):
            read_pickle_safely(file)

        def restore(src: dict[str, Tensor], dst: nn.Module) -> None:
            load_tensors(src, dst, current_name, path)

        # Weights, optimizer and schedule.
        loaded, _ = engine.load_checkpoint(
            str(path / "deepspeed"), tag=DS_TAG, custom_load_fn=restore
        )
        if loaded is None:
            raise ValueError(f"{path}: DeepSpeed found nothing to load under {DS_TAG!r}")
        # The generators of this rank, and what all ranks share.
        own = read_pickle_safely(path / f"rank_{self.world.rank}.pt")
        set_rng_state(own["rng"])
        content = json.loads((path / "state.json").read_text())
        del content["world_size"]
        return TrainState(**content), own["shared"]

    def _check_settings(self, path: Path) -> None:
        """Raise ValueError for a setting that would change the run."""
        # An older version saved some settings under other names, and lacks those added since.
        saved = by_key(json.loads(load_settings(path / "settings.json").dump()))
        now = by_key(json.loads(self.settings.dump()))
        # A rate of a part is a key on one side only where the other has none.
        for key in {**now, **saved}:
            group, _, name = key.partition(".")
            is_free = name in FREE_TO_CHANGE.get(group, set())
            if not is_free and saved.get(key) != now.get(key):
                raise ValueError(
                    f"resume {path}: {key}={now.get(key)!r}, but the run was started with "
                    f"{saved.get(key)!r}; a continuation keeps it"
                )


@torch.no_grad()
def load_tensors(
    stored: dict[str, Tensor],
    module: nn.Module,
    current_name: Callable[[str], str],
    path: Path,
) -> None:
    """Copy stored tensors into a module: everything that is stored, and all that it trains.

    stored: by name; frozen parameters are not among them.
    module: takes them over in place.
    current_name: the name that a stored tensor has now.
    path: of the checkpoint, for the error.

    Raises ValueError for a tensor that one side has and the other lacks, or of another shape.
    DeepSpeed itself would skip such a tensor without a word.
    """
    # Both sides must have the same tensors: all that is stored, all that is trained.
    found = {current_name(name): tensor for name, tensor in stored.items()}
    own = module.state_dict(keep_vars=True)
    trained = {name for name, parameter in module.named_parameters() if parameter.requires_grad}
    if unknown := sorted(found.keys() - own.keys()):
        raise ValueError(f"{path}: {len(unknown)} tensors are not ours, first {unknown[0]!r}")
    if missing := sorted(trained - found.keys()):
        raise ValueError(f"{path}: {len(missing)} tensors are missing, first {missing[0]!r}")
    # Copy in place: the engine's flat buffers are views of these.
    for name, tensor in found.items():
        if own[name].shape != tensor.shape:
            raise ValueError(
                f"{path}: {name!r} has shape {tuple(tensor.shape)}, this run needs "
                f"{tuple(own[name].shape)}"
            )
        own[name].copy_(tensor)


def read_pickle_safely(path: Path) -> Any:
    """torch.load that runs no code: tensors, plain containers and three DeepSpeed classes."""
    from deepspeed.runtime.fp16.loss_scaler import LossScaler
    from deepspeed.runtime.zero.config import ZeroStageEnum
    from deepspeed.utils.tensor_fragment import fragment_address

    with torch.serialization.safe_globals([LossScaler, ZeroStageEnum, fragment_address]):
        try:
            return torch.load(path, map_location="cpu", weights_only=True)
        except Exception as error:
            reason = str(error).strip().splitlines()[0]
            raise ValueError(f"{path}: refused, not a plain state file: {reason}") from error
