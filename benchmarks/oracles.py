"""Where is the channel from text to text slow? z of every training row free, or from the encoder.

    python -m benchmarks.oracles --config RECIPE.json --backbone DIR --processed-dir DIR \
        --per-device-batch-size 64 [--rows 1000,10000] [--steps 800,1600] [--table-rate 3e-2]

Trains on the first `--rows` rows of the data for `--steps` steps (the lists go together, pair by
pair), twice, in one process and without posterior noise:

    table     z of each training row is a parameter of its own: what an ideal encoder would give
    encoder   z is the mean of the model's encoder

All else is equal: model, losses, word dropout, batches and their order, AdamW, schedule, clipping.
Without noise there is no rate, so `beta_max` does not count. The table has an Adam of its own at
`--table-rate`, with the same schedule and no clipping, that moves the rows of the batch alone.

A row per run goes to `results/oracles.csv` when it is finished; a run whose row is there, with the
same settings, is passed over, so that the command can be stopped and started again. Flags are those
of `cdpvae.train`; `--eval-rows` counts the rows that are measured. docs/results.md has the columns.
"""

from __future__ import annotations

import dataclasses
import hashlib
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer, SparseAdam

from benchmarks.support import rows as results
from cdpvae.batch import StepSchedule, VAEBatch, sum_of
from cdpvae.collapse import AdaptiveInterventionScheduler
from cdpvae.command_line import parse_settings_and, run
from cdpvae.config import Settings
from cdpvae.data import LlamaTokenizerWrapper, VAECollator, evaluation_batches
from cdpvae.data.dataset import TOKEN_COLUMNS, TokenColumn, TokenDataset
from cdpvae.evaluation.encoded import EncodedRows
from cdpvae.latents import Posterior
from cdpvae.loss import LossInputs, build_objective
from cdpvae.metrics import ReconstructionMetrics
from cdpvae.models.text_vae import LlamaSoftPromptVAE, ModelOutput
from cdpvae.tasks.text_vae.loading import build_loader, open_data
from cdpvae.tasks.text_vae.module import loss_inputs
from cdpvae.tasks.text_vae.schedule import Schedule
from cdpvae.tasks.text_vae.setup import load_model
from cdpvae.training.distributed import World
from cdpvae.training.optimizer import build_optimizer, build_scheduler, parameter_groups
from cdpvae.training.random_state import seed_everything

MODULE = "benchmarks.oracles"
RESULTS = results.RESULTS / "oracles.csv"
SOURCES = ("table", "encoder")
# Columns by which the row of a finished run is known again.
KEY = ("z", "rows", "steps", "table_rate", "settings")
FIRST_STD = 0.01  # of the table's entries
PROGRESS_STEPS = 50
BATCH_ROWS = 64  # measured together


@dataclasses.dataclass
class OracleOptions:
    """Which runs, and where their rows go."""

    rows: str = "1000,10000"
    """first rows of the training data, a number a pair of runs"""
    steps: str = "800,1600"
    """optimizer steps, one for each number of rows"""
    table_rate: float = 3e-2
    """Adam's rate of the table's rows"""
    results: str = str(RESULTS)
    """the CSV that rows are appended to"""

    def plan(self) -> list[tuple[int, int]]:
        """Return pairs of rows and steps. Raises ValueError for lists that do not fit."""
        try:
            rows, steps = (map(int, text.split(",")) for text in (self.rows, self.steps))
            return list(zip(rows, steps, strict=True))
        except ValueError:
            raise ValueError(
                f"rows={self.rows!r} and steps={self.steps!r}: give whole numbers, as many of one "
                "as of the other, say --rows 1000,10000 --steps 800,1600"
            ) from None


class Oracle(nn.Module):
    """Give a model z without noise, from its encoder or from a table.

    model: that decodes. num_rows: of the table; None reads the encoder.
    """

    def __init__(self, model: LlamaSoftPromptVAE, num_rows: int | None = None) -> None:
        super().__init__()
        self.model = model
        self.table: nn.Embedding | None = None
        if num_rows is not None:
            self.table = nn.Embedding(num_rows, model.latent.flat_dim, sparse=True)
            nn.init.normal_(self.table.weight, std=FIRST_STD)

    def z(self, batch: VAEBatch) -> Tensor:
        """Return z (B, Z) of a batch; the table has training rows only."""
        if self.table is not None:
            return self.table(batch.sample_index)
        return self.model.latent.mean(self.model.infer(batch.instruction))

    def forward(self, batch: VAEBatch, schedule: StepSchedule, seed: int) -> LossInputs:
        """Decode the word-dropped responses from z -> what the losses read, without a rate."""
        z = self.z(batch)
        input_ids = self.model._drop_words(batch, schedule, seed)
        decoded = self.model.decode(z, input_ids, batch.response)
        # The losses ask for a code; without its penalties they read the mean alone.
        output = ModelOutput(Posterior(z, torch.zeros_like(z)), None, z, decoded)
        return dataclasses.replace(loss_inputs(self.model, batch, output), penalties={})


