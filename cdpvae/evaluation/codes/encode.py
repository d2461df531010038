"""From the records of a file to a Parquet file of their codes, in bounded memory.

The input is cut into parts of a fixed number of records. A part is sorted by length, encoded, put
back into the order of the input and written; a killed run continues at its first missing part. At
the end the parts become row groups of one file.
"""

from __future__ import annotations

import itertools
import json
import shutil
import time
from collections.abc import Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import torch
from tqdm import tqdm

from cdpvae import files
from cdpvae.batch import PackedText
from cdpvae.data.example import apply_target
from cdpvae.evaluation.checkpoint import OpenedRun
from cdpvae.evaluation.codes.options import EncodeOptions
from cdpvae.evaluation.codes.store import KEY, column_of, describe_model, open_work, schema_of
from cdpvae.latents import Code
from cdpvae.preprocessing.counts import count, merge
from cdpvae.preprocessing.formats.convert import convert
from cdpvae.preprocessing.process import CHARACTERS_PER_TOKEN
from cdpvae.preprocessing.readers.source import Source

PART_KEY = b"cdpvae.part"


@dataclass
class Part:
    """Texts of some consecutive records. skipped: reason -> records. cut: texts that were cut."""

    read: int = 0
    ids: list[int] = field(default_factory=list)
    record_ids: list[str | None] = field(default_factory=list)
    texts: list[str] = field(default_factory=list)
    tokens: list[list[int]] = field(default_factory=list)
    skipped: dict[str, int] = field(default_factory=dict)
    cut: int = 0


@dataclass(frozen=True)
class Encoded:
    """What `encode_file` did. seconds: of this run, in which `rows_now` rows were encoded."""

    rows: int
    rows_now: int
    read: int
    skipped: dict[str, int]
    cut: int
    seconds: float

    def lines(self, output: str) -> list[str]:
        """Return the report: rows and speed, then records that were skipped, by reason."""
        rate = self.rows_now / max(self.seconds, 1e-9)
        lines = [
            f"{output}: {self.rows:,} rows of {self.read:,} records; {self.rows_now:,} rows in "
            f"{self.seconds:.1f} s, {rate:,.0f} rows/s"
        ]
        lines += [f"skipped: {reason}: {n:,}" for reason, n in sorted(self.skipped.items())]
        return [*lines, f"cut at the token limit: {self.cut:,}"] if self.cut else lines


def encode_file(opened: OpenedRun, options: EncodeOptions) -> Encoded:
    """Write the codes of every record that converts, begun now or by an earlier run.

    Raises ValueError for an unreadable input, one in which nothing converts, an output that exists,
    and unfinished work on something else.
    """
    output, source = Path(options.output), Source.parse(options.input)
    if output.exists():
        raise ValueError(f"output={str(output)!r} exists; remove it or name another file")
    # All that the codes depend on goes into the schema, and says what may be continued.
    # What the codes depend on goes into the file; unfinished work on anything else is refused.
    description = {
        **describe_model(opened),
        "input": source.identity(),
        "rows_per_batch": options.rows_per_batch,
        "part_records": options.part_records,
    }
    schema = schema_of(description, options.with_text)
    work = output.with_name(f"{output.name}.parts")
    with files.locked(work):
        # The parts that are missing, then all of them as one file.
        identity = {**description, "checkpoint": None, "with_text": options.with_text}
        open_work(work, identity, output)
        rows_now, seconds = _encode_parts(opened, options, source, schema, work)
        done = _totals(work, rows_now, seconds)
        # A file without a row would only hide that nothing was understood.
        if not done.rows:
            reasons = ", ".join(f"{reason} ({n})" for reason, n in done.skipped.items())
            shutil.rmtree(work)
            raise ValueError(
                f"input {options.input}: none of {done.read} records gives a text: "
                f"{reasons or 'it is empty'}; docs/formats.md has the formats"
            )
        _join(_parts(work), schema, output)
        shutil.rmtree(work)
    return done


def encode_tokens(opened: OpenedRun, tokens: list[list[int]], rows_per_batch: int) -> Code:
    """Return the codes of rows of token ids, on the CPU, in the order of the rows.

    tokens: at least one row. rows_per_batch: rows of similar length that are encoded together.
    """
    # Rows of similar length together; a stable sort, so that a part gives the same every time.
    order = sorted(range(len(tokens)), key=lambda row: len(tokens[row]))
    codes = []
    for start in range(0, len(order), rows_per_batch):
        rows = [tokens[row] for row in order[start : start + rows_per_batch]]
        codes.append(opened.model.infer(PackedText.from_lists(rows).to(opened.model.device)))
    # Back in the order of the input, after the last batch: a copy to the CPU waits for the device.
    back = torch.empty(len(order), dtype=torch.int64)
    back[torch.tensor(order)] = torch.arange(len(order))
    code = type(codes[0]).concat(codes).to(torch.float32, "cpu")
    return code.map(lambda tensor: tensor[back])


