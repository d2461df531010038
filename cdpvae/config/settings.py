"""All groups together: defaults, a JSON file, one line for the first thing that is wrong."""

from __future__ import annotations

import difflib
import json
from pathlib import Path
from typing import Any

from pydantic import Field, ValidationError, model_validator

from cdpvae.config.augmentation import AugmentationConfig
from cdpvae.config.base import Group, SettingsError
from cdpvae.config.collapse import CollapseConfig
from cdpvae.config.data import DataConfig
from cdpvae.config.loss import LossConfig
from cdpvae.config.text_vae import ModelConfig
from cdpvae.config.training import TrainingConfig


class Settings(Group):
    """All groups; saved as `settings.json` with every run."""

    model: ModelConfig = Field(default_factory=ModelConfig)
    loss: LossConfig = Field(default_factory=LossConfig)
    augmentation: AugmentationConfig = Field(default_factory=AugmentationConfig)
    collapse: CollapseConfig = Field(default_factory=CollapseConfig)
    data: DataConfig = Field(default_factory=DataConfig)
    training: TrainingConfig = Field(default_factory=TrainingConfig)

    @model_validator(mode="after")
    def _combinations(self) -> Settings:
        if self.training.memory_efficient or self.model.no_latent:
            _set(self.loss, contrastive_weight=0.0, queue_size=0)
            _set(self.augmentation, augmentation_probability=0.0)
        if self.model.no_latent:
            _set(self.loss, bow_weight=0.0, beta_max=0.0)
            _set(self.collapse, enable_collapse_monitoring=False)
        views = self.augmentation.augmentation_probability > 0
        if self.loss.contrastive_weight > 0 and not views:
            raise ValueError(
                f"contrastive_weight={self.loss.contrastive_weight} has no effect with "
                "augmentation_probability=0; set both above 0 or both to 0"
            )
        if self.loss.queue_size and not self.loss.contrastive_weight:
            raise ValueError(
                f"queue_size={self.loss.queue_size} has no effect with contrastive_weight=0"
            )
        return self

    def dump(self) -> str:
        """The resolved settings as JSON text that `load_settings` reads back."""
        return self.model_dump_json(indent=2) + "\n"


def _set(group: Group, **values: Any) -> None:
    """Assign resolved values without running the validators again."""
    for name, value in values.items():
        group.__dict__[name] = value
        group.__pydantic_fields_set__.add(name)


def load_settings(path: str | Path) -> Settings:
    """Read a settings JSON file. Raises SettingsError with one line for anything wrong in it."""
    try:
        text = Path(path).read_text()
        content = json.loads(text)
    except (OSError, UnicodeDecodeError, json.JSONDecodeError) as error:
        raise SettingsError(f"--config {path}: cannot be read as JSON: {error}") from None
    if not isinstance(content, dict):
        raise SettingsError(
            f"--config {path}: must be a JSON object, found {type(content).__name__}"
        )
    return parse_settings(content, source=f"--config {path}")


def parse_settings(content: dict[str, Any], source: str = "settings") -> Settings:
    """Validate a nested dict. Raises SettingsError: one line, the first thing that is wrong."""
    try:
        return Settings.model_validate_json(json.dumps(content))
    except ValidationError as error:
        raise SettingsError(f"{source}: {describe_validation_error(error)}") from None


def describe_validation_error(error: ValidationError) -> str:
    """One line for the first error: the key, the value, what is allowed."""
    errors = error.errors()
    first = errors[0]
    # Groups are one level deep; what follows is pydantic's name for an alternative or an index.
    key = ".".join(str(part) for part in first["loc"][:2])
    if first["type"] == "extra_forbidden":
        hint = difflib.get_close_matches(str(first["loc"][-1]), _all_keys(), n=1)
        return f"unknown key {key!r}" + (f", did you mean {hint[0]!r}?" if hint else "")
    message = first["msg"].removeprefix("Value error, ")
    if first["type"] == "value_error":
        return f"{key}: {message}" if key else message
    # A setting of several types fails once for each of them.
    alternatives = [e["msg"] for e in errors if e["loc"][:2] == first["loc"][:2]]
    return f"{key}={first['input']!r}: {' or '.join(alternatives)}"


def _all_keys() -> list[str]:
    """Every group and setting name."""
    groups = {name: field.annotation for name, field in Settings.model_fields.items()}
    leaves = [key for group in groups.values() for key in group.model_fields]
    return [*groups, *leaves]
