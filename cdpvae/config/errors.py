"""The error that every wrong setting raises."""

from __future__ import annotations


class SettingsError(ValueError):
    """A setting is unknown, of the wrong type, or impossible in this combination."""
