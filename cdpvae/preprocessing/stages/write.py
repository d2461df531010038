"""Stage 3: the kept candidates become Arrow files in the layout of `datasets.save_to_disk`.

    RESULT/train/data-00000-of-00003.arrow ...  dataset_info.json  state.json

Files and batches hold a fixed number of rows, whatever the shards were, so that equal rows give
equal bytes. A file that exists is whole and is not written again.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
from datasets import DatasetInfo, Features

from cdpvae.files import write_json, write_table
from cdpvae.preprocessing.records import ROW_SCHEMA
from cdpvae.preprocessing.stages.candidates import Candidates

# Rows of a file, and of a batch in it, as `datasets` reads them.
FILE_ROWS = 20_000
BATCH_ROWS = 1_000


class SplitWriter:
    """Writes candidates as the rows of a split.

    directory: below it each split has its own directory.
    candidates: where rows are taken from.
    names: the names of the inputs.
    fingerprint: hex digits that identify inputs and settings. The fingerprint that `datasets` would
        use depends on the time of writing.
    """

    def __init__(
        self, directory: Path, candidates: Candidates, names: list[str], fingerprint: str
    ) -> None:
        self.directory, self.candidates = directory, candidates
        self.names, self.fingerprint = names, fingerprint
        self._record_ids = candidates.record_ids()
        self._sources = candidates.sources()

    def write(self, split: str, rows: np.ndarray) -> Iterator[int]:
        """Write the candidates `rows` (ascending) as a split; yield the rows written, file by file.

        A split without rows is not written.
        """
        if not len(rows):
            return
        # Write the Arrow files that no earlier run has written.
        directory = self.directory / split
        directory.mkdir(parents=True, exist_ok=True)
        total = -(-len(rows) // FILE_ROWS)
        files = [f"data-{number:05d}-of-{total:05d}.arrow" for number in range(total)]
        for number, name in enumerate(files):
            part = rows[number * FILE_ROWS : (number + 1) * FILE_ROWS]
            if not (directory / name).exists():
                write_table(directory / name, self._table(part), batch_rows=BATCH_ROWS)
            yield len(part)
        self._write_metadata(directory, split, files)

    def _table(self, rows: np.ndarray) -> pa.Table:
        """Return candidates as a table with the columns of ROW_SCHEMA."""
        # Texts and tokens are copied as they are; the first two columns are numbers until here.
        columns = self.candidates.take(rows, ROW_SCHEMA.names[2:])
        names = pa.array(self.names, pa.string())
        return pa.table(
            [
                pa.array(self._record_ids[rows], pa.int64()),
                names.take(pa.array(self._sources[rows])),
                *columns.itercolumns(),
            ],
            schema=ROW_SCHEMA,
        )

    def _write_metadata(self, directory: Path, split: str, files: list[str]) -> None:
        """Write the two small files that `datasets.load_from_disk` asks for."""
        # The columns, as the library describes them.
        info = DatasetInfo(features=Features.from_arrow_schema(ROW_SCHEMA))
        write_json(directory / "dataset_info.json", asdict(info))
        # The files, and a fingerprint that is the same for the same content.
        state: dict[str, Any] = {
            "_data_files": [{"filename": name} for name in files],
            "_fingerprint": f"{self.fingerprint}-{split}",
            "_format_columns": None,
            "_format_kwargs": {},
            "_format_type": None,
            "_output_all_columns": False,
            "_split": None,
        }
        write_json(directory / "state.json", state)
