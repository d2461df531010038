"""Which records are worth training on; `build.py` makes the filters of the settings."""
