"""Stage 1, one shard, in a worker process: convert, filter, tokenise, sign.

The kept records of a shard are its candidates: an Arrow file, in reading order, with texts, tokens
and what the second stage compares (exact key, MinHash signature, hash of the instruction). Beside
it lies a summary in JSON, which is written last: a shard with a summary is finished.
"""

from __future__ import annotations

import hashlib
import time
from dataclasses import asdict
from typing import Any

import numpy as np
import pyarrow as pa

from cdpvae.config import DataConfig
from cdpvae.data.tokenizer import LlamaTokenizerWrapper
from cdpvae.files import read_json, write_json, write_table
from cdpvae.preprocessing.dedup.clusters import exact_key
from cdpvae.preprocessing.dedup.lsh import band_shape
from cdpvae.preprocessing.dedup.minhash import Signer
from cdpvae.preprocessing.process import RecordFilters, RecordProcessor
from cdpvae.preprocessing.records import Record, compared_text
from cdpvae.preprocessing.stages.shards import Shard

CHUNK = 512
# The columns of a candidate, in order; `signature` follows where near-duplicates are looked for.
CANDIDATE_COLUMNS = {
    "record_number": pa.int64(),
    "line": pa.int64(),
    "split": pa.string(),
    "instruction": pa.string(),
    "response": pa.string(),
    "instruction_ids": pa.list_(pa.int32()),
    "response_ids": pa.list_(pa.int32()),
}


class ShardPreparer:
    """Prepares a shard and returns its summary. Picklable; holds all settings that matter.

    The summary, as JSON: source, start, candidates (rows of the Arrow file), counts (`Counts`),
    languages (label -> records), lengths (side -> histogram before the length filter),
    examples ("category: reason" -> the first record dropped so), keys (the first keys seen),
    seconds.
    """

    def __init__(self, config: DataConfig, wrapper: LlamaTokenizerWrapper) -> None:
        self.config, self.wrapper = config, wrapper
        self.filters = RecordFilters.from_config(config)
        self.signer = None
        if config.deduplication == "minhash":
            # The second stage would raise the same error, an hour later.
            band_shape(config.num_permutations, config.similarity)
            self.signer = Signer(config.num_permutations, config.shingle_words)

    def __call__(self, shard: Shard) -> dict[str, Any]:
        """Return the summary of a shard, which an earlier run may have prepared."""
        path = shard.directory / f"{shard.stem}.json"
        if path.exists():
            return read_json(path)
        clock = time.monotonic()
        processor = RecordProcessor(self.config, self.wrapper, self.filters, shard.name)
        # Chunk by chunk to columns: lists of Python numbers take ten times as much memory.
        tables = [self.table([])]
        for at in range(0, len(shard.records), CHUNK):
            chunk = enumerate(shard.records[at : at + CHUNK], start=shard.start + at)
            tables.append(self.table(list(processor.process(chunk))))
        table = pa.concat_tables(tables)
        write_table(shard.directory / f"{shard.stem}.arrow", table)
        # The summary comes last: it says that the shard is finished.
        summary = {
            "source": shard.source,
            "start": shard.start,
            "candidates": len(table),
            "counts": asdict(processor.counts),
            "languages": processor.languages,
            "lengths": {side: histogram.numbers for side, histogram in processor.lengths.items()},
            "examples": processor.examples,
            "keys": list(processor.keys),
            "seconds": round(time.monotonic() - clock, 3),
        }
        write_json(path, summary)
        return summary

    def table(self, records: list[Record]) -> pa.Table:
        """Return records as columns, with the columns by which they are compared."""
        # Store the record itself.
        columns = {
            name: pa.array([getattr(record, name) for record in records], kind)
            for name, kind in CANDIDATE_COLUMNS.items()
        }
        # Add what the second stage compares.
        columns["key"] = pa.array(
            [exact_key(record.instruction, record.response) for record in records], pa.binary(16)
        )
        columns["instruction_hash"] = pa.array(
            [instruction_hash(record.instruction) for record in records], pa.uint64()
        )
        if self.signer is not None:
            signatures = self.signer.signatures(
                [compared_text(record.instruction, record.response) for record in records]
            )
            flat = pa.array(np.ascontiguousarray(signatures).reshape(-1))
            columns["signature"] = pa.FixedSizeListArray.from_arrays(
                flat, self.config.num_permutations
            )
        return pa.table(columns)


def instruction_hash(instruction: str) -> int:
    """Return 64 bits of SHA-256: equal for equal instructions, uniform over different ones."""
    return int.from_bytes(hashlib.sha256(instruction.encode()).digest()[:8], "big")
