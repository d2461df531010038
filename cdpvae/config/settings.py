"""All groups together: defaults, a JSON file, one line for the first thing that is wrong."""

from __future__ import annotations

import difflib
import json
from pathlib import Path
from typing import Any, get_args

from pydantic import Field, ValidationError, model_validator

from cdpvae.config.augmentation import AugmentationConfig
from cdpvae.config.base import Group
from cdpvae.config.collapse import CollapseConfig
from cdpvae.config.data import DataConfig
from cdpvae.config.errors import SettingsError
from cdpvae.config.latents import GaussianConfig
from cdpvae.config.loss import LossConfig
from cdpvae.config.renames import print_notice, rename_keys
from cdpvae.config.schema import Setting, path_of, settings_of
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
        """Resolve what one setting decides for another group, and refuse what has no effect."""
        # Switches that turn off whole terms of the objective.
        without_latent = self.model.latent.kind == "none"
        if self.training.memory_efficient or without_latent:
            _set(self.loss, contrastive_weight=0.0, queue_size=0)
            _set(self.augmentation, augmentation_probability=0.0)
        if without_latent:
            _set(self.loss, bow_weight=0.0, beta_max=0.0, rate_target=None)
            _set(self.loss, order_weight=0.0, order_fall_ratio=None)
            _set(self.model, positional_slots=0)
            _set(self.collapse, enable_collapse_monitoring=False)
            rates = self.training.part_learning_rates
            left = {part: rate for part, rate in rates.items() if part in self.model.parts}
            _set(self.training, part_learning_rates=left)
        self._check_rate_target()
        self._check_parts()
        # The order of the words is asked of the states that positional_slots makes.
        if self.loss.order_weight and not self.model.positional_slots:
            raise ValueError(
                f"order_weight={self.loss.order_weight} has no effect with positional_slots=0; set "
                "slots, about as many as a text has tokens, or drop it"
            )
        if self.model.reads_instruction and self.data.target == "reconstruction":
            raise ValueError(
                "decoder_reads='instruction' with target='reconstruction': the decoder would read "
                "the text that it is to write; set decoder_reads='nothing' or target='response'"
            )
        # InfoNCE compares two views, and the queue holds second views.
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

    def _check_rate_target(self) -> None:
        """Raise ValueError for a target that the form of the posterior excludes."""
        latent, target = self.model.latent, self.loss.rate_target
        if target is None or not isinstance(latent, GaussianConfig):
            return
        committed = latent.committed_rate * latent.latent_dim
        if target <= committed:
            raise ValueError(
                f"rate_target={target} is not above committed_rate x latent_dim = {committed:g} "
                "nats, which the posterior is held to; raise the target or lower the commitment"
            )

    def _check_parts(self) -> None:
        """Raise ValueError for the rate of a part that the model does not have."""
        parts = self.model.parts
        for name in self.training.part_learning_rates:
            if name not in parts:
                raise ValueError(
                    f"training.part_learning_rates: {name!r} is no part of this model, which has "
                    f"{', '.join(parts)}; drop it"
                )

    def dump(self) -> str:
        """Write the resolved settings as JSON text that `load_settings` reads back."""
        return self.model_dump_json(indent=2) + "\n"


def _set(group: Group, **values: Any) -> None:
    """Assign resolved values without running the validators again."""
    for name, value in values.items():
        group.__dict__[name] = value
        group.__pydantic_fields_set__.add(name)


def all_settings() -> list[Setting]:
    """List every setting there is, of every family."""
    return settings_of(Settings)


def load_settings(path: str | Path) -> Settings:
    """Read a settings JSON file. Raises SettingsError with one line for anything wrong in it."""
    # A file that is no JSON object has no key that an error could name.
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
    """Validate a nested dict. Raises SettingsError: one line, the first thing that is wrong.

    Old keys are accepted; one line on stderr names the new ones.
    """
    # Old keys first, as pydantic knows the present ones only.
    try:
        renamed, notes = rename_keys(content)
        settings = Settings.model_validate_json(json.dumps(renamed))
    except ValidationError as error:
        raise SettingsError(f"{source}: {describe_validation_error(error)}") from None
    except SettingsError as error:
        raise SettingsError(f"{source}: {error}") from None
    if notes:
        print_notice(f"{source}: {', '.join(notes)}")
    return settings


def describe_validation_error(error: ValidationError) -> str:
    """Describe the first error in one line: the key, the value, what is allowed."""
    errors = error.errors()
    first = errors[0]
    path = path_of(Settings, first["loc"])
    key = ".".join(path)
    if first["type"] == "extra_forbidden":
        return f"unknown key {key!r}{_hint(path)}"
    # A family is named by its `kind`, which pydantic reports at the level above.
    if first["type"] == "union_tag_invalid":
        context = first["ctx"]
        return f"{key}.kind={context['tag']!r}: Input should be one of {context['expected_tags']}"
    if first["type"] == "union_tag_not_found":
        kinds = next(s.annotation for s in all_settings() if s.key == f"{key}.kind")
        return f"{key}.kind is missing: Input should be one of {', '.join(get_args(kinds))}"
    # A rule of our own names the settings itself.
    message = first["msg"].removeprefix("Value error, ")
    if first["type"] == "value_error":
        return f"{key}: {message}" if key else message
    # A setting of several types fails once for each of them.
    alternatives = [e["msg"] for e in errors if path_of(Settings, e["loc"]) == path]
    return f"{key}={first['input']!r}: {' or '.join(alternatives)}"


def _hint(path: tuple[str, ...]) -> str:
    """Name the key that is most like an unknown one, with its groups."""
    # Names of groups as well; where two keys end alike, the first counts.
    key_by_name: dict[str, str] = {}
    for setting in all_settings():
        for end, name in enumerate(setting.path, start=1):
            key_by_name.setdefault(name, ".".join(setting.path[:end]))
    near = difflib.get_close_matches(path[-1], key_by_name, n=1)
    found = key_by_name[near[0]] if near else ""
    # The key of another family is known, but not here.
    return f", did you mean {found!r}?" if found and found != ".".join(path) else ""
