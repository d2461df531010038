"""How fast preprocessing is, how much memory it takes, and how both grow.

    python -m benchmarks.data [--shared ../shared/data] [--sizes 10000 30000 100000] [--workers 2]
    python -m benchmarks.data --part deduplication --sizes 20000
    python -m benchmarks.data --part files          a Markdown table of the real files

Input: real records repeated with edits, from public data that lies beside the repository. Parts:
`pipeline` (the command as a user runs it: seconds of each stage, peak memory of all processes),
`steps` (one process: what each step of the first stage costs), `deduplication` (against datasketch,
one record at a time and signing in bulk), `packing` (against padding, on the largest output of
`pipeline`), `files` (counts of every real file, printed only).
Appends rows to `results/data.csv` and draws `results/data.png` from them.
"""

from __future__ import annotations

import dataclasses
import json
import os
import shutil
import subprocess
import sys
import time
from collections.abc import Callable, Iterable, Sequence
from functools import partial
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from datasketch import MinHash, MinHashLSH

from benchmarks.support import data_chart, rows
from benchmarks.support.corpus import FILES, tokenizer_directory, write_corpus
from benchmarks.support.memory import ProcessesWatch
from benchmarks.support.timing import Failure, interleaved
from cdpvae.command_line import parse_options, run
from cdpvae.config import DataConfig, TrainingConfig
from cdpvae.data import (
    LlamaTokenizerWrapper,
    PreprocessedDataset,
    RowCountSampler,
    TokenBudgetSampler,
)
from cdpvae.data.example import Example
from cdpvae.preprocessing.dedup.clusters import exact_key, find_duplicates
from cdpvae.preprocessing.dedup.minhash import Signer, jaccard, shingles
from cdpvae.preprocessing.filters.build import build_text_filters, build_token_filters
from cdpvae.preprocessing.formats.convert import convert
from cdpvae.preprocessing.readers.source import Source
from cdpvae.preprocessing.records import Filter, RawRecord, Record, compared_text

MODULE = "benchmarks.data"
PACKAGES = ("datasketch", "numpy", "pyarrow", "tokenizers")
CPU = torch.device("cpu")
ROUNDS = 3
# Soft prompts of a row, and tokens of a micro-batch.
PROMPTS, BUDGET = 32, 8192


@dataclasses.dataclass
class DataOptions:
    """What to measure, on what."""

    shared: Path = Path("../shared/data")
    """directory with the real data"""
    work: Path = Path("runs/benchmark_data")
    part: Literal["all", "pipeline", "steps", "deduplication", "packing", "files"] = "all"
    sizes: tuple[int, ...] = (10_000, 30_000, 100_000)
    """records of the inputs; growth needs several"""
    workers: int = 2
    seed: int = 0
    output: Path = rows.RESULTS

    def corpus(self, records: int) -> Path:
        """Write the input of one size and return its path."""
        return write_corpus(self.shared, self.work, records, self.seed)

    def tokenizer(self) -> str:
        """Return the directory of the tokenizer."""
        return str(tokenizer_directory(self.shared, self.work))


def row(
    part: str, measure: str, records: int, values: Sequence[float], unit: str
) -> dict[str, Any]:
    """Return the row of one measure: the median, and p20 and p80 where there are several values.

    part: the part of the benchmark.
    measure: what is measured.
    records: how many records the input has.
    values: the measured values.
    unit: their unit.
    """
    low, high = np.percentile(values, [20, 80]).round(4).tolist() if len(values) > 1 else ("", "")
    return {
        "part": part,
        "measure": measure,
        "records": records,
        "value": round(float(np.median(values)), 4),
        "p20": low,
        "p80": high,
        "unit": unit,
    }


def rates_of(work: dict[str, Callable[[], object]], count: int) -> dict[str, list[float]]:
    """Time pieces of work that process `count` records each, in interleaved rounds.

    Returns name -> records per second as (p20, median, p80). Raises RuntimeError when a piece of
    work fails: no rival may be missing here.
    """
    found = {}
    for name, timing in interleaved(work, device=CPU, rounds=ROUNDS, warmup=0).items():
        if isinstance(timing, Failure):
            raise RuntimeError(f"{name}: {timing.reason}")
        found[name] = [count / timing.p80, count / timing.p50, count / timing.p20]
    return found


