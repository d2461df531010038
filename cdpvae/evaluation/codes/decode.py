"""From a file of codes to texts, a JSON line each, continued at a batch where a run was killed.

The draws of a batch depend on the seed and its place in the file alone, so that a run that was
killed writes what an undisturbed one writes.
"""

from __future__ import annotations

import dataclasses
import json
import os
import random
import shutil
from collections.abc import Iterator
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import torch
from tqdm import tqdm

from cdpvae import files
from cdpvae.evaluation.checkpoint import OpenedRun, refuse_without_instruction
from cdpvae.evaluation.codes.options import DecodeOptions
from cdpvae.evaluation.codes.store import (
    check_same_weights,
    code_of,
    describe_model,
    open_work,
    read_description,
)
from cdpvae.evaluation.likelihood import EVALUATION_EPOCH

# The flags that do not change what is written.
_FREE = ("checkpoint", "input", "output", "backbone", "device", "any_checkpoint")


def decode_file(opened: OpenedRun, options: DecodeOptions) -> int:
    """Write a text for every code, begun now or by an earlier run -> the number of texts.

    Raises ValueError for a file that holds no codes, those of another family or shape or, unless
    the options insist, of other weights; for an output that exists, for unfinished work on
    something else, and for a decoder that reads more than a code.
    """
    path, output = Path(options.input), Path(options.output)
    if output.exists():
        raise ValueError(f"output={str(output)!r} exists; remove it or name another file")
    refuse_without_instruction(opened, "a file of codes")
    model, codes = describe_model(opened), read_description(path)
    # Codes mean something to their own family only.
    for name in ("family", "shapes"):
        if codes.get(name) != model[name]:
            raise ValueError(
                f"codes {options.input!r} have {name}={codes.get(name)}, the checkpoint "
                f"{model[name]}; give the checkpoint that encoded them ({codes.get('checkpoint')})"
            )
    # To another run's decoder they mean nothing, though they fit.
    if not options.any_checkpoint:
        check_same_weights(codes, model, options.input)
    work = output.with_name(f"{output.name}.unfinished")
    with files.locked(work):
        flags = {k: v for k, v in dataclasses.asdict(options).items() if k not in _FREE}
        identity = {"codes": files.sha256(path), "model": model["checkpoint_sha256"], **flags}
        open_work(work, identity, output)
        lines = work / "lines.jsonl"
        _write_missing(opened, options, model["shapes"], lines)
        os.replace(lines, output)
        files.flush(output.parent)
        shutil.rmtree(work)
    return pq.read_metadata(path).num_rows


@torch.no_grad()
def _write_missing(
    opened: OpenedRun, options: DecodeOptions, shapes: dict[str, list[int]], lines: Path
) -> None:
    """Append the lines that are missing. shapes: of the code's tensors."""
    size = options.rows_per_batch
    total = pq.read_metadata(options.input).num_rows
    start = keep_whole_batches(lines, size, total)
    with (
        lines.open("ab") as file,
        tqdm(total=total, initial=start, desc="decode", unit=" rows", disable=None) as bar,
    ):
        for table in batches(Path(options.input), start, size):
            texts = _texts(opened, options, table, shapes, start)
            names = [n for n in ("id", "record_id") if n in table.column_names]
            for row, text in zip(table.select(names).to_pylist(), texts, strict=True):
                present = {name: value for name, value in row.items() if value is not None}
                line = json.dumps({**present, "text": text}, ensure_ascii=False)
                file.write(line.encode("utf-8", "backslashreplace") + b"\n")
            file.flush()
            start += len(table)
            bar.update(len(table))
        os.fsync(file.fileno())


def keep_whole_batches(lines: Path, size: int, total: int) -> int:
    """Cut a file of lines after its last whole batch -> the lines that stay.

    size: lines of a batch. total: lines of the finished file, whose last batch may be shorter.
    """
    if not lines.exists():
        return 0
    # A line without its newline was torn by the kill and does not count.
    with lines.open("rb") as file:
        count = sum(line.endswith(b"\n") for line in file)
    kept = count if count == total else count // size * size
    with lines.open("r+b") as file:
        for _ in range(kept):
            file.readline()
        file.truncate(file.tell())
    return kept


def batches(path: Path, start: int, size: int) -> Iterator[pa.Table]:
    """Yield the rows of a Parquet file from `start` on, `size` at a time, across row groups."""
    file, waiting = pq.ParquetFile(path), None
    for group in range(file.num_row_groups):
        # Groups before the start are not read.
        rows = file.metadata.row_group(group).num_rows
        if start >= rows:
            start -= rows
            continue
        for batch in file.iter_batches(size, row_groups=[group]):
            table = pa.Table.from_batches([batch]).slice(start)
            start = max(0, start - len(batch))
            waiting = table if waiting is None else pa.concat_tables([waiting, table])
            while len(waiting) >= size:
                yield waiting.slice(0, size)
                waiting = waiting.slice(size)
    if waiting is not None and len(waiting):
        yield waiting


def _texts(
    opened: OpenedRun,
    options: DecodeOptions,
    table: pa.Table,
    shapes: dict[str, list[int]],
    start: int,
) -> list[str]:
    """Write the texts of a batch of codes whose first row has the number `start`."""
    model = opened.model
    code = code_of(table, model.latent.code_type, shapes).to(torch.float32, model.device)
    # The mean, or a draw that depends on the row's number alone.
    if options.source == "mean":
        z = model.latent.mean(code)
    else:
        rows = torch.arange(start, start + len(table), device=model.device)
        noise = model.training_noise(rows, seed=options.seed, epoch=EVALUATION_EPOCH)
        z = model.latent.sample(code, noise)
    # Tokens of a batch are drawn by a generator of its own; a sum of seed and place would give the
    # next seed the draws of the next batch.
    key = random.Random(f"{options.seed}/{start}").getrandbits(63)
    generator = torch.Generator(device=model.device).manual_seed(key)
    ids = model.generate(
        z,
        max_length=options.max_length,
        temperature=options.temperature,
        top_p=options.top_p,
        generator=generator,
    )
    return [opened.tokenizer.decode(row) for row in ids.tolist()]
