"""Files that are there whole or not at all, and still there after a power cut.

Everything the pipeline writes goes through `write_bytes`: a temporary name beside the final one,
flushed to the disk, renamed. A killed process leaves at most a temporary file, which the next run
removes.
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

_TEMPORARY = ".writing-"


def write_bytes(path: Path, content: bytes | memoryview) -> None:
    """Put `content` at `path`. Raises OSError; on a full disk it says what to do."""
    temporary = path.with_name(f"{_TEMPORARY}{os.getpid()}-{path.name}")
    try:
        with temporary.open("wb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
        flush_directory(path.parent)
    except OSError as error:
        with contextlib.suppress(OSError):
            temporary.unlink()
        if error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG):
            raise OSError(
                f"no space for {path} ({len(content):,} bytes): {os.strerror(error.errno)}; what "
                "is finished is kept: make room and run the same command again to continue"
            ) from None
        raise


def write_json(path: Path, content: Any) -> None:
    """`write_bytes` of indented JSON."""
    write_bytes(path, (json.dumps(content, indent=2, ensure_ascii=False) + "\n").encode())


def write_table(path: Path, table: pa.Table, batch_rows: int | None = None) -> None:
    """`write_bytes` of an Arrow file; with `batch_rows` a stream, as `datasets` reads."""
    sink = pa.BufferOutputStream()
    open_writer = pa.ipc.new_stream if batch_rows else pa.ipc.new_file
    with open_writer(sink, table.schema) as writer:
        writer.write_table(table.combine_chunks(), max_chunksize=batch_rows)
    write_bytes(path, memoryview(sink.getvalue()))


def read_json(path: Path) -> Any:
    return json.loads(path.read_bytes())


def sha256(path: Path) -> str:
    """Return the SHA-256 of a file's content as hex digits."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def map_table(path: Path) -> pa.Table:
    """An Arrow file of `write_table`, mapped: reading a row touches the pages of that row only."""
    return pa.ipc.open_file(pa.memory_map(str(path))).read_all()


def remove_temporaries(directory: Path) -> None:
    """What a killed run was writing."""
    for path in directory.rglob(f"{_TEMPORARY}*"):
        path.unlink(missing_ok=True)


def is_temporary(path: Path) -> bool:
    return path.name.startswith(_TEMPORARY)


def flush_directory(path: Path) -> None:
    """Make renames in a directory survive a power cut."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


@contextlib.contextmanager
def locked(directory: Path) -> Iterator[None]:
    """Hold `directory`, made if missing, against a second run. Raises ValueError when it is held.

    The lock goes with the process, however that ends.
    """
    directory.mkdir(parents=True, exist_ok=True)
    handle = os.open(directory, os.O_RDONLY)
    try:
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise ValueError(
                f"another preprocessing run works in {directory}; wait for it or stop it"
            ) from None
        yield
    finally:
        os.close(handle)


def replace_directory(final: Path, finished: Path) -> None:
    """Put the finished directory at `final`, in place of what was there."""
    flush_directory(finished)
    retired = _retired(final)
    if final.exists():
        shutil.rmtree(retired, ignore_errors=True)
        final.rename(retired)
    finished.rename(final)
    flush_directory(final.parent)
    shutil.rmtree(retired, ignore_errors=True)


def restore_directory(final: Path) -> bool:
    """Undo a replacement that was killed half-way -> whether there was one to undo."""
    retired = _retired(final)
    undo = retired.exists() and not final.exists()
    if undo:
        retired.rename(final)
    shutil.rmtree(retired, ignore_errors=True)
    return undo


def _retired(final: Path) -> Path:
    return final.with_name(f".{final.name}.replaced")