def measure_pipeline(options: DataOptions) -> list[dict[str, Any]]:
    """Run the command once for each size: a run takes minutes and has up to 100,000 records."""
    found = []
    for records in options.sizes:
        # Run the command and watch its memory.
        source, out = options.corpus(records), options.work / f"out-{records}"
        shutil.rmtree(out, ignore_errors=True)
        command = [sys.executable, "-m", "cdpvae.preprocess", "--input", str(source)]
        command += ["--tokenizer", options.tokenizer(), "--processed-dir", str(out)]
        clock = time.monotonic()
        process = subprocess.Popen([*command, "--workers", str(options.workers)])
        with ProcessesWatch(process.pid) as watch:
            status = process.wait()
        if status:
            raise RuntimeError(f"{records} records: exit status {status}, see above")
        whole = time.monotonic() - clock
        # The manifest has the seconds of each stage.
        manifest = json.loads((out / "manifest.json").read_text())
        for stage, seconds in manifest["run"]["seconds"].items():
            found.append(row("pipeline", f"{stage} seconds", records, [seconds], "s"))
            rate = records / max(seconds, 1e-3)
            found.append(row("pipeline", f"{stage} records/s", records, [rate], "records/s"))
        found.append(row("pipeline", "whole command", records, [whole], "s"))
        found.append(row("pipeline", "peak memory", records, [watch.peak / 2**20], "MiB"))
        kept = manifest["counts"]["kept"]
        found.append(row("pipeline", "records kept", records, [kept], "records"))
    return found


def measure_steps(options: DataOptions) -> list[dict[str, Any]]:
    """Time the steps of the first stage in one process, over the same records."""
    # Prepare what each step takes in.
    os.environ["TOKENIZERS_PARALLELISM"] = "false"
    count = min(options.sizes)
    source = Source.parse(str(options.corpus(count)))
    config = DataConfig()
    wrapper = LlamaTokenizerWrapper.from_pretrained(options.tokenizer())
    raws = list(source.records())
    examples = [first_example(raw) for raw in raws]
    instructions = [example.instruction for example in examples]
    responses = [example.response for example in examples]
    instruction_ids = wrapper.encode_instructions(instructions, truncate=False)
    response_ids = wrapper.encode_responses(responses, truncate=False)
    columns = zip(raws, instructions, responses, instruction_ids, response_ids, strict=True)
    records = [
        Record(number, raw.line, None, instruction, response, encoded, answer)
        for number, (raw, instruction, response, encoded, answer) in enumerate(columns)
    ]
    texts = [compared_text(*sides) for sides in zip(instructions, responses, strict=True)]
    signer = Signer(config.num_permutations, config.shingle_words)
    filters = [*build_text_filters(config), *build_token_filters(config)]
    # Time the steps.
    steps: dict[str, Callable[[], object]] = {
        "read": lambda: sum(1 for _ in source.records()),
        "convert": lambda: [convert(raw.value) for raw in raws],
        **{type(keep).__name__: partial(apply_filter, keep, records) for keep in filters},
        "tokenise": lambda: (
            wrapper.encode_instructions(instructions),
            wrapper.encode_responses(responses),
        ),
        "exact key": lambda: list(map(exact_key, instructions, responses)),
        "sign": lambda: signer.signatures(texts),
    }
    rates = rates_of(steps, count)
    return [row("steps", name, count, rates[name], "records/s") for name in steps]


def first_example(raw: RawRecord) -> Example:
    """Convert a record of the corpus, all of which are pairs."""
    converted = convert(raw.value)
    assert not isinstance(converted, str), converted
    return converted[0]


def apply_filter(keep: Filter, records: list[Record]) -> list[str | None]:
    """Apply one filter to all records."""
    return [keep(record) for record in records]


