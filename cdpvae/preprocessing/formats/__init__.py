"""From a raw record to exchanges, format by format; `docs/formats.md` in full."""
