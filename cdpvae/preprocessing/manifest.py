"""What a processed directory was made from, and whether another run may use or replace it.

`manifest.json` names everything the rows depend on (`content_of`), the counts, and, under `run`,
what differs every time: when, how long, with how many workers.
"""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import Any

from cdpvae import files
from cdpvae.config import DataConfig
from cdpvae.data.dataset import MANIFEST, SCHEMA, read_manifest
from cdpvae.data.tokenizer import LlamaTokenizerWrapper
from cdpvae.preprocessing.filters.language import model_path
from cdpvae.preprocessing.readers.source import Inputs, Source

# Settings that say where and how fast, not what. The files that they name count by their hashes.
_NOT_CONTENT = frozenset(
    {
        "processed_dir",
        "input",
        "phase",
        "decontaminate",
        "validation_input",
        "language_model",
        "workers",
        "shard_records",
        "streaming",
        "executor",
    }
)


def content_of(
    config: DataConfig, inputs: Inputs, wrapper: LlamaTokenizerWrapper
) -> dict[str, Any]:
    """Return all that the rows depend on. Raises ValueError for a missing model or file."""
    # Evaluation files count by their content, as inputs do.
    evaluation = [Source.parse(text) for text in config.decontaminate]
    content = {
        "schema": SCHEMA,
        "settings": config.model_dump(mode="json", exclude=set(_NOT_CONTENT)),
        "inputs": [_identity(source) for source in inputs.train],
        "decontaminate": [source.identity() for source in evaluation],
        "language_model": _language_model(config),
        "tokenizer": {"name": wrapper.name, "fingerprint": wrapper.fingerprint()},
    }
    # Without such files the content is that of versions that did not know them.
    if inputs.validation:
        content["validation_input"] = [_identity(source) for source in inputs.validation]
    return content


def fingerprint(content: dict[str, Any]) -> str:
    """Return the SHA-256 of the content as hex digits.

    The tokenizer's name is left out: another name does not change the rows.
    """
    unnamed = {**content, "tokenizer": content["tokenizer"]["fingerprint"]}
    return hashlib.sha256(json.dumps(unnamed, sort_keys=True).encode()).hexdigest()


def is_processed(path: Path) -> bool:
    """Say whether there is processed data of any version at `path`; an empty directory has none.

    Raises ValueError for a directory of something else, so that it is never replaced.
    """
    if not path.exists() or (path.is_dir() and not any(path.iterdir())):
        return False
    if not (path / MANIFEST).is_file():
        raise ValueError(
            f"processed_dir={path} exists and holds no processed data; choose another directory"
        )
    return True


def reusable_manifest(
    path: Path, content: dict[str, Any], overwrite: bool
) -> dict[str, Any] | None:
    """Return the manifest at `path` when it has this content; None when there is none to reuse.

    path: the processed directory. content: what the rows are to depend on. overwrite: replace
    other processed data. Raises ValueError for data of other content that must not be replaced.
    """
    if not is_processed(path) or overwrite:
        return None
    # Data made from something else is neither reused nor replaced without being asked for.
    existing = read_manifest(path)
    changed = differences(existing, content)
    if changed:
        raise ValueError(
            f"processed_dir={path} was made with another {', '.join(changed)}; choose another "
            "directory, or replace it with --overwrite"
        )
    return existing


def differences(existing: dict[str, Any], content: dict[str, Any]) -> list[str]:
    """Return the names of what differs, each setting by its own. Tokenizers may differ in name."""
    # A setting that one of the versions lacks counts as None.
    old, new = existing["settings"], content["settings"]
    changed = [name for name in sorted({*old, *new}) if old.get(name) != new.get(name)]
    changed += [
        name
        for name in ("inputs", "validation_input", "decontaminate", "language_model")
        if existing.get(name) != content.get(name)
    ]
    # Two names of one tokenizer make no difference.
    if existing["tokenizer"]["fingerprint"] != content["tokenizer"]["fingerprint"]:
        changed.append("tokenizer")
    return changed


def _identity(source: Source) -> dict[str, Any]:
    """Return what identifies an input.

    An unreadable file is identified by its error message, so that the run starts over once it can
    be read.
    """
    try:
        return source.identity()
    except ValueError as error:
        return {"file": source.name, "problem": str(error)}


def _language_model(config: DataConfig) -> str | None:
    """Return the SHA-256 of the language model, or None without language filter."""
    if not config.language_filter:
        return None
    return files.sha256(model_path(config.language_model))