def measure_deduplication(options: DataOptions) -> list[dict[str, Any]]:
    """Time signing, finding and verifying in one process and thread, beside two ways of datasketch.

    All of them look for pairs at a similarity of 0.5 or lower, and verify them.
    """
    # The texts, and the settings that all three ways share.
    config, count = DataConfig(), min(options.sizes)
    lines = options.corpus(count).read_text().splitlines()
    pairs = [(one["instruction"], one["output"]) for one in map(json.loads, lines)]
    texts = [compared_text(*pair) for pair in pairs]
    signer = Signer(config.num_permutations, config.shingle_words)
    found: dict[str, int] = {}

    # Three ways; each notes how many records it removes.
    def batched() -> None:
        """Deduplicate as preprocessing does."""
        keys = np.array([exact_key(*pair) for pair in pairs], "V16")
        duplicates = find_duplicates(
            keys,
            signer.signatures(texts),
            texts.__getitem__,
            similarity=config.similarity,
            shingle_words=config.shingle_words,
        )
        found["ours"] = int(np.count_nonzero(duplicates.keeper != np.arange(count)))

    def one_at_a_time() -> None:
        """Deduplicate with datasketch, which signs each record by itself."""
        signed = (sign(text, config) for text in texts)
        found["datasketch"] = removed_by_datasketch(texts, signed, config)

    def in_bulk() -> None:
        """Deduplicate with datasketch, which signs all records first."""
        elements = ([s.encode() for s in shingles(text, config.shingle_words)] for text in texts)
        signed = MinHash.generator(elements, num_perm=config.num_permutations)
        found["datasketch, signed in bulk"] = removed_by_datasketch(texts, signed, config)

    # Time them in turns, and compare.
    rates = rates_of({"ours": batched, "one": one_at_a_time, "bulk": in_bulk}, count)

    def times_faster(rival: str) -> list[float]:
        """Compare the medians, which are the second of three values."""
        return [rates["ours"][1] / rates[rival][1]]

    return [
        row("deduplication", "deduplication, batched", count, rates["ours"], "records/s"),
        row(
            "deduplication",
            "deduplication, datasketch one at a time",
            count,
            rates["one"],
            "records/s",
        ),
        row(
            "deduplication",
            "deduplication, datasketch signing in bulk",
            count,
            rates["bulk"],
            "records/s",
        ),
        row("deduplication", "times faster than one at a time", count, times_faster("one"), ""),
        row("deduplication", "times faster than signed in bulk", count, times_faster("bulk"), ""),
        *[row("deduplication", f"removed by {n}", count, [v], "records") for n, v in found.items()],
    ]


def sign(text: str, config: DataConfig) -> MinHash:
    """Sign one text with datasketch."""
    signature = MinHash(num_perm=config.num_permutations)
    signature.update_batch([shingle.encode() for shingle in shingles(text, config.shingle_words)])
    return signature


def removed_by_datasketch(
    texts: Sequence[str], signatures: Iterable[MinHash], config: DataConfig
) -> int:
    """Count the records that datasketch removes as in its documentation: query, verify, insert."""
    # A threshold of 0.5 finds nearly all pairs at 0.85; its own 0.85 would miss half of them.
    index = MinHashLSH(threshold=0.5, num_perm=config.num_permutations)
    sets: list[frozenset[str]] = []
    removed = 0
    for number, (text, signature) in enumerate(zip(texts, signatures, strict=True)):
        mine = shingles(text, config.shingle_words)
        twins = index.query(signature)
        removed += any(jaccard(mine, sets[twin]) >= config.similarity for twin in twins)
        sets.append(mine)
        index.insert(number, signature)
    return removed