def check(settings: Settings) -> None:
    """Refuse settings that cannot be followed here. Raises ValueError."""
    latent, precision = settings.model.latent.kind, settings.training.precision
    weight, rows = settings.loss.contrastive_weight, settings.training.eval_rows
    wrong = {
        f"{latent=}: z is a mean here; give --latent gaussian": latent != "gaussian",
        "streaming=True: a table needs numbered rows; drop it": settings.data.streaming,
        f"{precision=}: no engine keeps fp32 weights; give --precision fp32": precision != "fp32",
        f"contrastive_{weight=}: a table has no second view; give --contrastive-weight 0 "
        "--augmentation-probability 0": weight > 0,
        f"eval_{rows=}: z is shuffled; give --eval-rows 2 at least": rows < 2,
    }
    for message, is_wrong in wrong.items():
        if is_wrong:
            raise ValueError(message)


def first_rows(dataset: TokenDataset, count: int) -> TokenDataset:
    """Copy the first `count` rows. Raises ValueError where there are fewer."""
    if count > len(dataset):
        raise ValueError(f"rows={count}: the training data has {len(dataset)}; ask for fewer")
    rows = dataset.rows(range(count))
    instruction, response = (
        TokenColumn.from_lists([row[name].tolist() for row in rows]) for name in TOKEN_COLUMNS
    )
    tokenizer = dataset.tokenizer_name, dataset.tokenizer_fingerprint
    return TokenDataset(instruction, response, *tokenizer)


def fit(
    oracle: Oracle,
    settings: Settings,
    tokenizer: LlamaTokenizerWrapper,
    dataset: TokenDataset,
    steps: int,
    table_rate: float,
) -> float:
    """Train in place, with a line every 50 steps -> seconds.

    oracle: the model and where its z comes from.
    settings: of the run; `steps` counts instead of its `max_steps`.
    tokenizer, dataset: what is trained on.
    steps: optimizer steps of the whole schedule.
    table_rate: of the table, where there is one.
    """
    # The trainer's own parts, without its engine.
    training, model = settings.training, oracle.model
    loader = build_loader(settings, World(0, 1, 0, model.device), tokenizer, {"train": dataset})
    schedule = Schedule(settings, steps, AdaptiveInterventionScheduler.of(settings))
    objective = build_objective(settings, model.latent.flat_dim, world_size=1)
    optimizers: list[Optimizer] = [build_optimizer(parameter_groups(model, training), training)]
    if oracle.table is not None:
        betas = (training.adam_beta1, training.adam_beta2)
        optimizers.append(SparseAdam([oracle.table.weight], lr=table_rate, betas=betas))
    schedulers = [build_scheduler(optimizer, training, steps) for optimizer in optimizers]

    # Both sources start from here with the same random state.
    seed_everything(training.seed)
    oracle.train()
    nll, started = 0.0, time.perf_counter()
    for step, step_batch in zip(range(steps), loader, strict=False):
        plan = schedule(step, step_batch)
        for batch in step_batch.micro_batches:
            terms = objective(oracle(batch.to(model.device), plan, training.seed), plan)
            (sum_of(terms) / len(step_batch.micro_batches)).backward()
            [found] = [term for term in terms if term.name == "recon_nats_per_sequence"]
            nll += found.value.item() / len(step_batch.micro_batches)
        if training.max_grad_norm:
            nn.utils.clip_grad_norm_(model.parameters(), training.max_grad_norm)
        for optimizer, scheduler in zip(optimizers, schedulers, strict=True):
            optimizer.step()
            optimizer.zero_grad()
            scheduler.step()

        # The NLL is that of word-dropped text, a mean over the steps since the last line.
        if (since := (step % PROGRESS_STEPS) + 1) == PROGRESS_STEPS or step + 1 == steps:
            rate = (step + 1) / (time.perf_counter() - started)
            print(f"  step {step + 1}/{steps}  nll {nll / since:.2f}  {rate:.2f} it/s", flush=True)
            nll = 0.0
    loader.close()
    return time.perf_counter() - started


