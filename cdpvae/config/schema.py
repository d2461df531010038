"""Every setting as data: its key, its flag, its type and its help, read off the classes.

The command line, the error messages and the tests use this list, so that a new setting is one
field of one class and no further entry anywhere.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal, get_args

from pydantic.fields import FieldInfo

from cdpvae.config.base import Group
from cdpvae.config.renames import flag_of


@dataclass(frozen=True)
class Setting:
    """A setting: where it stands, and what is known of it.

    path: names from the outermost group to the setting, as in a settings file.
    annotation: its type.
    help: its description.
    default: its value where neither a file nor a flag gives one.
    family: the `kind` that it belongs to, None for a setting that always exists.
    """

    path: tuple[str, ...]
    annotation: Any
    help: str | None
    default: Any
    family: str | None = None

    @property
    def key(self) -> str:
        """Name of the setting in a settings file: "model.latent.latent_dim"."""
        return ".".join(self.path)

    @property
    def flag(self) -> str:
        """Name of the setting on the command line: "--latent-dim"."""
        return flag_of(self.key)

    @property
    def is_kind(self) -> bool:
        """Whether it chooses a family, and with it which other settings exist."""
        return self.path[-1] == "kind"


def settings_of(
    group: type[Group], path: tuple[str, ...] = (), family: str | None = None
) -> list[Setting]:
    """List the settings of a group and of the groups in it, of all families."""
    found = []
    for name, field in group.model_fields.items():
        here = (*path, name)
        members = members_of(field)
        default = field.get_default(call_default_factory=True)
        if members:
            # The choice of a family is a setting too, whose values are the kinds.
            literal: Any = Literal
            kinds = literal[tuple(members)]
            found.append(Setting((*here, "kind"), kinds, field.description, default.kind, family))
            for kind, member in members.items():
                found += settings_of(member, here, kind)
        elif isinstance(field.annotation, type) and issubclass(field.annotation, Group):
            found += settings_of(field.annotation, here, family)
        # A member's own `kind` is what the choice sets, and no further setting.
        elif name != "kind":
            found.append(Setting(here, field.annotation, field.description, default, family))
    return found


def members_of(field: FieldInfo) -> dict[str, type[Group]]:
    """Return the classes of a tagged union by their kind; empty for any other field."""
    if field.discriminator is None:
        return {}
    return {member.model_fields["kind"].default: member for member in get_args(field.annotation)}


def path_of(group: type[Group], location: Sequence[str | int]) -> tuple[str, ...]:
    """Return the names that a settings file has for a location in a pydantic error.

    Pydantic's location also names the member of a tagged union, the alternative of a type and the
    index in a list; they are left out.
    """
    path: list[str] = []
    rest = [str(part) for part in location]
    current: type[Group] | None = group
    while rest and current is not None:
        name = rest.pop(0)
        path.append(name)
        field = current.model_fields.get(name)
        # An unknown key, or a setting itself: nothing below it has a name in a file.
        current = None
        if field is None:
            continue
        # The member's kind comes next in the location, and is no key.
        if members := members_of(field):
            current = members.get(rest.pop(0)) if rest else None
        elif isinstance(field.annotation, type) and issubclass(field.annotation, Group):
            current = field.annotation
    return tuple(path)
