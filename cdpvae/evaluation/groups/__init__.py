"""The groups of figures of an evaluation, one question a file."""
