"""The one place that makes files durable: whole or absent, and still there after a power cut.

A file goes through `write_bytes`: a temporary name beside the final one, flushed to the disk,
renamed. A killed process leaves at most a temporary file. A directory is made under another name
and put in place by a rename: by `publish`, with a manifest that `verify` checks, or without one by
`replace_directory`.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import hashlib
import json
import os
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pyarrow as pa

# Size and SHA-256 of every file of a published directory.
MANIFEST = "manifest.json"
_TEMPORARY = ".writing-"


def write_bytes(path: Path, content: bytes | memoryview) -> None:
    """Put `content` at `path`: readers see the old content or the new, never a part.

    Raises OSError; on a full disk its message says what to do.
    """
    # The process id keeps two workers apart that write the same file.
    temporary = path.with_name(f"{_TEMPORARY}{os.getpid()}-{path.name}")
    try:
        with temporary.open("wb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
        flush(path.parent)
    except OSError as error:
        # What was written so far takes up room that others need.
        with contextlib.suppress(OSError):
            temporary.unlink()
        if error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG):
            raise OSError(
                f"no space for {path} ({len(content):,} bytes): {os.strerror(error.errno)}; what "
                "is finished is kept: make room and run the same command again to continue"
            ) from None
        raise


def write_text(path: Path, text: str) -> None:
    """Put a text at `path` as UTF-8, by `write_bytes`."""
    write_bytes(path, text.encode())


def write_json(path: Path, content: Any) -> None:
    """Put indented JSON at `path`, by `write_bytes`."""
    write_text(path, json.dumps(content, indent=2, ensure_ascii=False) + "\n")


def write_table(path: Path, table: pa.Table, batch_rows: int | None = None) -> None:
    """Put an Arrow file at `path`, by `write_bytes`; with `batch_rows` a stream for `datasets`."""
    # Write to memory first, so that the file can be written in one go.
    sink = pa.BufferOutputStream()
    open_writer = pa.ipc.new_stream if batch_rows else pa.ipc.new_file
    with open_writer(sink, table.schema) as writer:
        writer.write_table(table.combine_chunks(), max_chunksize=batch_rows)
    write_bytes(path, memoryview(sink.getvalue()))


def read_json(path: Path) -> Any:
    """Read a JSON file."""
    return json.loads(path.read_bytes())


def map_table(path: Path) -> pa.Table:
    """Map an Arrow file of `write_table`: reading a row touches the pages of that row only."""
    return pa.ipc.open_file(pa.memory_map(str(path))).read_all()


def sha256(path: Path) -> str:
    """Return the SHA-256 of a file's content as hex digits."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def is_temporary(path: Path) -> bool:
    """Say whether `write_bytes` was interrupted while it wrote this file."""
    return path.name.startswith(_TEMPORARY)


def remove_temporaries(directory: Path) -> None:
    """Remove the files that a killed run was writing."""
    for path in directory.rglob(f"{_TEMPORARY}*"):
        path.unlink(missing_ok=True)


def flush(path: Path) -> None:
    """Flush a file, or the entries of a directory, to the disk, so that it survives a power cut."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


@contextlib.contextmanager
def locked(directory: Path) -> Iterator[None]:
    """Hold `directory`, made if missing, against a second run. Raises ValueError when it is held.

    The lock ends with the process, however that ends.
    """
    directory.mkdir(parents=True, exist_ok=True)
    # The directory itself is locked: a lock file would have to be cleaned up.
    handle = os.open(directory, os.O_RDONLY)
    try:
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise ValueError(
                f"another process works in {directory}; wait for it or stop it"
            ) from None
        yield
    finally:
        os.close(handle)


def publish(finished: Path, final: Path) -> None:
    """Hash and flush every file below `finished`, write MANIFEST, and rename the directory.

    Until the rename nothing stands at `final` that was not there before.
    """
    # Hash what is there, and bring it to the disk with the entries of its directories.
    paths = sorted(p for p in finished.rglob("*") if p.is_file() and p.name != MANIFEST)
    manifest = {
        str(path.relative_to(finished)): {"bytes": path.stat().st_size, "sha256": sha256(path)}
        for path in paths
    }
    for path in [*paths, *{path.parent for path in paths}]:
        flush(path)
    # The manifest comes last: without it a directory is not complete.
    write_json(finished / MANIFEST, manifest)
    replace_directory(final, finished)


def verify(path: Path) -> None:
    """Compare every file of a published checkpoint with its manifest.

    Raises ValueError naming the first file that is missing or differs.
    """
    if not (path / MANIFEST).exists():
        raise ValueError(f"{path}: no {MANIFEST}; it is no complete checkpoint")
    for name, expected in read_json(path / MANIFEST).items():
        file = path / name
        if not file.exists():
            raise ValueError(f"{path}: {name} is missing")
        if file.stat().st_size != expected["bytes"] or sha256(file) != expected["sha256"]:
            raise ValueError(
                f"{path}: {name} is damaged ({file.stat().st_size} bytes, expected "
                f"{expected['bytes']}, or another content); use an earlier checkpoint"
            )


def replace_link(link: Path, target: str) -> None:
    """Make `link` a symbolic link to `target`, relative to its directory, in place of an older one.

    Readers see the old target or the new. Raises OSError where something else stands at `link`
    that a rename cannot replace, or the file system has no links.
    """
    temporary = link.with_name(f"{_TEMPORARY}{os.getpid()}-{link.name}")
    temporary.unlink(missing_ok=True)
    os.symlink(target, temporary)
    os.replace(temporary, link)
    flush(link.parent)


def replace_directory(final: Path, finished: Path) -> None:
    """Rename the directory `finished` to `final`, in place of what was there.

    A kill in between can be undone by `restore_directory`.
    """
    flush(finished)
    retired = _retired(final)
    # What was there is moved aside first: a rename cannot replace a directory that is not empty.
    if final.exists():
        shutil.rmtree(retired, ignore_errors=True)
        final.rename(retired)
    finished.rename(final)
    flush(final.parent)
    shutil.rmtree(retired, ignore_errors=True)


def restore_directory(final: Path) -> bool:
    """Undo a replacement that was killed half-way; return whether there was one to undo."""
    retired = _retired(final)
    undo = retired.exists() and not final.exists()
    if undo:
        retired.rename(final)
    shutil.rmtree(retired, ignore_errors=True)
    return undo


def _retired(final: Path) -> Path:
    """Return where `replace_directory` moves what was at `final`."""
    return final.with_name(f".{final.name}.replaced")
