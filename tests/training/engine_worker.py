"""One rank of the engine tests: short runs with settings that have gone wrong in DeepSpeed before.

torchrun --nproc_per_node 2 engine_worker.py DIR      reads DIR/settings.json
"""

from __future__ import annotations

import dataclasses
import json
import sys
from pathlib import Path

import torch

from cdpvae.config import parse_settings
from cdpvae.tasks.text_vae.setup import build_trainer
from cdpvae.training.distributed import all_gather_rows, close_world, init_world

CASES = {
    "plain": {},
    "coalesced": {"coalesce_gradients": True},
    "bf16": {"precision": "bf16"},
    "nan_fp32": {},
    "nan_bf16": {"precision": "bf16"},
}
POISONED_STEP = 2


def poison_once(trainer, world) -> None:
    """Make one gradient of rank 1 a NaN, in one micro-batch of the third attempted step."""
    parameter = trainer.engine.module.model.latent.encoder.mu_head.weight
    seen = {"micro_batches": 0}
    accum = trainer.context.config.gradient_accumulation_steps

    def hook(grad):
        number = seen["micro_batches"]
        seen["micro_batches"] += 1
        return grad * float("nan") if number == POISONED_STEP * accum else grad

    if world.rank == 1:
        parameter.register_hook(hook)


def run_case(name: str, content: dict, world, out: Path) -> dict:
    content = json.loads(json.dumps(content))
    content["training"] |= CASES[name]
    settings = parse_settings(content)
    settings.training.output_dir = str(out / name)
    trainer = build_trainer(settings, world)
    if name.startswith("nan"):
        poison_once(trainer, world)
    planned, make_schedule = [], trainer.task.schedule

    def schedule(step, step_batch):
        planned.append(step)
        return make_schedule(step, step_batch)

    trainer.task = dataclasses.replace(trainer.task, schedule=schedule)
    trainer.run()
    parameters = [p for p in trainer.engine.module.parameters() if p.requires_grad]
    flat = torch.cat([p.detach().float().flatten() for p in parameters])
    both = all_gather_rows(flat[None])
    trainer.context.telemetry.close()
    result = {
        "steps": trainer.state.step,
        "skipped": trainer.state.skipped,
        "global_steps": trainer.engine.global_steps,
        "beta_steps": sorted(set(planned)),
        "finite_on_every_rank": bool(torch.isfinite(both).all()),
        "equal_on_both_ranks": bool(torch.equal(both[0], both[1])),
        "parameter_dtype": str(parameters[0].dtype),
        "master_dtype": str(trainer.engine.optimizer.single_partition_of_fp32_groups[0].dtype),
    }
    if world.is_main:
        lines = (out / name / "steps.jsonl").read_text().splitlines()
        result["losses"] = [json.loads(line)["total"] for line in lines]
    return result


def main() -> None:
    out = Path(sys.argv[1])
    content = json.loads((out / "settings.json").read_text())
    world = init_world()
    outcome = {name: run_case(name, content, world, out) for name in CASES}
    if world.is_main:
        (out / "outcome.json").write_text(json.dumps(outcome))
    close_world()


if __name__ == "__main__":
    main()
