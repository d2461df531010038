"""Every setting of cdpvae, typed and validated.

Settings come from three places, later ones winning: the defaults, a JSON file (`--config`), the
command line. The defaults are those of the original description (docs/architecture.md;
cdpvae/configs/description.json has them all). Unknown keys, wrong types and impossible combinations
stop the run before any weight is loaded, with one line that names the key, the value and what is
allowed (`SettingsError`). What depends on the backbone's dimensions is checked when its
`config.json` is read, in `models/text_vae/backbone.py`.

A group of settings is a class in a file of its own; `settings.py` puts the groups together,
`schema.py` lists all settings, `flags.py` makes command-line flags of the list, `renames.py` has
the old names.
"""

from cdpvae.config.augmentation import AugmentationConfig
from cdpvae.config.collapse import CollapseConfig
from cdpvae.config.data import DataConfig
from cdpvae.config.errors import SettingsError
from cdpvae.config.latents import GaussianConfig, LatentConfig, NoLatentConfig
from cdpvae.config.loss import LossConfig
from cdpvae.config.settings import (
    Settings,
    all_settings,
    describe_validation_error,
    load_settings,
    parse_settings,
)
from cdpvae.config.text_vae import ModelConfig
from cdpvae.config.training import TrainingConfig

__all__ = [
    "AugmentationConfig",
    "CollapseConfig",
    "DataConfig",
    "GaussianConfig",
    "LatentConfig",
    "LossConfig",
    "ModelConfig",
    "NoLatentConfig",
    "Settings",
    "SettingsError",
    "TrainingConfig",
    "all_settings",
    "describe_validation_error",
    "load_settings",
    "parse_settings",
]
