"""What a sweep consists of: the product of varied settings and seeds, each a whole run.

A run is known by the values that vary and its seed; `settings_hash` says whether a measured row
still belongs to the settings that are asked for now.
"""

from __future__ import annotations

import difflib
import hashlib
import itertools
import json
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pydantic import TypeAdapter, ValidationError

from cdpvae.config import Settings, SettingsError, all_settings, parse_settings
from cdpvae.config.renames import by_key
from cdpvae.config.schema import Setting
from cdpvae.training.checkpoint import FREE_TO_CHANGE

# The sweep sets these itself, for every run.
_OWN = {"training.output_dir", "training.resume", "training.stop_after", "training.seed"}
_LONGEST_NAME = 80


@dataclass(frozen=True)
class Varied:
    """A setting and the values that it takes one after another."""

    setting: Setting
    values: tuple[Any, ...]


@dataclass(frozen=True)
class PlannedRun:
    """One training of a sweep.

    name: of its files. varied: value of each varied setting by key, as JSON text. seed: of
    training. settings: all of them. settings_hash: of what decides its figures.
    """

    name: str
    varied: dict[str, str]
    seed: int
    settings: Settings
    settings_hash: str

    @property
    def key(self) -> tuple[str, ...]:
        """What the run is found by in a table: the varied values, then the seed."""
        return (*self.varied.values(), str(self.seed))


def parse_varied(text: str) -> Varied:
    """Read KEY=V1,V2,... Raises SettingsError naming an unknown key or a wrong value."""
    key, equals, listed = text.partition("=")
    known = {setting.key: setting for setting in all_settings()}
    # The key is one that a settings file could have.
    if not equals or not listed:
        raise SettingsError(f"--vary {text}: must be KEY=V1,V2,..., such as loss.beta_max=0.5,1")
    if key in _OWN:
        raise SettingsError(f"--vary {key}: the sweep sets it itself; vary seeds with --seeds")
    if key not in known:
        near = difflib.get_close_matches(key, known, n=1)
        hint = f", did you mean {near[0]!r}?" if near else "; --print-config shows every key"
        raise SettingsError(f"--vary {key}: unknown setting{hint}")
    # The type decides how a value is read; bounds are checked with all settings together.
    values = tuple(_parse_value(known[key], part) for part in _split(listed))
    twice = [value for number, value in enumerate(values) if value in values[:number]]
    if twice:
        raise SettingsError(f"--vary {key}: {twice[0]!r} is listed twice; give every value once")
    return Varied(known[key], values)


def parse_seeds(text: str) -> tuple[int, ...]:
    """Read "0,1,2". Raises SettingsError for anything but different whole numbers."""
    parts = text.split(",")
    if not all(re.fullmatch(r"\d+", part) for part in parts) or len(set(parts)) < len(parts):
        raise SettingsError(f"--seeds {text}: must be different whole numbers, such as 0,1,2")
    return tuple(int(part) for part in parts)


def make_plan(
    base: Settings, varied: Sequence[Varied], seeds: Sequence[int], output: Path, measured: str
) -> list[PlannedRun]:
    """Return a run for every combination of values and every seed, seeds innermost.

    base: settings that no run varies.
    varied: the settings that do vary.
    seeds: of training.
    output: directory of the sweep; runs train below its `runs/`.
    measured: what decides the figures beside the settings, such as the number of rows.

    Raises SettingsError where a combination is refused, or a setting is varied twice.
    """
    keys = [each.setting.key for each in varied]
    if len(set(keys)) < len(keys):
        raise SettingsError(f"--vary {', '.join(keys)}: a key is given twice; list all its values")
    # Every combination is validated before the first one is trained.
    runs = []
    for values in itertools.product(*(each.values for each in varied)):
        chosen = dict(zip(keys, (json.dumps(value) for value in values), strict=True))
        for seed in seeds:
            content = json.loads(base.dump())
            for each, value in zip(varied, values, strict=True):
                _put(content, each.setting, value)
            name = _name(chosen, seed)
            own = {"seed": seed, "output_dir": str(output / "runs" / name)}
            content["training"] |= {**own, "resume": None, "stop_after": None}
            settings = parse_settings(content, source=f"run {name}")
            digest = settings_hash(settings, measured)
            runs.append(PlannedRun(name, chosen, seed, settings, digest))
    return runs


def settings_hash(settings: Settings, measured: str) -> str:
    """Return 12 hex digits that change with any setting that changes a run's figures.

    Settings at their defaults do not enter, so that one which is added later changes no hash.
    """
    defaults = by_key(json.loads(Settings().dump()))
    free = {f"{group}.{name}" for group, names in FREE_TO_CHANGE.items() for name in names}
    chosen = {
        key: value
        for key, value in by_key(json.loads(settings.dump())).items()
        if key not in free and (key not in defaults or defaults[key] != value)
    }
    text = json.dumps([chosen, measured], sort_keys=True)
    return hashlib.sha256(text.encode()).hexdigest()[:12]


def _put(content: dict[str, Any], setting: Setting, value: Any) -> None:
    """Set a value in nested settings; another family takes its own defaults."""
    # Another family has other settings beside its kind.
    *groups, name = setting.path
    for group in groups:
        content = content[group]
    if setting.is_kind and content.get(name) != value:
        content.clear()
    content[name] = value


def _parse_value(setting: Setting, text: str) -> Any:
    """Read one value by the setting's type: as JSON, else as the text itself."""
    # Back to what a settings file holds: pydantic may have made a tuple or an enum of it.
    adapter: TypeAdapter[Any] = TypeAdapter(setting.annotation)
    try:
        return adapter.dump_python(adapter.validate_json(text), mode="json")
    except ValidationError:
        pass
    try:
        return adapter.dump_python(adapter.validate_python(text), mode="json")
    except ValidationError as error:
        message = error.errors()[0]["msg"]
        raise SettingsError(f"--vary {setting.key}: {text!r}: {message}") from None


def _split(text: str) -> list[str]:
    """Split at commas that stand in no bracket."""
    # A list as a value holds commas of its own.
    parts, depth = [""], 0
    for character in text:
        depth += (character in "[{") - (character in "]}")
        if character == "," and depth == 0:
            parts.append("")
        else:
            parts[-1] += character
    return parts


def _name(chosen: dict[str, str], seed: int) -> str:
    """Name a run after its values, as a file name."""
    shown = [f"{key.rpartition('.')[2]}-{value.strip(chr(34))}" for key, value in chosen.items()]
    plain = "_".join([*shown, f"seed-{seed}"])
    name = re.sub(r"[^\w.+-]+", "-", plain)
    if name == plain and len(name) <= _LONGEST_NAME:
        return name
    # What was replaced or cut could be what keeps two names apart.
    digest = hashlib.sha256(json.dumps([chosen, seed]).encode()).hexdigest()[:8]
    return f"{name[:_LONGEST_NAME]}-{digest}"
