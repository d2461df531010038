"""One rank of the parity test: a few steps under ZeRO-2 or under a plain reference loop.

    torchrun --nproc_per_node 2 parity_worker.py CASES.json OUT_DIR zero|ddp
    python parity_worker.py CASES.json OUT_DIR zero|plain

The reference loop uses torch's DistributedDataParallel, AdamW and clipping directly: no DeepSpeed.
Writes per case `{mode}{world_size}-{case}.pt`: the mean loss of every step and the final
trainable parameters.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path

import torch
from torch.nn.parallel import DistributedDataParallel

from cdpvae.config import parse_settings
from cdpvae.loss import build_objective
from cdpvae.tasks.text_vae.module import TrainingModule
from cdpvae.tasks.text_vae.setup import build_trainer
from cdpvae.training.distributed import all_reduce_sum, close_world, init_world
from cdpvae.training.optimizer import build_optimizer, build_scheduler, parameter_groups


class PlainEngine:
    """What the trainer asks of an engine, in plain PyTorch."""

    def __init__(self, model, settings, total_steps, world):
        training = settings.training
        self.accum = training.gradient_accumulation_steps
        self.max_norm = training.max_grad_norm
        objective = build_objective(settings, model.latent.flat_dim, world.world_size)
        self.module = TrainingModule(model, objective, training.seed, world.world_size)
        self.call = self.module
        if world.world_size > 1:
            # The posterior's rows of other ranks enter each rank's loss through a collective, so
            # DDP sees every parameter used in every step.
            self.call = DistributedDataParallel(self.module, find_unused_parameters=True)
        self.optimizer = build_optimizer(parameter_groups(model, training), training)
        self.scheduler = build_scheduler(self.optimizer, training, total_steps)
        self.micro_steps = self.global_steps = 0
        self.norm = 0.0

    def __call__(self, batch, schedule):
        return self.call(batch, schedule)

    def train(self):
        self.module.train()

    def backward(self, loss):
        (loss / self.accum).backward()

    def step(self):
        self.micro_steps += 1
        self.applied = self.micro_steps % self.accum == 0
        if not self.applied:
            return
        parameters = [p for group in self.optimizer.param_groups for p in group["params"]]
        for p in parameters:
            if p.grad is None:
                p.grad = torch.zeros_like(p)
        self.norm = torch.nn.utils.clip_grad_norm_(parameters, self.max_norm)
        self.optimizer.step()
        self.optimizer.zero_grad()
        self.scheduler.step()
        self.global_steps += 1

    def was_step_applied(self):
        return self.applied

    def get_lr(self):
        return self.scheduler.get_last_lr()

    def get_global_grad_norm(self):
        return self.norm


def run_case(name: str, content: dict, world, mode: str, out: Path) -> None:
    settings = parse_settings(content)
    settings.training.output_dir = str(out / f"{mode}{world.world_size}-{name}-run")
    trainer = build_trainer(settings, world)
    # Parity across ranks needs the same network in every mode: module dropout is 0 in the cases.
    if mode != "zero":
        trainer.engine = PlainEngine(
            trainer.engine.module.model, settings, trainer.context.total_steps, world
        )
    losses, steps = [], settings.training.max_steps
    trainer.engine.train()
    while trainer.state.step < steps:
        for step_batch in trainer.loader.epoch():
            schedule = trainer.task.schedule(trainer.state.step, step_batch)
            total = 0.0
            for batch in step_batch.micro_batches:
                output = trainer.engine(trainer.task.prepare(batch, schedule), schedule)
                loss = output.total
                trainer.engine.backward(loss)
                trainer.engine.step()
                total += float(loss.detach())
            mean = all_reduce_sum(torch.tensor([total], dtype=torch.float64))
            losses.append(float(mean) / len(step_batch.micro_batches) / world.world_size)
            trainer.state.step += 1
            if trainer.state.step == steps:
                break
    parameters = {
        key: value.detach().clone()
        for key, value in trainer.engine.module.model.named_parameters()
        if value.requires_grad
    }
    if world.is_main:
        result = {
            "losses": losses,
            "parameters": parameters,
            "steps": trainer.engine.global_steps,
        }
        torch.save(result, out / f"{mode}{world.world_size}-{name}.pt")
    trainer.context.telemetry.close()


def main() -> None:
    cases, out, mode = json.loads(Path(sys.argv[1]).read_text()), Path(sys.argv[2]), sys.argv[3]
    world = init_world()
    for name, content in cases.items():
        content["training"]["per_device_batch_size"] //= world.world_size
        run_case(name, content, world, mode, out)
    close_world()


if __name__ == "__main__":
    main()
