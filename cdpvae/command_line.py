"""The command line of every entry point: one flag per setting, one line per error.

`--config FILE` is read first, flags then override it. As every setting's name is unique, flags
carry no group prefix (`--learning-rate`, `--phase`); the JSON file groups them. Commands with
flags of their own (`--checkpoint`, `--num-samples`) declare them as a dataclass.
"""

from __future__ import annotations

import contextlib
import dataclasses
import io
import json
import re
import sys
from collections.abc import Callable, Sequence
from typing import Annotated, Any, TypeVar, get_args

import tyro
from pydantic import ValidationError

from cdpvae.config import (
    Settings,
    SettingsError,
    all_settings,
    describe_validation_error,
    load_settings,
)
from cdpvae.config.renames import flag_of, print_notice, rename_flags
from cdpvae.config.schema import Setting

Options = TypeVar("Options")


def parse_settings_and(
    options: type[Options], description: str, argv: Sequence[str] | None = None
) -> tuple[Settings, Options]:
    """argv -> the settings (defaults, then --config, then flags) and the command's own options.

    `--help` and `--print-config` print and exit with 0. Raises SettingsError, one line.
    """
    argv, notes = rename_flags(sys.argv[1:] if argv is None else argv)
    if notes:
        print_notice(", ".join(notes))
    config, argv = _take_value(argv, "--config")
    print_config = "--print-config" in argv
    argv = [arg for arg in argv if arg != "--print-config"]
    content = (load_settings(config) if config else Settings()).model_dump()
    _choose_families(content, argv)
    # Flags exist for the chosen families only, so that a setting without effect is refused.
    flags = [s for s in all_settings() if s.family in (None, _kind(content, s))]
    _refuse_other_families(flags, argv)
    both = dataclasses.make_dataclass(
        "Command",
        [
            *_groups(flags, content),
            ("options", options, dataclasses.field(default_factory=options)),
        ],
        kw_only=True,
    )
    both.__doc__ = description + "\n\nAlso: --config FILE (JSON), --print-config."
    parsed = _parse(both, argv)
    for setting in flags:
        group = getattr(parsed, setting.path[0])
        _holder(content, setting)[setting.path[-1]] = getattr(group, _attribute(setting))
    try:
        settings = Settings.model_validate_json(json.dumps(content))
    except ValidationError as error:
        raise SettingsError(describe_validation_error(error)) from None
    if print_config:
        print(settings.dump(), end="")
        raise SystemExit(0)
    return settings, parsed.options


def _choose_families(content: dict[str, Any], argv: list[str]) -> None:
    """Give each family that a flag asks for its defaults, unless the content is of it already."""
    for setting in all_settings():
        wanted = _take_value(argv, setting.flag)[0] if setting.is_kind else None
        if wanted in get_args(setting.annotation) and wanted != _kind(content, setting):
            holder = _holder(content, setting)
            holder.clear()
            holder["kind"] = wanted
            family = [s for s in all_settings() if s.family == wanted]
            holder.update({s.path[-1]: s.default for s in family})


def _refuse_other_families(flags: list[Setting], argv: list[str]) -> None:
    """Say of a flag that belongs to another family that it has no effect."""
    names = {setting.flag for setting in flags}
    given = {arg.partition("=")[0].replace("_", "-") for arg in argv if arg.startswith("--")}
    for setting in all_settings():
        if setting.flag in given - names:
            choice = flag_of(".".join([*setting.path[:-1], "kind"]))
            raise SettingsError(f"{setting.flag} has no effect without {choice} {setting.family}")


def _groups(flags: list[Setting], content: dict[str, Any]) -> list[tuple[str, type, Any]]:
    """Build a dataclass for each group, whose fields tyro turns into flags -> dataclass fields."""
    groups = []
    for name, field in Settings.model_fields.items():
        fields = [
            (
                _attribute(setting),
                Annotated[setting.annotation, tyro.conf.arg(help=setting.help)],
                dataclasses.field(default=_holder(content, setting)[setting.path[-1]]),
            )
            for setting in flags
            if setting.path[0] == name
        ]
        if fields:
            group = dataclasses.make_dataclass(name, fields, kw_only=True)
            group.__doc__ = field.annotation.__doc__
            groups.append((name, group, dataclasses.field(default_factory=group)))
    return groups


def _attribute(setting: Setting) -> str:
    return setting.flag.removeprefix("--").replace("-", "_")


def _holder(content: dict[str, Any], setting: Setting) -> dict[str, Any]:
    """Return the dict of nested settings that holds this one."""
    for name in setting.path[:-1]:
        content = content[name]
    return content


def _kind(content: dict[str, Any], setting: Setting) -> str | None:
    """Return the family that is chosen where this setting lies."""
    return _holder(content, setting).get("kind")


def parse_options(options: type[Options], description: str, argv: Sequence[str] | None) -> Options:
    """argv -> a command's options, for commands that take no settings."""
    field = ("options", options, dataclasses.field(default_factory=options))
    wrapped = dataclasses.make_dataclass("Command", [field], kw_only=True)
    wrapped.__doc__ = description
    return _parse(wrapped, list(sys.argv[1:] if argv is None else argv)).options


def run(main: Callable[[Sequence[str] | None], None], argv: Sequence[str] | None = None) -> int:
    """Call a command's body -> exit status. What the user can cause is one line on stderr, 2."""
    try:
        main(argv)
    except (ValueError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        return 130
    return 0


def _take_value(argv: list[str], flag: str) -> tuple[str | None, list[str]]:
    """Remove `--flag value` or `--flag=value` -> its value, and the rest."""
    rest, value, index = [], None, 0
    while index < len(argv):
        arg = argv[index]
        if arg == flag:
            if index + 1 == len(argv):
                raise SettingsError(f"{flag} needs a value")
            value, index = argv[index + 1], index + 2
        elif arg.startswith(flag + "="):
            value, index = arg.split("=", 1)[1], index + 1
        else:
            rest.append(arg)
            index += 1
    return value, rest


def _parse(command: type, argv: list[str]):
    """tyro, its boxes of many lines reduced to one."""
    # DeepSpeed's launcher adds --local_rank; the environment says the same.
    argv = [arg for arg in argv if not re.fullmatch(r"--local[_-]rank=\d+", arg)]
    said = io.StringIO()
    try:
        with contextlib.redirect_stderr(said):
            return tyro.cli(
                command,
                args=argv,
                config=(tyro.conf.OmitArgPrefixes,),
            )
    except SystemExit as stop:
        if stop.code in (0, None):
            raise
        raise SettingsError(_one_line(said.getvalue())) from None


def _one_line(box: str) -> str:
    """The text of a box drawing, without its frame and its help hints."""
    lines = [re.sub(r"[│╭╰╮╯─]+", " ", line).strip() for line in box.splitlines()]
    text = " ".join(line for line in lines if line)
    text = re.sub(r"\x1b\[[0-9;]*m", "", text)
    text = re.sub(r"\s+", " ", re.split(r"For full helptext|Argument helptext:", text)[0]).strip()
    # tyro titles its boxes and wraps what our own validators say into pydantic's words.
    text = re.sub(r"^(Value error|Unrecognized options|Invalid choice|Parsing error) ", "", text)
    text = re.sub(
        r"^Error parsing settings\S*: 1 validation error for \w+ (Value error, )?", "", text
    )
    text = re.sub(r" \[type=.*$", "", text)
    return text.strip() or "the command line cannot be read; see --help"
