"""Keywords and functions that have a new name: the old one is accepted with a one-line notice."""

from __future__ import annotations

import warnings
from typing import TypeVar

import torch

Value = TypeVar("Value")


def announce(
    function: str,
    old: str,
    new: str,
    stacklevel: int,
) -> None:
    """Warn that `old` is now called `new`; Python shows it once per place in the caller's code.

    A graph that is being traced has no place for a warning and gets none.

    function: the name that the message starts with.
    old: the former name.
    new: the name of today.
    stacklevel: how many frames above this one the caller's code lies.
    """
    if not torch.compiler.is_compiling():
        message = f"{function}: {old} is now called {new}; the old name is still accepted"
        warnings.warn(message, DeprecationWarning, stacklevel=stacklevel + 1)


def given_under_either_name(
    function: str,
    old: str,
    new: str,
    old_value: Value | None,
    new_value: Value | None,
) -> Value | None:
    """Return the value that was passed as `new` or as `old`, with a notice for `old`.

    function: the name that messages carry.
    old: the former keyword.
    new: the keyword of today.
    old_value: what was passed as `old`, None if nothing.
    new_value: what was passed as `new`, None if nothing.
    Raises ValueError when both were passed.
    """
    if old_value is None:
        return new_value
    if new_value is not None:
        raise ValueError(f"{function} got {old}= and {new}=, two names of one thing; pass {new}=")
    announce(function, f"{old}=", f"{new}=", stacklevel=3)
    return old_value
