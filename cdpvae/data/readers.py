"""Where records come from: local files and the hub.

Files: `.json` (an array; one object a line is read as well, a common misnomer), `.jsonl`,
`.ndjson`, `.txt` (one text a line), each also with `.gz`. A line that is not JSON is handed on as
a problem with its line number, never fatal; a file that cannot be read at all is a ValueError.
"""

from __future__ import annotations

import gzip
import hashlib
import json
import re
import zlib
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

PHASES: dict[int, tuple[str, ...]] = {
    1: ("mlabonne/FineTome-100k",),
    2: ("teknium/OpenHermes-2.5", "WizardLMTeam/WizardLM_evol_instruct_V2_196k"),
    3: ("HuggingFaceH4/no_robots", "ise-uiuc/Magicoder-OSS-Instruct-75K"),
}
EXTENSIONS = (".json", ".jsonl", ".ndjson", ".txt")
_HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*/[\w.-]+")


@dataclass(frozen=True)
class RawRecord:
    """One record as read. position: line (JSONL, text) or running number (array, hub), from 1.

    value: the parsed record. problem: why there is none (a constant reason), with `detail`.
    """

    position: int
    value: Any = None
    problem: str | None = None
    detail: str = ""


@dataclass(frozen=True)
class Source:
    """One input. name: file name or hub id. path: None for the hub."""

    name: str
    path: Path | None

    @classmethod
    def parse(cls, text: str) -> Source:
        """A file that exists, or a hub id `owner/name`. Raises ValueError for anything else."""
        path = Path(text)
        if path.is_dir():
            raise ValueError(f"input {text!r} is a directory; name the files in it")
        if path.exists():
            _kind(path)
            return cls(path.name, path)
        suffixes = {suffix.lower() for suffix in path.suffixes}
        if _HUB_ID.fullmatch(text) and not suffixes & {*EXTENSIONS, ".gz"}:
            return cls(text, None)
        raise ValueError(f"input {text!r}: no such file, and no hub id of the form owner/name")

    def identity(self) -> dict[str, Any]:
        """What tells this input from another: name, and for a file its size and SHA-256."""
        if self.path is None:
            return {"hub": self.name}
        try:
            with self.path.open("rb") as file:
                digest = hashlib.file_digest(file, "sha256").hexdigest()
            return {"file": self.name, "bytes": self.path.stat().st_size, "sha256": digest}
        except OSError as error:
            raise ValueError(f"input {self.path}: cannot be read: {error.strerror}") from None

    def records(self) -> Iterator[RawRecord]:
        """Every record, in order. Raises ValueError when the input cannot be read."""
        if self.path is None:
            yield from _read_hub(self.name)
            return
        kind = _kind(self.path)
        try:
            if kind == ".txt":
                yield from _read_lines(self.path, _text_line)
            elif kind == ".json" and _first_byte(self.path) != b"{":
                yield from _read_array(self.path)
            else:
                yield from _read_lines(self.path, _json_line)
        except (OSError, EOFError, zlib.error) as error:
            raise ValueError(f"input {self.path}: cannot be read: {error}") from None


def _kind(path: Path) -> str:
    """The extension that says how to read the file, without `.gz`."""
    name = path.name.lower().removesuffix(".gz")
    kind = next((extension for extension in EXTENSIONS if name.endswith(extension)), None)
    if kind is None:
        raise ValueError(
            f"input {path}: unknown kind of file; readable are {', '.join(EXTENSIONS)}, "
            "each also with .gz"
        )
    return kind


def _open(path: Path):
    return gzip.open(path, "rb") if path.name.lower().endswith(".gz") else path.open("rb")


def _first_byte(path: Path) -> bytes:
    with _open(path) as file:
        return file.read(4096).removeprefix(b"\xef\xbb\xbf").lstrip()[:1]


def _read_array(path: Path) -> Iterator[RawRecord]:
    with _open(path) as file:
        content = file.read()
    try:
        records = json.loads(content.decode("utf-8-sig"))
    except (ValueError, RecursionError) as error:
        raise ValueError(f"input {path}: not valid JSON: {error}") from None
    if not isinstance(records, list):
        raise ValueError(
            f"input {path}: must hold a JSON array of records or one object a line, "
            f"found {type(records).__name__}"
        )
    for position, record in enumerate(records, start=1):
        yield RawRecord(position, record)


def _read_lines(path: Path, parse) -> Iterator[RawRecord]:
    """Lines end at a newline byte, nothing else; blank lines are passed over."""
    with _open(path) as file:
        for position, line in enumerate(file, start=1):
            if position == 1:
                line = line.removeprefix(b"\xef\xbb\xbf")
            if not line.strip():
                continue
            try:
                text = line.decode("utf-8")
            except UnicodeDecodeError as error:
                yield RawRecord(position, problem="line is not UTF-8", detail=str(error))
                continue
            yield parse(position, text)


def _text_line(position: int, text: str) -> RawRecord:
    return RawRecord(position, {"text": text.rstrip("\r\n")})


def _json_line(position: int, text: str) -> RawRecord:
    try:
        return RawRecord(position, json.loads(text))
    except (ValueError, RecursionError) as error:
        return RawRecord(position, problem="line is not valid JSON", detail=f"{error}: {text}")


def _read_hub(name: str) -> Iterator[RawRecord]:
    from datasets import load_dataset

    try:
        rows = load_dataset(name, split="train")
    except (OSError, ValueError, RuntimeError) as error:
        raise ValueError(
            f"hub data set {name}: cannot be loaded: {error}; local files can be given with --input"
        ) from None
    for position, row in enumerate(rows, start=1):
        yield RawRecord(position, row)
