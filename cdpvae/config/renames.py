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

from cdpvae.config.errors import SettingsError


@dataclass(frozen=True)
class Rename:
    """An entry of the table.

    old: the former key, with its group ("loss.loss_scale").
    new: the present key ("loss.objective").
    values: for a switch that became a choice, what true and false stand for.
    family: the `kind` that the setting belongs to now.
    """

    old: str
    new: str
    values: Mapping[bool, str] | None = None
    family: str | None = None

    def new_value(self, value: Any) -> Any:
        """Return what `value` of the old key is under the new one. Raises SettingsError."""
        if self.values is None:
            return value
        if not isinstance(value, bool):
            raise SettingsError(f"{self.old}={value!r}: Input should be true or false")
        return self.values[value]


RENAMES = (
    # The switch comes first: it names the family that the settings after it belong to.
    Rename("model.no_latent", "model.latent.kind", values={True: "none", False: "gaussian"}),
    Rename("model.latent_dim", "model.latent.latent_dim", family="gaussian"),
    Rename("model.logvar_init_bias", "model.latent.logvar_init_bias", family="gaussian"),
    Rename("model.logvar_clamp", "model.latent.logvar_clamp", family="gaussian"),
    # "Loss scale" is a term of fp16, "engine" a term of DeepSpeed.
    Rename("loss.loss_scale", "loss.objective"),
    Rename("data.engine", "data.executor"),
)


def rename_keys(content: dict[str, Any]) -> tuple[dict[str, Any], list[str]]:
    """Copy nested settings under their present names -> the copy, and a note on each old key.

    Raises SettingsError where a setting is given under both of its names.
    """
    renamed: dict[str, Any] = _copy(content)
    notes: list[str] = []
    for rename in RENAMES:
        group, _, key = rename.old.rpartition(".")
        holder = _find(renamed, group)
        if not isinstance(holder, dict) or key not in holder:
            continue
        value = rename.new_value(holder.pop(key))
        # Old files of a model without latent hold the Gaussian's settings too, without effect.
        if rename.family is not None and _find(content, "model.no_latent") is True:
            continue
        _put(renamed, rename, value)
        notes.append(f"{rename.old} is now {rename.new}" + (f"={value}" if rename.values else ""))
    return renamed, notes


def rename_flags(argv: Sequence[str]) -> tuple[list[str], list[str]]:
    """Replace old flags -> the arguments, and a note "--old is now --new" on each."""
    # A switch has two flags, each of which stands for a choice.
    new_forms: dict[str, tuple[str, ...]] = {}
    for rename in RENAMES:
        old, new = flag_of(rename.old), flag_of(rename.new)
        if rename.values is not None:
            new_forms[old] = (new, rename.values[True])
            new_forms["--no-" + old.removeprefix("--")] = (new, rename.values[False])
        elif old != new:
            new_forms[old] = (new,)

    # The value of a flag follows it, or is joined to it by "=".
    arguments: list[str] = []
    notes: list[str] = []
    for argument in argv:
        name, equals, value = argument.partition("=")
        words = new_forms.get(name.replace("_", "-"))
        if words is None:
            arguments.append(argument)
        else:
            arguments += [*words[:-1], words[-1] + equals + value]
            notes.append(f"{name} is now {' '.join(words)}")
    return arguments, notes


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
    """Print one line on stderr: once for the same text, and on the first rank only."""
    # All ranks read the same files and flags.
    if os.environ.get("RANK", "0") == "0":
        print(f"notice: {text}", file=sys.stderr)


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
    # A settings file tells families apart by their kind, which old files do not name.
    if rename.family is not None:
        holder.setdefault("kind", rename.family)
    holder[key] = value