@torch.no_grad()
def _encode_parts(
    opened: OpenedRun, options: EncodeOptions, source: Source, schema: pa.Schema, work: Path
) -> tuple[int, float]:
    """Write the parts that are missing -> rows encoded now, and the seconds it took."""
    # What an earlier run finished is not read again.
    finished = [_part_facts(path) for path in _parts(work)]
    # The last part says so itself: an input may end exactly with a full part.
    if finished and finished[-1]["last"]:
        return 0, 0.0
    parts = _read_parts(opened, options, source, sum(facts["read"] for facts in finished))
    rows, clock = 0, time.monotonic()
    number = len(finished)
    # The next part is read and tokenised while this one is encoded.
    with (
        ThreadPoolExecutor(1) as reader,
        tqdm(desc="encode", unit=" rows", disable=None) as bar,
    ):
        part: Part | None = next(parts)
        while part is not None:
            # The reader's thread has the next part; None after the last one.
            following = reader.submit(next, parts, None)
            code = None
            if part.tokens:
                code = encode_tokens(opened, part.tokens, options.rows_per_batch)
            after = following.result()
            table = _table(part, code, schema, last=after is None)
            # A part is whole or absent, so that its file name says that it is finished.
            sink = pa.BufferOutputStream()
            pq.write_table(table, sink)
            files.write_bytes(work / f"part-{number:05d}.parquet", memoryview(sink.getvalue()))
            rows, number = rows + len(part.ids), number + 1
            bar.update(len(part.ids))
            part = after
    return rows, time.monotonic() - clock


def _read_parts(
    opened: OpenedRun, options: EncodeOptions, source: Source, start: int
) -> Iterator[Part]:
    """Yield the parts from record `start` on, at least one, perhaps without records."""
    # One part at least, so that an empty input has its counts too.
    records = source.records(start)
    for number in itertools.count():
        raw_records = list(itertools.islice(records, options.part_records))
        if not raw_records and number:
            return
        yield _read_part(opened, raw_records, start)
        start += len(raw_records)


def _read_part(opened: OpenedRun, raw_records: list[Any], start: int) -> Part:
    """Convert and tokenise some records. start: number of the first of them in the input."""
    data, part = opened.settings.data, Part(read=len(raw_records))
    limit = data.max_instruction_tokens
    # What does not convert is counted; numbers count all records, so that none shifts.
    for number, raw in enumerate(raw_records, start):
        converted = raw.problem or convert(raw.value, data.format, data.turns)
        if isinstance(converted, str):
            count(part.skipped, converted)
            continue
        own = raw.value.get("id") if isinstance(raw.value, Mapping) else None
        own = own if own is None or isinstance(own, str) else json.dumps(own, default=str)
        for example in converted:
            part.ids.append(number)
            part.record_ids.append(own)
            part.texts.append(apply_target(example, data.target).instruction)
    # A tokenizer needs gigabytes for a text far beyond the limit: only its beginning counts.
    heads = [text[: limit * CHARACTERS_PER_TOKEN] for text in part.texts]
    whole = opened.tokenizer.encode_instructions(heads, truncate=False)
    part.cut = sum(len(row) > limit for row in whole)
    part.tokens = [row[:limit] for row in whole]
    return part


def _table(part: Part, code: Code | None, schema: pa.Schema, last: bool) -> pa.Table:
    """Return a part as a table. last: whether the input ends with it."""
    columns: dict[str, Any] = {"id": part.ids, "record_id": part.record_ids, "text": part.texts}
    made = {
        name: pa.array(values, schema.field(name).type)
        for name, values in columns.items()
        if name in schema.names
    }
    # A part of which nothing converts has no code, and columns without rows.
    for column in schema:
        if column.name not in columns:
            made[column.name] = (
                pa.array([], column.type)
                if code is None
                else column_of(code.tensors()[column.name], column.type)
            )
    facts = {"read": part.read, "skipped": part.skipped, "cut": part.cut, "last": last}
    metadata = {**(schema.metadata or {}), PART_KEY: json.dumps(facts).encode()}
    return pa.table([made[n] for n in schema.names], schema=schema.with_metadata(metadata))


def _parts(work: Path) -> list[Path]:
    """Return the finished parts in order."""
    return sorted(work.glob("part-*.parquet"))


def _part_facts(path: Path) -> dict[str, Any]:
    """Return what was counted in a part."""
    return json.loads(pq.read_schema(path).metadata[PART_KEY])


def _totals(work: Path, rows_now: int, seconds: float) -> Encoded:
    """Add up the counts of all parts."""
    # Of all parts, those of earlier runs too: the report is that of the whole file.
    skipped: dict[str, int] = {}
    paths = _parts(work)
    facts = [_part_facts(path) for path in paths]
    for part in facts:
        merge(skipped, part["skipped"])
    return Encoded(
        rows=sum(pq.read_metadata(path).num_rows for path in paths),
        rows_now=rows_now,
        read=sum(part["read"] for part in facts),
        skipped=skipped,
        cut=sum(part["cut"] for part in facts),
        seconds=seconds,
    )


def _join(parts: list[Path], schema: pa.Schema, output: Path) -> None:
    """Put all parts into one file, a row group each, which is whole or absent."""
    assert schema.metadata and KEY in schema.metadata
    # One part in memory at a time; the name of the output appears when all of it is on the disk.
    joined = parts[0].with_name("joined.parquet")
    with pq.ParquetWriter(joined, schema) as writer:
        for path in parts:
            table = pq.read_table(path)
            if len(table):
                writer.write_table(table.replace_schema_metadata(schema.metadata))
    files.flush(joined)
    joined.replace(output)
    files.flush(output.parent)
