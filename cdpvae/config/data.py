"""From raw records to processed rows, and what training reads."""

from __future__ import annotations

import json
from pathlib import Path
from typing import ClassVar, Literal

from pydantic import Field, model_validator

from cdpvae.config.base import Group, Strings


class DataConfig(Group):
    """From records to processed Arrow data (`preprocess`), and what training reads."""

    group: ClassVar[str | None] = "data"

    # Which records are read.
    phase: Literal[1, 2, 3] = Field(
        default=1, description="hub data sets of this phase of the original description"
    )
    input: Strings = Field(default=(), description="local files or hub ids instead of a phase")
    format: Literal["auto", "sharegpt", "alpaca", "messages", "magicoder", "text"] = Field(
        default="auto", description="how a record names its texts; auto looks at its keys"
    )
    turns: Literal["first", "all", "last"] = Field(
        default="first", description="which exchanges of a conversation become pairs"
    )
    max_samples: int | None = Field(
        default=None, ge=1, description="stop after this many kept records"
    )
    processed_dir: str | None = Field(default=None, description="default: processed/phase{phase}")
    target: Literal["response", "reconstruction"] = Field(
        default="response", description="what the decoder writes: the response, or the text encoded"
    )
    # Bounds in tokens; BOS and EOS count.
    min_instruction_tokens: int = Field(
        default=10, ge=1, description="drop pairs whose instruction has fewer tokens"
    )
    max_instruction_tokens: int = Field(
        default=512, ge=2, description="drop pairs whose instruction has more tokens"
    )
    min_response_tokens: int = Field(
        default=20, ge=1, description="drop pairs whose response has fewer tokens"
    )
    max_response_tokens: int = Field(
        default=1024, ge=3, description="drop pairs whose response has more tokens"
    )
    # Language and quality.
    language_filter: bool = Field(default=True, description="keep records in `languages` only")
    languages: Strings = Field(default=("en",), description="fastText's codes: en, de, zh ...")
    min_language_score: float = Field(
        default=0.8, ge=0, le=1, description="confidence, against the strongest other language"
    )
    language_model: str | None = Field(
        default=None,
        description="lid.176.bin or .ftz; default: the small model of an installed package",
    )
    quality_filter: bool = Field(default=True, description="drop damaged and degenerate text")
    max_control_share: float = Field(
        default=0.0, ge=0, le=1, description="control characters, of all"
    )
    max_repeated_character_run: int = Field(
        default=9, ge=1, description="equal letters or digits in a row"
    )
    max_repeated_word_share: float = Field(
        default=0.0, ge=0, le=1, description="words in loops of five or more repeats, of all"
    )
    max_special_share: float = Field(
        default=0.3, ge=0, le=1, description="characters that are no letter, digit or space, of all"
    )
    # Duplicates, and texts that an evaluation uses.
    deduplication: Literal["none", "exact", "minhash"] = Field(
        default="minhash", description="equal texts, or also near-duplicates by MinHash"
    )
    num_permutations: int = Field(
        default=128, ge=16, le=1024, description="numbers in a MinHash signature"
    )
    shingle_words: int = Field(default=5, ge=1, description="words per shingle")
    similarity: float = Field(
        default=0.85, gt=0, le=1, description="Jaccard from which texts are the same"
    )
    decontaminate: Strings = Field(
        default=(), description="evaluation files whose texts must not be in the result"
    )
    validation_fraction: float = Field(
        default=0.02, ge=0, lt=1, description="share of rows in the validation split"
    )
    validation_input: Strings = Field(
        default=(),
        description="files that are the validation split; rows of `input` are trained on",
    )
    # Where preprocessing runs; the result does not depend on it.
    workers: int | None = Field(
        default=None, ge=1, description="preprocessing processes; default: cores"
    )
    shard_records: int = Field(
        default=2_000, ge=1, description="records a worker takes at a time, and a killed run loses"
    )
    executor: Literal["local", "ray"] = Field(
        default="local", description="where workers run: this machine, or a Ray cluster"
    )
    # What training reads in the place of processed data.
    streaming: bool = Field(
        default=False, description="train on records as they are read, without preprocessing"
    )

    @property
    def processed(self) -> Path:
        """Directory of the processed data."""
        return Path(self.processed_dir or f"processed/phase{self.phase}")

    @model_validator(mode="after")
    def _bounds(self) -> DataConfig:
        for what in ("instruction", "response"):
            low, high = (getattr(self, f"{end}_{what}_tokens") for end in ("min", "max"))
            if low > high:
                raise ValueError(
                    f"min_{what}_tokens={low} must not be above max_{what}_tokens={high}"
                )
        return self

    @model_validator(mode="after")
    def _no_idle_setting(self) -> DataConfig:
        """Refuse a changed setting whose switch is off: the user expects an effect."""
        minhash = self.deduplication == "minhash"
        exact = f"deduplication={self.deduplication}"
        files = f"validation_input={json.dumps(self.validation_input)}"
        for active, switch, names in (
            (self.language_filter, "language_filter=false", _LANGUAGE_SETTINGS),
            (self.quality_filter, "quality_filter=false", _QUALITY_SETTINGS),
            (minhash, exact, _SIGNATURE_SETTINGS),
            (minhash or self.decontaminate, f"{exact} and no decontaminate", _NEAR_SETTINGS),
            (not self.validation_input, files, _SHARE_SETTINGS),
        ):
            if not active:
                self.refuse_idle(names, switch)
        if self.language_filter and not self.languages:
            raise ValueError("languages=[] keeps no record; name one, or set language_filter=false")
        return self


# Settings by the switch without which they have no effect.
_LANGUAGE_SETTINGS = ("languages", "min_language_score", "language_model")
_QUALITY_SETTINGS = (
    "max_control_share",
    "max_repeated_character_run",
    "max_repeated_word_share",
    "max_special_share",
)
_SIGNATURE_SETTINGS = ("num_permutations",)
_NEAR_SETTINGS = ("shingle_words", "similarity")
_SHARE_SETTINGS = ("validation_fraction",)
