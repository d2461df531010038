"""Where records come from: local files and the hub.

Files, each by its ending: `.json` (an array; one object a line is read as well, a common misnomer),
`.jsonl`, `.ndjson`, `.txt` (one text a line), `.csv`, `.tsv`, all also with `.gz`, and `.parquet`.
The other modules of this folder stream them: memory does not grow with the input. A record that
cannot be read becomes a problem in its place and stops nothing; an input of which nothing can be
read is a ValueError. `docs/formats.md` has every rule.
"""

from __future__ import annotations

import itertools
import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from cdpvae import files
from cdpvae.config import DataConfig
from cdpvae.preprocessing.formats.convert import detect
from cdpvae.preprocessing.readers.hub import read_hub
from cdpvae.preprocessing.readers.json_array import read_array
from cdpvae.preprocessing.readers.json_text import parse_json
from cdpvae.preprocessing.readers.lines import DAMAGE, filled_lines, first_line, parse_text
from cdpvae.preprocessing.readers.parquet import read_parquet
from cdpvae.preprocessing.readers.problems import Unreadable
from cdpvae.preprocessing.readers.tables import read_csv, read_tsv
from cdpvae.preprocessing.records import RawRecord

# The hub data sets of the original description's three phases.
PHASES: dict[int, tuple[str, ...]] = {
    1: ("mlabonne/FineTome-100k",),
    2: ("teknium/OpenHermes-2.5", "WizardLMTeam/WizardLM_evol_instruct_V2_196k"),
    3: ("HuggingFaceH4/no_robots", "ise-uiuc/Magicoder-OSS-Instruct-75K"),
}
EXTENSIONS = (".json", ".jsonl", ".ndjson", ".txt", ".csv", ".tsv", ".parquet")
_HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*/[\w.-]+")


@dataclass(frozen=True)
class Source:
    """One input. name: file name or hub id. path: the file, None for the hub."""

    name: str
    path: Path | None

    @classmethod
    def parse(cls, text: str) -> Source:
        """Parse the path of a file that exists, or a hub id `owner/name`.

        Raises ValueError for anything else.
        """
        # A file that exists counts before a hub id of the same spelling.
        path = Path(text)
        try:
            exists, is_directory = path.exists(), path.is_dir()
        except OSError as error:
            raise ValueError(f"input {text!r}: cannot be read: {error.strerror}") from None
        if is_directory:
            raise ValueError(f"input {text!r} is a directory; name the files in it")
        if exists:
            _kind(path)
            return cls(path.name, path)
        # A path with a known ending is a file that is missing, not a data set of the hub.
        suffixes = {suffix.lower() for suffix in path.suffixes}
        if _HUB_ID.fullmatch(text) and not suffixes & {*EXTENSIONS, ".gz"}:
            return cls(text, None)
        raise ValueError(f"input {text!r}: no such file, and no hub id of the form owner/name")

    def identity(self) -> dict[str, Any]:
        """Return what tells this input from others: name, and for a file its size and SHA-256."""
        if self.path is None:
            return {"hub": self.name}
        try:
            digest = files.sha256(self.path)
            return {"file": self.name, "bytes": self.path.stat().st_size, "sha256": digest}
        except OSError as error:
            raise ValueError(f"input {self.path}: cannot be read: {error.strerror}") from None

    def records(self, start: int = 0) -> Iterator[RawRecord]:
        """Read every record from number `start` on, counted from 0, in the same order each time.

        Records before `start` are found but not parsed; those of Parquet and the hub are not read.
        Raises ValueError when nothing of the input can be read, or when the hub stops answering.
        """
        # The hub has errors of its own; those of a file are completed with its name.
        if self.path is None:
            yield from read_hub(self.name, start)
            return
        try:
            yield from _read_file(self.path, start)
        except Unreadable as error:
            raise ValueError(f"input {self.path}: {error}") from None
        except DAMAGE as error:
            raise ValueError(f"input {self.path}: cannot be read: {error}") from None


@dataclass(frozen=True)
class Inputs:
    """The inputs of both splits. validation: empty where a share of the other rows is the split."""

    train: tuple[Source, ...]
    validation: tuple[Source, ...] = ()

    @classmethod
    def of(cls, config: DataConfig) -> Inputs:
        """Parse the inputs that the settings name. Raises ValueError as `Source.parse` does."""
        train = config.input or PHASES[config.phase]
        return cls(
            tuple(map(Source.parse, train)), tuple(map(Source.parse, config.validation_input))
        )

    @property
    def in_order(self) -> list[Source]:
        """The inputs in reading order: of equal texts, that of the validation split comes first."""
        return [*self.validation, *self.train]


def _kind(path: Path) -> str:
    """Return the extension that says how to read the file, without `.gz`."""
    name = path.name.lower()
    stem = name.removesuffix(".gz")
    kind = next((ending for ending in EXTENSIONS if stem.endswith(ending)), None)
    # Parquet compresses its columns itself.
    if kind == ".parquet" and stem != name:
        kind = None
    if kind is None:
        raise ValueError(
            f"input {path}: unknown kind of file; readable are {', '.join(EXTENSIONS)}, "
            "each but the last also with .gz"
        )
    return kind


def _read_file(path: Path, start: int) -> Iterator[RawRecord]:
    """Read a local file from record `start` on with the reader for its extension."""
    # Binary and tabular files have readers of their own.
    kind = _kind(path)
    if kind == ".parquet":
        return read_parquet(path, start)
    if kind == ".csv":
        return itertools.islice(read_csv(path), start, None)
    if kind == ".tsv":
        return itertools.islice(read_tsv(path, _names_a_format), start, None)
    # Lines and arrays are cut first and parsed after the records before `start` are skipped.
    if kind == ".txt":
        return map(parse_text, itertools.islice(filled_lines(path), start, None))
    found = read_array(path) if kind == ".json" and _is_array(path) else filled_lines(path)
    return map(parse_json, itertools.islice(found, start, None))


def _names_a_format(names: list[str]) -> bool:
    """Say whether these are names of columns: a record with such keys has a known format."""
    return detect(dict.fromkeys(names, "filled")) is not None


def _is_array(path: Path) -> bool:
    """Say by its first byte whether a JSON file is an array.

    Raises Unreadable for JSON that is no sequence of records.
    """
    # One object a line is often called .json as well.
    line = first_line(path)
    if line[:1] in (b"[", b""):
        return line[:1] == b"["
    if line[:1] != b"{":
        raise Unreadable("must hold a JSON array of records, or one object a line")
    if line[-1:] in (b"{", b"["):
        raise Unreadable(
            "holds one object over several lines; must hold a JSON array of records, or one object "
            "a line (`jq -c .` writes it so)"
        )
    return False