@torch.no_grad()
def measure(
    oracle: Oracle, tokenizer: LlamaTokenizerWrapper, batches: Sequence[VAEBatch]
) -> dict[str, float]:
    """Return NLL and cost of shuffled z, nats per sequence, and BLEU-4 of greedy texts."""
    # z of all rows, and a cycle through them in which each gets another row's.
    model = oracle.model
    with model.evaluating():
        z = torch.cat([oracle.z(batch.to(model.device)).cpu() for batch in batches])
    order = torch.randperm(len(z), generator=torch.Generator().manual_seed(0))
    shuffled = torch.empty_like(z)
    shuffled[order] = z[order.roll(1)]

    # Likelihoods without word dropout.
    responses = [ids.tolist() for batch in batches for ids in batch.response.rows()]
    instructions = [ids.tolist() for batch in batches for ids in batch.instruction.rows()]
    index = torch.cat([batch.sample_index for batch in batches])
    code = Posterior(z, torch.zeros_like(z))
    rows = EncodedRows(model, responses, instructions, index, code, z, batches[0].num_rows)
    nll = float(rows.nll(z).mean())
    cost = float(rows.nll(shuffled).mean()) - nll

    # Greedy texts beside the references.
    parts = z.split(rows.rows_per_batch)
    written = [ids for part in parts for ids in model.generate(part, temperature=0).tolist()]
    texts = [[tokenizer.decode(tokenizer.content(i)) for i in ids] for ids in (written, responses)]
    scores = ReconstructionMetrics()
    scores.update(texts[0], texts[1])
    bleu = scores.compute().bleu4
    return {"nll": round(nll, 3), "shuffled_cost": round(cost, 3), "bleu4": round(bleu, 4)}


def benchmark(argv: Sequence[str] | None = None) -> None:
    """Parse, train and measure what has no row yet, append a row after each run."""
    arguments = list(sys.argv[1:] if argv is None else argv)
    settings, options = parse_settings_and(OracleOptions, "Where is the channel slow?", arguments)
    plan, path, training = options.plan(), Path(options.results), settings.training
    check(settings)
    if training.num_threads:
        torch.set_num_threads(training.num_threads)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    tokenizer, splits = open_data(settings)
    # What changes no figure is no part of a run's identity.
    content = settings.model_dump_json(exclude={"training": {"output_dir", "num_threads"}})
    digest = hashlib.sha256(content.encode()).hexdigest()[:12]

    for (rows, steps), source in [(pair, source) for pair in plan for source in SOURCES]:
        # Pass over what is finished.
        is_table = source == "table"
        row: dict[str, Any] = {"z": source, "rows": rows, "steps": steps, "settings": digest}
        row["table_rate"] = options.table_rate if is_table else ""
        print(f"{source}, {rows} rows, {steps} steps", flush=True)
        finished = results.read(path) if path.exists() else []
        if any(all(old[name] == str(row[name]) for name in KEY) for old in finished):
            print("  its row is there already")
            continue

        # Train from the same weights, whatever ran before.
        dataset = first_rows(splits["train"], rows)
        oracle = Oracle(load_model(settings, tokenizer), rows if is_table else None).to(device)
        seconds = fit(oracle, settings, tokenizer, dataset, steps, options.table_rate)

        # The table has z of training rows only.
        measured: dict[str, TokenDataset] = {"": dataset}
        if not is_table and "validation" in splits:
            measured["validation_"] = splits["validation"]
        for prefix, data in measured.items():
            batches = evaluation_batches(data, VAECollator(), BATCH_ROWS, training.eval_rows)
            found = measure(oracle, tokenizer, list(batches))
            row |= {prefix + name: value for name, value in found.items()}
        row |= {"eval_rows": training.eval_rows, "seconds": round(seconds, 1)}
        print("  " + "  ".join(f"{name} {value}" for name, value in row.items()), flush=True)
        # The table is kept with the code: of paths on this machine only their names.
        named = [Path(text).name if Path(text).is_absolute() else text for text in arguments]
        results.append(path, [row | results.conditions(MODULE, named, device)])


if __name__ == "__main__":
    sys.exit(run(benchmark))
