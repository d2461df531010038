"""Which kept candidates go to which split: by their file, as they declare, or by a hash."""

from __future__ import annotations

from typing import Any

import numpy as np

from cdpvae.config import DataConfig
from cdpvae.data.dataset import SPLITS
from cdpvae.preprocessing.counts import Counts
from cdpvae.preprocessing.stages.candidates import Candidates
from cdpvae.preprocessing.stages.deduplicate import Decisions
from cdpvae.preprocessing.stages.prepare import NothingUsable

# How the split was made, as the manifest and the report say it.
SPLIT_BY_HASH = "by hash of the first instruction of each group"
SPLIT_BY_FILE = "all rows of validation_input"
SPLIT_DECLARED = "declared by the records"

Rows = dict[str, np.ndarray]


def split_rows(
    config: DataConfig, candidates: Candidates, decisions: Decisions, problems: dict[str, str]
) -> tuple[Rows, str]:
    """Return split -> candidates to write (ascending), and by which rule they were split.

    config: the settings of the data.
    candidates: the candidates that take part.
    decisions: what the second stage decided about them.
    problems: the inputs that could not be read, with the reason.

    Raises NothingUsable when no record is kept, when only some of them declare a split, and when
    they declare another than that of their file.
    """
    if config.validation_input:
        return _by_file(config, candidates, decisions, problems), SPLIT_BY_FILE
    kept = decisions.kept[: config.max_samples]
    if not len(kept):
        raise NothingUsable(_nothing_kept(candidates.summaries, problems))
    # Records that declare a split keep it.
    declared = candidates.strings("split")[kept]
    count = int(np.count_nonzero(declared != None))  # noqa: E711 (element by element)
    if count not in (0, len(kept)):
        raise NothingUsable(
            f"{count} of {len(kept)} kept records declare a split (the key split with train "
            "or validation); either all or none must"
        )
    if count:
        return {name: kept[declared == name] for name in SPLITS}, SPLIT_DECLARED
    # All members of a group go where its first member goes, by a hash that is uniform over
    # texts.
    share = candidates.column("instruction_hash")[decisions.group[kept]] / 2.0**64
    validation = share < config.validation_fraction
    return {"train": kept[~validation], "validation": kept[validation]}, SPLIT_BY_HASH


def _by_file(
    config: DataConfig, candidates: Candidates, decisions: Decisions, problems: dict[str, str]
) -> Rows:
    """Split by input: those of `validation_input` come first. Raises as `split_rows` does."""
    files = len(config.validation_input)
    held_out = candidates.count_before(files)
    # max_samples counts what is trained on.
    kept = decisions.kept
    rows = {
        "train": kept[kept >= held_out][: config.max_samples],
        "validation": kept[kept < held_out],
    }
    declared = candidates.strings("split")
    for split, setting, other in (
        ("validation", "validation_input", "train"),
        ("train", "input", "validation"),
    ):
        # Neither split may be empty, as each was asked for.
        if not len(rows[split]):
            shards = [
                s for s in candidates.summaries if (s["source"] < files) == (split != "train")
            ]
            raise NothingUsable(_nothing_kept(shards, problems, f" of {setting}"))
        # Records that declare a split, and stand in the files of the other one, are a mistake.
        wrong = int(np.count_nonzero(declared[rows[split]] == other))
        if wrong:
            raise NothingUsable(
                f"{wrong} of {len(rows[split])} kept records of {setting} declare split={other}; "
                "drop that key, or drop validation_input and let the records decide"
            )
    return rows


def _nothing_kept(
    summaries: list[dict[str, Any]], problems: dict[str, str], where: str = ""
) -> str:
    """Return why nothing of some shards is kept.

    summaries: of these shards. problems: inputs not read, with the reason. where: what they are.
    """
    # Nothing could be read; or the filters, and in training files the validation rows, took all.
    total = Counts()
    for summary in summaries:
        total.add(Counts(**summary["counts"]))
    if not total.read:
        return "; ".join(problems.values())
    reasons = [f"{reason} ({n})" for reason, n in total.filtered.items()]
    repeated = total.pairs - sum(total.filtered.values())
    if repeated:
        reasons.append(f"repeats a validation row ({repeated})")
    return (
        f"none of {total.converted} converted records{where} is kept: {', '.join(reasons)}; "
        f"change the {'files' if repeated else 'bounds'}"
    )
