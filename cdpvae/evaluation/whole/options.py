"""Flags of `cdpvae.evaluate`, which measures everything at once."""

from __future__ import annotations

import dataclasses

from cdpvae.evaluation.options import EvaluationOptions

GROUP_NAMES = ("likelihood", "use", "latent", "reconstruction", "samples", "interpolation")


@dataclasses.dataclass
class WholeOptions(EvaluationOptions):
    """Which checkpoint, which rows, which groups of figures, and where the result goes."""

    input: str | None = None
    """a raw file instead of processed data, prepared as the run's data were"""
    only: str = ",".join(GROUP_NAMES)
    """groups to measure, with commas between them"""
    seeds: int = 1
    """repeat with so many seeds of the noise, --seed and those after it; mean and spread"""
    iw_rows: str = "200"
    """rows of the importance-weighted likelihood, or all"""
    iw_samples: int = 100
    """its samples a row; papers use 500"""
    dimension_rows: int = 200
    """rows on which every latent dimension is replaced alone"""
    text_rows: int = 200
    """rows whose texts are reconstructed"""
    num_texts: int = 200
    """texts drawn from the prior"""
    pairs: int = 20
    """pairs of rows to interpolate between"""
    attributes: str | None = None
    """attributes.json of the sample data: adds arithmetic of attributes to interpolation"""
    triples: int = 200
    """rows a, b, c of that arithmetic"""
    max_length: int = 256
    """tokens per generated text"""
    scorer: str | None = None
    """causal language model whose perplexity judges texts; default: the run's backbone"""
    train_rows: int = 20000
    """training texts that 4-grams of samples are looked for in, the first ones"""
    feature_model: str | None = None
    """causal language model whose states are MAUVE's features; default: the run's backbone"""
    reverse_ppl: int = 0
    """train a language model on so many samples and score real texts with it; 0: do not"""
    output: str = "evaluation"
    """directory of evaluation.json and evaluation.html"""

    @property
    def groups(self) -> list[str]:
        """The groups that are asked for, in their own order."""
        asked = {name.strip() for name in self.only.split(",")}
        return [name for name in GROUP_NAMES if name in asked]

    @property
    def importance_rows(self) -> int | None:
        """Rows of the importance-weighted likelihood; None for all."""
        return None if self.iw_rows == "all" else int(self.iw_rows)

    def check(self) -> None:
        """Raise ValueError for options that name nothing, too little, or contradict each other."""
        self.require_checkpoint()
        # A misspelt group must not be left out silently.
        for name in self.only.split(","):
            if name.strip() not in GROUP_NAMES:
                raise ValueError(
                    f"--only {self.only!r}: {name.strip()!r} is no group; choose from "
                    + ",".join(GROUP_NAMES)
                )
        # Rows come from one place.
        if self.input and self.processed_dir:
            raise ValueError(
                f"--input {self.input!r} and --processed-dir {self.processed_dir!r} both name the "
                "rows; drop one"
            )
        # A flag of a group that is not measured would have no effect.
        for field, group in (
            ("feature_model", "samples"),
            ("reverse_ppl", "samples"),
            ("attributes", "interpolation"),
        ):
            if getattr(self, field) and group not in self.groups:
                flag = "--" + field.replace("_", "-")
                raise ValueError(f"{flag} has no effect with --only {self.only}: add {group}")
        if self.reverse_ppl < 0 or self.reverse_ppl == 1:
            raise ValueError(f"--reverse-ppl {self.reverse_ppl} must be 0, or at least 2 samples")
        if self.iw_rows != "all" and not (self.iw_rows.isdecimal() and int(self.iw_rows)):
            raise ValueError(f"--iw-rows {self.iw_rows!r} must be all or a number of at least 1")
        # Numbers of which at least so many are needed.
        for field, least in (
            ("seeds", 1),
            ("num_rows", 1),
            ("iw_samples", 1),
            ("dimension_rows", 1),
            ("text_rows", 1),
            ("num_texts", 2),
            ("pairs", 1),
            ("triples", 1),
            ("max_length", 1),
            ("train_rows", 0),
        ):
            if getattr(self, field) < least:
                flag = "--" + field.replace("_", "-")
                raise ValueError(f"{flag} {getattr(self, field)} must be at least {least}")
