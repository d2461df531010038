"""The command line of every entry point: one flag per setting, one line per error.

`--config FILE` is read first, flags then override it. Commands with flags of their own
(`--checkpoint`, `--num-samples`) declare them as a dataclass.
"""

from __future__ import annotations

import contextlib
import dataclasses
import io
import json
import re
import sys
from collections.abc import Callable, Sequence
from typing import Any, TypeVar

import tyro
from pydantic import ValidationError

from cdpvae.config import Settings, SettingsError, describe_validation_error, load_settings
from cdpvae.config.flags import Flags, in_flags
from cdpvae.config.renames import print_notice, rename_flags

Options = TypeVar("Options")


def parse_settings_and(
    options: type[Options],
    description: str,
    argv: Sequence[str] | None = None,
    reads: Sequence[str] = tuple(Settings.model_fields),
) -> tuple[Settings, Options]:
    """Parse argv -> the settings (defaults, then --config, then flags) and the command's options.

    options: dataclass of the flags that the command has beside the settings.
    description: the first paragraph of its help.
    argv: arguments without the program's name; those of this process by default.
    reads: keys of the groups and settings that the command reads ("data", "model.backbone"); only
        they have flags. A settings file may hold all of them.

    `--help` and `--print-config` print and exit with 0. Raises SettingsError, one line.
    """
    # Old flags, and those that decide what the other ones are.
    arguments, notes = rename_flags(sys.argv[1:] if argv is None else argv)
    if notes:
        print_notice(", ".join(notes))
    config, arguments = _take_value(arguments, "--config")
    print_config = "--print-config" in arguments
    arguments = [argument for argument in arguments if argument != "--print-config"]

    # The flags start at the values of the file.
    start = load_settings(config) if config else Settings()
    flags = Flags(start.model_dump(), arguments, reads)
    own = ("options", options, dataclasses.field(default_factory=options))
    command = dataclasses.make_dataclass("Command", [*flags.fields(), own], kw_only=True)
    command.__doc__ = description + "\n\nAlso: --config FILE (JSON), --print-config."
    parsed = _parse(command, arguments)

    # All values are known: now they are validated as a whole.
    try:
        settings = Settings.model_validate_json(json.dumps(flags.read(parsed)))
    except ValidationError as error:
        raise SettingsError(in_flags(describe_validation_error(error))) from None
    if print_config:
        print(settings.dump(), end="")
        raise SystemExit(0)
    return settings, parsed.options


def parse_options(options: type[Options], description: str, argv: Sequence[str] | None) -> Options:
    """Parse argv -> a command's options, for commands that take no settings."""
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


def _take_value(argv: Sequence[str], flag: str) -> tuple[str | None, list[str]]:
    """Remove `--flag value` or `--flag=value` -> its value, and the rest."""
    # The last occurrence counts, as for every flag.
    rest: list[str] = []
    value, index = None, 0
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


def _parse(command: type, argv: list[str]) -> Any:
    """Call tyro -> an instance of `command`. Raises SettingsError with tyro's box in one line."""
    # DeepSpeed's launcher adds --local_rank; the environment says the same.
    argv = [arg for arg in argv if not re.fullmatch(r"--local[_-]rank=\d+", arg)]
    # tyro prints its errors; they are caught and printed as one line by `run`.
    said = io.StringIO()
    try:
        with contextlib.redirect_stderr(said):
            return tyro.cli(command, args=argv, config=(tyro.conf.OmitArgPrefixes,))
    except SystemExit as stop:
        if stop.code in (0, None):
            raise
        raise SettingsError(_one_line(said.getvalue())) from None


def _one_line(box: str) -> str:
    """Take the text out of a box drawing, without its frame and its help hints."""
    # Frame and colours go, then whatever repeats the help.
    lines = [re.sub(r"[│╭╰╮╯─]+", " ", line).strip() for line in box.splitlines()]
    text = " ".join(line for line in lines if line)
    text = re.sub(r"\x1b\[[0-9;]*m", "", text)
    text = re.sub(r"\s+", " ", re.split(r"For full helptext|Argument helptext:", text)[0]).strip()
    # tyro titles its boxes.
    text = re.sub(r"^(Value error|Unrecognized options|Invalid choice|Parsing error) ", "", text)
    return text or "the command line cannot be read; see --help"
