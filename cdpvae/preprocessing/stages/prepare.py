"""Stage 1, shard by shard in worker processes: convert, filter, tokenise, sign.

What is left of a shard are its candidates, in order, as an Arrow file: texts, tokens, and what the
second stage compares (exact key, MinHash signature, hash of the instruction). Beside it a summary
in JSON, written last: a shard with a summary is finished.
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
from cdpvae.preprocessing.process import SIDES, Pair, PairFilters, PairMaker, comparable
from cdpvae.preprocessing.stages.shards import Shard

CHUNK = 512


class Preparer:
    """The function of stage 1: Shard -> summary. Picklable; holds all settings that matter.

    The summary, as JSON: source, start, candidates (rows of the Arrow file), counts (`Counts`),
    languages (label -> pairs), lengths (side -> histogram of pairs before the length filter),
    examples ("stage: reason" -> the first case), keys (the first keys seen), seconds.
    """

    def __init__(self, config: DataConfig, wrapper: LlamaTokenizerWrapper) -> None:
        self.config, self.wrapper = config, wrapper
        self.filters = PairFilters.of(config)
        self.signer = None
        if config.deduplication == "minhash":
            # The second stage would say the same, an hour later.
            band_shape(config.num_permutations, config.similarity)
            self.signer = Signer(config.num_permutations, config.shingle_words)

    def __call__(self, shard: Shard) -> dict[str, Any]:
        path = shard.directory / f"{shard.stem}.json"
        if path.exists():
            return read_json(path)
        clock = time.monotonic()
        maker = PairMaker(self.config, self.wrapper, self.filters, shard.name)
        # Chunk by chunk to columns: lists of Python numbers take ten times as much memory.
        tables = [self.table([])]
        for at in range(0, len(shard.records), CHUNK):
            chunk = enumerate(shard.records[at : at + CHUNK], start=shard.start + at)
            tables.append(self.table(list(maker.process(chunk))))
        table = pa.concat_tables(tables)
        write_table(shard.directory / f"{shard.stem}.arrow", table)
        summary = {
            "source": shard.source,
            "start": shard.start,
            "candidates": len(table),
            "counts": asdict(maker.counts),
            "languages": maker.languages,
            "lengths": {side: histogram.numbers for side, histogram in maker.lengths.items()},
            "examples": maker.examples,
            "keys": list(maker.keys),
            "seconds": round(time.monotonic() - clock, 3),
        }
        write_json(path, summary)
        return summary

    def table(self, pairs: list[Pair]) -> pa.Table:
        """Pairs as columns; `signature` only where near-duplicates are looked for."""
        records = [pair.record for pair in pairs]
        columns = {
            "position": pa.array([pair.position for pair in pairs], pa.int64()),
            "split": pa.array([pair.split for pair in pairs], pa.string()),
            **{side: pa.array([getattr(r, side) for r in records], pa.string()) for side in SIDES},
            **{
                f"{side}_ids": pa.array(
                    [getattr(r, f"{side}_ids") for r in records], pa.list_(pa.int32())
                )
                for side in SIDES
            },
            "key": pa.array([exact_key(r.instruction, r.response) for r in records], pa.binary(16)),
            "instruction_hash": pa.array(
                [instruction_hash(r.instruction) for r in records], pa.uint64()
            ),
        }
        if self.signer is not None:
            signatures = self.signer.signatures([comparable(r) for r in records])
            flat = pa.array(np.ascontiguousarray(signatures).reshape(-1))
            columns["signature"] = pa.FixedSizeListArray.from_arrays(
                flat, self.config.num_permutations
            )
        return pa.table(columns)


def instruction_hash(instruction: str) -> int:
    """64 bits of SHA-256: equal for equal instructions, uniform over different ones."""
    return int.from_bytes(hashlib.sha256(instruction.encode()).digest()[:8], "big")
