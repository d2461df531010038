"""What every group of settings has in common."""

from __future__ import annotations

import json
from collections.abc import Iterable
from typing import Annotated, Any, ClassVar

from pydantic import BaseModel, ConfigDict, Field, model_validator

from cdpvae.config.renames import rename_keys

# A validator that runs before pydantic's own hands on Python objects in the place of JSON, and
# strict tuples then refuse JSON's lists. So lists of strings are not strict; their items are.
Strings = Annotated[tuple[str, ...], Field(strict=False)]


class Group(BaseModel):
    """Settings that are validated on construction and on assignment; unknown ones are refused."""

    model_config = ConfigDict(
        extra="forbid", strict=True, allow_inf_nan=False, validate_assignment=True
    )

    group: ClassVar[str | None] = None
    """the group's key in a settings file, by which its old keys are found"""

    @model_validator(mode="before")
    @classmethod
    def _accept_old_keys(cls, content: Any) -> Any:
        # In silence: the loader of files and the command line have printed their notice before.
        if cls.group is None or not isinstance(content, dict):
            return content
        return rename_keys({cls.group: content})[0][cls.group]

    def refuse_idle(self, names: Iterable[str], switch: str) -> None:
        """Raise ValueError for a changed setting among `names`: the user expects an effect of it.

        switch: what takes their effect away, as the message says it.
        """
        for name in names:
            value, default = getattr(self, name), type(self).model_fields[name].default
            if value != default:
                raise ValueError(
                    f"{name}={json.dumps(value)} has no effect with {switch}; drop one"
                )