def measure_packing(options: DataOptions) -> list[dict[str, Any]]:
    """Measure which share of all positions are tokens, over an epoch, under default settings."""
    # Lengths of real rows, and what a row costs with its soft prompts.
    data = PreprocessedDataset(options.work / f"out-{max(options.sizes)}")
    training, ranks = TrainingConfig(), 2
    lengths = data.response_lengths, data.instruction_lengths
    costs = lengths[0].astype(np.int64) + lengths[1] + PROMPTS
    grad_accum = training.gradient_accumulation_steps
    # Micro-batches of a number of rows: how much padding would add, and the heaviest rank.
    by_rows = RowCountSampler(
        *lengths,
        rows_per_micro_batch=training.per_device_batch_size,
        grad_accum=grad_accum,
        world_size=ranks,
        seed=options.seed,
    )
    padded = filled = 0
    # Of each optimizer step, how far the heaviest rank is above the mean.
    heaviest = []
    for step in range(by_rows.steps_in(0)):
        per_rank = np.zeros(ranks, np.int64)
        for bins in by_rows.micro_batches(0, step):
            for rank, taken in enumerate(bins):
                padded += sum(int(side[taken].max() * len(taken)) for side in lengths)
                padded += PROMPTS * len(taken)
                per_rank[rank] += costs[taken].sum()
        filled += int(per_rank.sum())
        heaviest.append(per_rank.max() / per_rank.mean() - 1)
    # Micro-batches of a budget of tokens: how much of it is filled.
    by_tokens = TokenBudgetSampler(
        *lengths,
        tokens_per_micro_batch=BUDGET,
        prompt_tokens=PROMPTS,
        grad_accum=grad_accum,
        world_size=ranks,
        seed=options.seed,
    )
    fills = [
        float(np.mean([costs[taken].sum() / BUDGET for bins in step for taken in bins]))
        for step in map(partial(by_tokens.micro_batches, 0), range(by_tokens.steps_in(0)))
    ]
    count = len(data)
    return [
        row("packing", "tokens of all positions, padded", count, [filled / padded], ""),
        row("packing", "tokens of all positions, packed", count, [1.0], ""),
        row("packing", "heaviest rank above the mean, a step", count, heaviest, ""),
        row("packing", f"filled of a budget of {BUDGET}, a step", count, fills, ""),
    ]


def process_files(options: DataOptions) -> dict[str, Any]:
    """Process every real file in one run with the default settings; return the manifest."""
    # A fresh directory, so that nothing is reused.
    out = options.work / "files"
    shutil.rmtree(out, ignore_errors=True)
    command = [sys.executable, "-m", "cdpvae.preprocess", "--processed-dir", str(out)]
    command += ["--tokenizer", options.tokenizer(), "--workers", str(options.workers)]
    command += ["--input", *(str(options.shared / name) for name in FILES)]
    subprocess.run(command, check=True, stdout=subprocess.DEVNULL)
    return json.loads((out / "manifest.json").read_text())


def files_table(manifest: dict[str, Any]) -> str:
    """Return a Markdown table with a line for each file: in, converted, dropped, kept."""

    def reason_list(tally: dict[str, int]) -> str:
        return "; ".join(f"{reason} {number:,}" for reason, number in tally.items()) or "-"

    lines = ["| file | in | converted | not converted | filtered | duplicates | kept |"]
    lines.append("|---|--:|--:|---|---|---|--:|")
    for name, counts in [*manifest["sources"].items(), ("**total**", manifest["counts"])]:
        reasons = [reason_list(counts[key]) for key in ("not_converted", "filtered", "duplicates")]
        numbers = f"| {name} | {counts['read']:,} | {counts['converted']:,}"
        lines.append(f"{numbers} | {' | '.join(reasons)} | {counts['kept']:,} |")
    return "\n".join(lines)


MEASURES: dict[str, Callable[[DataOptions], list[dict[str, Any]]]] = {
    "pipeline": measure_pipeline,
    "steps": measure_steps,
    "deduplication": measure_deduplication,
    "packing": measure_packing,
}


def main(argv: Sequence[str] | None = None) -> None:
    """Measure the parts that are asked for, print them, and append them to the results."""
    arguments = list(sys.argv[1:] if argv is None else argv)
    options = parse_options(DataOptions, __doc__ or "", arguments)
    if options.part == "files":
        print(files_table(process_files(options)))
        return
    # Every row carries the conditions it was measured under.
    conditions = rows.conditions(MODULE, arguments, CPU, PACKAGES)
    results = options.output / "data.csv"
    for name in list(MEASURES) if options.part == "all" else [options.part]:
        found = MEASURES[name](options)
        rows.append(results, [one | conditions for one in found])
        for one in found:
            print(
                f"{one['part']:<14} {one['measure']:<40} {one['records']:>8,} "
                f"{one['value']:>14,.3f} {one['unit']}",
                flush=True,
            )
    data_chart.draw(results)


if __name__ == "__main__":
    sys.exit(run(main))
