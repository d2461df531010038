"""Settings as flags of a command line: which exist, their values, and errors in their words.

Every setting's name is unique, so flags carry no group prefix (`--learning-rate`, `--phase`).
A family of latents is chosen by its flag (`--latent none`), and only its own flags exist then:
a setting that would have no effect is refused.
"""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Sequence
from itertools import zip_longest
from typing import Annotated, Any, get_args

import tyro

from cdpvae.config.errors import SettingsError
from cdpvae.config.renames import flag_of
from cdpvae.config.schema import Setting
from cdpvae.config.settings import Settings, all_settings

# A value in an error message: a list, a quoted text, or anything up to a space or a separator.
_VALUE = r"""\[[^\]]*\]|'[^']*'|"[^"]*"|[^\s;,:]+"""


class Flags:
    """The flags of one command.

    content: nested settings (`Settings.model_dump`), the values where no flag is given; changed
        in place to the families that argv chooses.
    argv: the command line.
    reads: keys of the groups and settings that the command reads; others have no flag.
    Raises SettingsError for a flag of a setting that has no effect.
    """

    def __init__(self, content: dict[str, Any], argv: Sequence[str], reads: Sequence[str]):
        self.content = content
        # Flags exist for the chosen families only, so that a setting without effect is refused.
        self.settings = [s for s in all_settings() if any(_is_in(s, key) for key in reads)]
        given = _flags_in(argv)
        self._choose_families(given)
        self.settings = [s for s in self.settings if s.family in (None, self._kind_at(s))]
        self._refuse_others(given)

    def fields(self) -> list[tuple[str, type, Any]]:
        """Make a dataclass of every group, from whose fields tyro makes flags.

        Returns the dataclasses as (name, type, default) of the fields of a further one.
        """
        fields = []
        for name, group in Settings.model_fields.items():
            settings = [s for s in self.settings if s.path[0] == name]
            if settings:
                members = [self._field(setting) for setting in settings]
                made = dataclasses.make_dataclass(name, members, kw_only=True)
                made.__doc__ = getattr(group.annotation, "__doc__", None)
                fields.append((name, made, dataclasses.field(default_factory=made)))
        return fields

    def read(self, parsed: Any) -> dict[str, Any]:
        """Return the nested settings with the values that tyro put into `parsed`."""
        for setting in self.settings:
            group = getattr(parsed, setting.path[0])
            self._holder(setting)[setting.path[-1]] = getattr(group, _attribute(setting))
        return self.content

    def _field(self, setting: Setting) -> tuple[str, Any, Any]:
        # A type that is known at run time only, which a type checker would not accept.
        annotated: Any = Annotated
        annotation = annotated[setting.annotation, tyro.conf.arg(help=setting.help)]
        default = self._holder(setting)[setting.path[-1]]
        # A factory, as a default may be a dict, which a dataclass would share.
        return _attribute(setting), annotation, dataclasses.field(default_factory=lambda: default)

    def _choose_families(self, given: dict[str, str | None]) -> None:
        """Give a family that a flag asks for its defaults, unless the content has it already."""
        for choice in [setting for setting in self.settings if setting.is_kind]:
            wanted = given.get(choice.flag)
            if wanted in get_args(choice.annotation) and wanted != self._kind_at(choice):
                own = [s for s in self.settings if s.family == wanted and _is_beside(s, choice)]
                holder = self._holder(choice)
                holder.clear()
                holder["kind"] = wanted
                holder.update({setting.path[-1]: setting.default for setting in own})

    def _refuse_others(self, given: dict[str, str | None]) -> None:
        """Raise SettingsError for a flag of another family, or that the command does not read."""
        existing = {setting.flag for setting in self.settings}
        for setting in all_settings():
            if setting.flag in existing or setting.flag not in given:
                continue
            # The family is another one, or the whole group is not read.
            choice = flag_of(".".join((*setting.path[:-1], "kind")))
            if setting.family is not None and choice in existing:
                raise SettingsError(
                    f"{setting.flag} has no effect with {choice} {self._kind_at(setting)}; "
                    f"it belongs to {choice} {setting.family}"
                )
            raise SettingsError(
                f"{setting.flag} has no effect: this command does not read it; drop it"
            )

    def _holder(self, setting: Setting) -> dict[str, Any]:
        """Return the dict of nested settings that holds this one."""
        holder = self.content
        for name in setting.path[:-1]:
            holder = holder[name]
        return holder

    def _kind_at(self, setting: Setting) -> str | None:
        """Return the family that the content has where this setting lies."""
        return self._holder(setting).get("kind")


def in_flags(message: str) -> str:
    """Name settings in an error message as the command line does: "a_b=1" -> "--a-b 1"."""
    settings = {
        ".".join(s.path[-2:]) if s.is_kind else s.path[-1]: s for s in reversed(all_settings())
    }
    # The longest name first, as one name may begin another.
    names = "|".join(re.escape(name) for name in sorted(settings, key=len, reverse=True))

    def replace(match: re.Match[str]) -> str:
        flag, value = settings[match["name"]].flag, match["value"]
        if value is None:
            # Without a value, a name of one word may be no name but the word ("format").
            return flag if "_" in match["name"] else match[0]
        if value in ("true", "false"):
            return flag if value == "true" else "--no-" + flag.removeprefix("--")
        return " ".join([flag, *re.sub(r"[\[\],'\"]", " ", value).split()])

    groups = "|".join(Settings.model_fields)
    message = re.sub(rf"^({groups}): ", "", message)
    prefix = rf"(?<![\w.-])((?:{groups})\.(\w+\.)*?)?"
    return re.sub(rf"{prefix}(?P<name>{names})\b(=(?P<value>{_VALUE}))?", replace, message)


def _flags_in(argv: Sequence[str]) -> dict[str, str | None]:
    """Return the flags of a command line in their usual spelling, and the word after each.

    `--no-x` counts as `--x`, which is how a switch is given.
    """
    given: dict[str, str | None] = {}
    for argument, following in zip_longest(argv, argv[1:]):
        # A value that begins with two dashes would be taken for a flag; no setting has such values.
        if argument.startswith("--"):
            name, equals, value = argument.partition("=")
            name = name.replace("_", "-")
            given[name] = value if equals else following
            if name.startswith("--no-"):
                given.setdefault("--" + name.removeprefix("--no-"), None)
    return given


def _is_in(setting: Setting, key: str) -> bool:
    return setting.key == key or setting.key.startswith(key + ".")


def _is_beside(setting: Setting, other: Setting) -> bool:
    return setting.path[:-1] == other.path[:-1]


def _attribute(setting: Setting) -> str:
    return setting.flag.removeprefix("--").replace("-", "_")
