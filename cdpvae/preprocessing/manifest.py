"""What a processed directory was made of, and whether another run may use or replace it.

`manifest.json` names everything the rows depend on (`content_of`), what became of every record,
and, under `run`, what is different every time: when, how long, with how many workers.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import shutil
from pathlib import Path
from typing import Any

from cdpvae import files
from cdpvae.config import DataConfig
from cdpvae.data.dataset import MANIFEST, SCHEMA, read_manifest
from cdpvae.data.tokenizer import LlamaTokenizerWrapper
from cdpvae.preprocessing.readers.source import Source

# Settings that say where and how fast, not what; the files they name are in the identity by hash.
_NOT_CONTENT = frozenset(
    {
        "processed_dir",
        "input",
        "phase",
        "decontaminate",
        "language_model",
        "workers",
        "shard_records",
        "streaming",
        "executor",
    }
)
PLAN = "plan.json"


def content_of(
    config: DataConfig, sources: list[Source], wrapper: LlamaTokenizerWrapper
) -> dict[str, Any]:
    """All that the rows depend on. Raises ValueError when a named model or file is missing."""
    evaluation = [Source.parse(text) for text in config.decontaminate]
    return {
        "schema": SCHEMA,
        "settings": config.model_dump(mode="json", exclude=set(_NOT_CONTENT)),
        "inputs": [_identity(source) for source in sources],
        "decontaminate": [source.identity() for source in evaluation],
        "language_model": _language_model(config),
        "tokenizer": {"name": wrapper.name, "fingerprint": wrapper.fingerprint()},
    }


def fingerprint(content: dict[str, Any]) -> str:
    """Hex digits that are the same for the same content. What the tokenizer is called is none."""
    unnamed = {**content, "tokenizer": content["tokenizer"]["fingerprint"]}
    return hashlib.sha256(json.dumps(unnamed, sort_keys=True).encode()).hexdigest()


def is_processed(path: Path) -> bool:
    """Whether there is processed data at `path`, of any version; False where there is nothing.

    Raises ValueError for a directory of something else, so that it is never replaced.
    """
    if not path.exists() or (path.is_dir() and not any(path.iterdir())):
        return False
    if not (path / MANIFEST).is_file():
        raise ValueError(
            f"processed_dir={path} exists and holds no processed data; choose another directory"
        )
    return True


def differences(existing: dict[str, Any], content: dict[str, Any]) -> list[str]:
    """Names of what differs, settings one by one. The tokenizer's name may differ."""
    old, new = existing["settings"], content["settings"]
    changed = [name for name in sorted({*old, *new}) if old.get(name) != new.get(name)]
    changed += [
        name
        for name in ("inputs", "decontaminate", "language_model")
        if existing[name] != content[name]
    ]
    if existing["tokenizer"]["fingerprint"] != content["tokenizer"]["fingerprint"]:
        changed.append("tokenizer")
    return changed


def _identity(source: Source) -> dict[str, Any]:
    """The input's identity; an unreadable file is one too, until it can be read."""
    try:
        return source.identity()
    except ValueError as error:
        return {"file": source.name, "problem": str(error)}


def _language_model(config: DataConfig) -> str | None:
    """SHA-256 of the language model, None without language filter."""
    if not config.language_filter:
        return None
    from cdpvae.preprocessing.filters.language import model_path

    with open(model_path(config.language_model), "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def reusable_manifest(
    path: Path, content: dict[str, Any], overwrite: bool
) -> dict[str, Any] | None:
    """The manifest at `path` when it is of this content. Raises ValueError when it must stay."""
    if not is_processed(path) or overwrite:
        return None
    existing = read_manifest(path)
    changed = differences(existing, content)
    if changed:
        raise ValueError(
            f"processed_dir={path} was made with another {', '.join(changed)}; choose another "
            "directory, or replace it with --overwrite"
        )
    return existing


def adopt(work: Path, content: dict[str, Any], shard_records: int) -> None:
    """Continue the work on this content, or clear away that on another.

    Raises ValueError when the directory is not ours. The number of workers and the engine may
    change on the way.
    """
    path = work / PLAN
    plan = {
        "fingerprint": fingerprint(content),
        "shard_records": shard_records,
        "content": content,
    }
    known = files.read_json(path) if path.exists() else None
    if known is not None and all(known[key] == plan[key] for key in list(plan)[:2]):
        files.remove_temporaries(work)
        return
    if not path.exists() and any(not files.is_temporary(item) for item in work.iterdir()):
        raise ValueError(f"{work} is in the way and holds no preprocessing; move it away")
    # What a killed clean-up leaves must not pass for the work on any content.
    files.write_json(path, None)
    _clear(work)
    files.write_json(path, plan)


def discard(work: Path) -> None:
    """Remove a work directory, so that a killed removal is still known as one of ours."""
    _clear(work)
    (work / PLAN).unlink(missing_ok=True)
    work.rmdir()


def sweep(work: Path) -> None:
    """Remove what a run left that was killed after its result was in place."""
    if (work / PLAN).exists():
        with contextlib.suppress(ValueError), files.locked(work):
            discard(work)


def _clear(work: Path) -> None:
    """Remove all but the plan."""
    for item in work.iterdir():
        if item.is_dir():
            shutil.rmtree(item)
        elif item.name != PLAN:
            item.unlink()
