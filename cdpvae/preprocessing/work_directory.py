"""The hidden directory `.NAME.work` in which a run works, and which a killed run leaves.

`work.json` in it says what the work is for. A run continues the work only when content and shard
size are the same; the number of workers, and where they run, may differ.
"""

from __future__ import annotations

import contextlib
import shutil
from pathlib import Path
from typing import Any

from cdpvae import files
from cdpvae.preprocessing.manifest import fingerprint

WORK_FILE = "work.json"
# What version 0.1.0 wrote instead, beside candidates with other columns.
_OLD_WORK_FILE = "plan.json"


def open_work(work: Path, content: dict[str, Any], shard_records: int) -> None:
    """Continue the work on this content and shard size, or clear away other work.

    Raises ValueError when the directory holds something else, or work of version 0.1.0.
    """
    path = work / WORK_FILE
    identity = {"fingerprint": fingerprint(content), "shard_records": shard_records}
    # The same work goes on.
    known = files.read_json(path) if path.exists() else None
    if known is not None and all(known[key] == value for key, value in identity.items()):
        files.remove_temporaries(work)
        return
    # What preprocessing has not made must stay.
    if not path.exists():
        if (work / _OLD_WORK_FILE).exists():
            raise ValueError(
                f"{work} holds unfinished work of version 0.1.0, which this version cannot "
                "continue; delete it and run again"
            )
        if any(not files.is_temporary(item) for item in work.iterdir()):
            raise ValueError(f"{work} is in the way and holds no preprocessing; move it away")
    # Other work is cleared away. A killed clean-up must not pass for the work on any content.
    files.write_json(path, None)
    _clear(work)
    files.write_json(path, {**identity, "content": content})


def remove_work(work: Path) -> None:
    """Remove a work directory, `work.json` last, so that a killed removal is recognised."""
    _clear(work)
    (work / WORK_FILE).unlink(missing_ok=True)
    work.rmdir()


def remove_finished_work(work: Path) -> None:
    """Remove the work directory of a run that was killed after its result was in place."""
    if (work / WORK_FILE).exists() or (work / _OLD_WORK_FILE).exists():
        # Another run that holds the directory removes it itself.
        with contextlib.suppress(ValueError), files.locked(work):
            remove_work(work)


def _clear(work: Path) -> None:
    """Remove everything but `work.json`."""
    for item in work.iterdir():
        if item.is_dir():
            shutil.rmtree(item)
        elif item.name != WORK_FILE:
            item.unlink()
