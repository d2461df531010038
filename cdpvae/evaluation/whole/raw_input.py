"""Prepare a raw file for evaluation as the data of a run were prepared.

Conversion is that of the run: format, turns, target and the bounds in tokens come from the
manifest of the run's processed data, or from its settings where that data is gone. What would
leave rows out for other reasons is off: language and quality filters, deduplication,
decontamination, a largest number of rows, files of a validation split. All rows go into one split,
unless records declare one.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from cdpvae.config import DataConfig
from cdpvae.data import LlamaTokenizerWrapper
from cdpvae.data.dataset import MANIFEST, read_manifest
from cdpvae.evaluation.checkpoint import OpenedRun, RowSelection
from cdpvae.evaluation.options import Split
from cdpvae.preprocessing.pipeline import preprocess
from cdpvae.preprocessing.stages.split import SPLIT_DECLARED

# What decides how a record becomes a row.
CONVERSION = (
    "format",
    "turns",
    "target",
    "min_instruction_tokens",
    "max_instruction_tokens",
    "min_response_tokens",
    "max_response_tokens",
)


@dataclass(frozen=True)
class RawRows:
    """Rows of a raw file. note: what was read, and what was left out."""

    rows: RowSelection
    note: str


def prepare_input(opened: OpenedRun, path: str, rows: RowSelection, directory: Path) -> RawRows:
    """Convert and tokenise a raw file -> its rows.

    opened: the run whose tokenizer and settings are used.
    path: the file.
    rows: how many are wanted; `split` counts where the records declare theirs.
    directory: existing, gets the processed data.

    Raises ValueError for a file of which nothing can be used.
    """
    # Tokenise with the bounds of the conversion, which may be others than the checkpoint's.
    config, origin = _conversion(opened, path, directory / "processed")
    wrapper = LlamaTokenizerWrapper.from_pretrained(
        str(opened.checkpoint / "tokenizer"),
        config.max_instruction_tokens,
        config.max_response_tokens,
    )
    manifest = preprocess(config, wrapper, progress=False).manifest
    # A declared split keeps its meaning; otherwise everything lies in one.
    declared = manifest["split"] == SPLIT_DECLARED
    split: Split = rows.split if declared else "train"
    counts = manifest["counts"]
    # Say what was read, so that rows left out by the bounds are not missed silently.
    dropped = [
        f"{number} {reason}"
        for category in ("not_converted", "filtered")
        for reason, number in counts[category].items()
    ]
    note = (
        f"input {path}: {counts[split]} rows of {counts['read']} records, converted by {origin}, "
        "without filters of language and quality and without deduplication"
        + (f"; the {split} split that its records declare" if declared else "")
        + (f"; left out: {', '.join(dropped)}" if dropped else "")
    )
    selected = RowSelection(split, str(config.processed), rows.limit, rows.rows_per_batch)
    return RawRows(selected, note)


def _conversion(opened: OpenedRun, path: str, target: Path) -> tuple[DataConfig, str]:
    """Return the settings of the conversion, and where they come from."""
    # A run that only names its processed data does not know how it was made; the manifest does.
    data = opened.settings.data
    known = data.model_dump(mode="json")
    origin = "the settings of the run"
    if (data.processed / MANIFEST).exists() and not data.streaming:
        known = {**known, **read_manifest(data.processed)["settings"]}
        origin = "the settings of the run's data"
    # Filters and deduplication would choose rows; an evaluation takes those that it is given.
    config = DataConfig(
        **{name: known[name] for name in CONVERSION},
        input=(path,),
        processed_dir=str(target),
        language_filter=False,
        quality_filter=False,
        deduplication="none",
        validation_fraction=0.0,
        workers=1,
    )
    return config, origin
