"""Every setting that has changed its name, in one table: old key -> new key.

Files that earlier versions wrote stay readable, and so do a user's own files, flags and keyword
arguments. `parse_settings` and the command line print one line that names the new form; the Python
constructors (`ModelConfig(latent_dim=32)`) accept the old form in silence.
"""

from __future__ import annotations

import functools
import os
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any


class SettingsError(ValueError):
    """A setting is unknown, of the wrong type, or impossible in this combination."""


@dataclass(frozen=True)
class Rename:
    """One entry of the table.

    old, new: keys with their groups ("loss.objective").
    values: for a switch that became a choice, what true and false stand for.
    """

    old: str
    new: str
    values: Mapping[bool, str] | None = None

    def new_value(self, value: Any) -> Any:
        """Return what `value` of the old key is under the new one. Raises SettingsError."""
        if self.values is None:
            return value
        if not isinstance(value, bool):
            raise SettingsError(f"{self.old}={value!r}: Input should be true or false")
        return self.values[value]


RENAMES = (
    Rename("model.latent_dim", "model.latent.latent_dim"),
    Rename("model.logvar_init_bias", "model.latent.logvar_init_bias"),
    Rename("model.logvar_clamp", "model.latent.logvar_clamp"),
    Rename("model.no_latent", "model.latent.kind", {True: "none", False: "gaussian"}),
    Rename("loss.loss_scale", "loss.objective"),
    Rename("data.engine", "data.executor"),
)


def rename_keys(content: dict[str, Any]) -> tuple[dict[str, Any], list[Rename]]:
    """Copy nested settings under their present names -> the copy, and the renames that applied.

    Raises SettingsError where a setting is given under both of its names.
    """
    renamed, applied = _copy(content), []
    for rename in RENAMES:
        group, _, key = rename.old.rpartition(".")
        holder = _find(renamed, group)
        if isinstance(holder, dict) and key in holder:
            _put(renamed, rename, rename.new_value(holder.pop(key)))
            applied.append(rename)
    _choose_family(renamed, applied)
    return renamed, applied


def rename_flags(argv: Sequence[str]) -> tuple[list[str], list[str]]:
    """Replace old flags -> the arguments, and a note "--old is now --new" for each."""
    flags: dict[str, tuple[str, ...]] = {}
    for rename in RENAMES:
        old, new = flag_of(rename.old), flag_of(rename.new)
        if rename.values is not None:
            flags[old] = (new, rename.values[True])
            flags["--no-" + old.removeprefix("--")] = (new, rename.values[False])
        elif old != new:
            flags[old] = (new,)
    arguments: list[str] = []
    notes: list[str] = []
    for argument in argv:
        name, equals, value = argument.partition("=")
        new_form = flags.get(name.replace("_", "-"))
        if new_form is None:
            arguments.append(argument)
            continue
        notes.append(f"{name} is now {' '.join(new_form)}")
        arguments += [*new_form[:-1], new_form[-1] + equals + value]
    return arguments, notes


def notes_on(applied: Sequence[Rename]) -> list[str]:
    """Describe renamed keys: "old is now new"."""
    return [f"{rename.old} is now {rename.new}" for rename in applied]


def by_key(content: Mapping[str, Any], group: str = "") -> dict[str, Any]:
    """Flatten nested settings: {"loss": {"free_bits": 1}} -> {"loss.free_bits": 1}."""
    flat: dict[str, Any] = {}
    for name, value in content.items():
        if isinstance(value, dict):
            flat |= by_key(value, f"{group}{name}.")
        else:
            flat[f"{group}{name}"] = value
    return flat


def flag_of(key: str) -> str:
    """Return the flag of a key: its last name; for a family's `kind`, the name of the choice."""
    names = key.split(".")
    name = names[-2] if names[-1] == "kind" else names[-1]
    return "--" + name.replace("_", "-")


@functools.cache
def print_notice(text: str) -> None:
    """Print one line on stderr: once for the same text, and by the first rank only."""
    if os.environ.get("RANK", "0") == "0":
        print(f"notice: {text}", file=sys.stderr)


def _choose_family(content: dict[str, Any], applied: Sequence[Rename]) -> None:
    """Name the family where only settings of the Gaussian were given, as old files do.

    Old files of a model without latent have the Gaussian's settings too; they had no effect.
    """
    moved = [rename for rename in applied if rename.new.startswith("model.latent.")]
    if not moved:
        return
    latent = content["model"]["latent"]
    latent.setdefault("kind", "gaussian")
    switched_off = latent["kind"] == "none" and any(rename.values for rename in moved)
    for rename in moved if switched_off else ():
        if rename.values is None:
            del latent[rename.new.rpartition(".")[2]]


def _copy(content: Any) -> Any:
    """Copy the dicts of a nested dict; every other value is shared."""
    if not isinstance(content, dict):
        return content
    return {key: _copy(value) for key, value in content.items()}


def _find(content: Any, path: str) -> Any:
    """Return the value at a dotted path, or None."""
    for name in path.split("."):
        content = content.get(name) if isinstance(content, dict) else None
    return content


def _put(content: dict[str, Any], rename: Rename, value: Any) -> None:
    """Set the new key. Raises SettingsError when it is there already."""
    *groups, key = rename.new.split(".")
    holder: Any = content
    for name in groups:
        holder = holder.setdefault(name, {}) if isinstance(holder, dict) else None
    if not isinstance(holder, dict) or key in holder:
        raise SettingsError(
            f"{rename.old} is the old name of {rename.new}, and both are given; drop {rename.old}"
        )
    holder[key] = value
