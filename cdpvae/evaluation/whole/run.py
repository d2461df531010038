"""Measure everything about a checkpoint, group by group, and keep what is finished.

`evaluation.json` is written again after every group, so that a killed evaluation loses one group.
"""

from __future__ import annotations

import dataclasses
import importlib
import math
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from functools import cached_property, partial
from pathlib import Path
from typing import Any

import cdpvae
from cdpvae import files
from cdpvae.data import PreprocessedDataset
from cdpvae.evaluation.baselines import Baselines, open_baselines
from cdpvae.evaluation.checkpoint import OpenedRun, RowSelection, open_run
from cdpvae.evaluation.encoded import EncodedRows, encode_rows
from cdpvae.evaluation.figures import FigureGroup
from cdpvae.evaluation.page import html_page
from cdpvae.evaluation.scorer import TextScorer
from cdpvae.evaluation.whole.options import WholeOptions
from cdpvae.evaluation.whole.raw_input import prepare_input
from cdpvae.evaluation.whole.seeds import SeededGroup
from cdpvae.sample.pairs import SampleSpec


@dataclass
class Subject:
    """What is measured, and what groups share.

    options: of the command. opened, baselines: the runs. rows: which rows. spec: their attributes,
    where they are known.
    """

    options: WholeOptions
    opened: OpenedRun
    baselines: Baselines
    rows: RowSelection
    spec: SampleSpec | None = None
    _encoded: dict[int, EncodedRows] = field(default_factory=dict)

    def encoded(self, seed: int, progress: Callable[[str], None]) -> EncodedRows:
        """Return the rows with their codes and the draws of a seed, encoded when first needed.

        seed: of z ~ q(z|x). progress: told a line where they are encoded.
        """
        # Groups come one after another, each with all seeds: what one made, the next one finds.
        if seed not in self._encoded:
            self._encoded[seed] = encode_rows(self.opened, self.rows, seed=seed, progress=progress)
        return self._encoded[seed]

    @cached_property
    def scorer(self) -> TextScorer:
        """The language model that judges texts, opened when it is first needed."""
        return TextScorer.of(self.opened, self.options.scorer, self.options.backbone)

    @cached_property
    def features(self) -> TextScorer:
        """The language model of MAUVE's features; the scorer itself where both are the backbone."""
        wanted = self.options.feature_model
        if wanted == self.options.scorer:
            return self.scorer
        return TextScorer.of(self.opened, wanted, self.options.backbone, "feature_model")

    @cached_property
    def training_texts(self) -> list[str]:
        """The first texts that the run was trained to write; none where its data is gone."""
        # The run's own data, also where other rows are evaluated.
        try:
            data = PreprocessedDataset(self.opened.settings.data.processed, "train")
        except ValueError as error:
            say(f"no comparison with training texts: {error}")
            return []
        count = min(self.options.train_rows, len(data))
        rows = data.rows(range(count))
        return [self.opened.tokenizer.decode(row["response_ids"].tolist()) for row in rows]


@dataclass(frozen=True)
class Measure:
    """How a group is called. arguments: of `measure_NAME` beside the run, its rows and progress.

    needs_latent: whether there is nothing to measure without a latent.
    between_texts: whether it writes texts that no instruction belongs to.
    uses_seed: whether its figures depend on the seed at all.
    shares_rows: whether it takes the encoded rows of the subject, those of its seed.
    """

    arguments: Callable[[Subject], dict[str, Any]]
    needs_latent: bool = False
    between_texts: bool = False
    uses_seed: bool = True
    shares_rows: bool = False


# A group NAME is the function measure_NAME of cdpvae/evaluation/groups/NAME.py.
MEASURES: Mapping[str, Measure] = {
    "likelihood": Measure(
        lambda it: {
            "baselines": it.baselines,
            "iw_rows": it.options.importance_rows,
            "iw_samples": it.options.iw_samples,
        },
        shares_rows=True,
    ),
    "use": Measure(
        lambda it: {"dimension_rows": it.options.dimension_rows},
        needs_latent=True,
        shares_rows=True,
    ),
    "latent": Measure(lambda it: {}, needs_latent=True, shares_rows=True),
    "reconstruction": Measure(
        lambda it: {"text_rows": it.options.text_rows, "max_length": it.options.max_length}
    ),
    "samples": Measure(
        lambda it: {
            "scorer": it.scorer,
            "training_texts": it.training_texts,
            # Opened only where MAUVE is installed.
            "features": lambda: it.features,
            "reverse_texts": it.options.reverse_ppl,
            "num_texts": it.options.num_texts,
            "max_length": it.options.max_length,
        }
    ),
    "interpolation": Measure(
        lambda it: {
            "scorer": it.scorer,
            "pairs": it.options.pairs,
            "spec": it.spec,
            "triples": it.options.triples,
            "max_length": it.options.max_length,
        },
        needs_latent=True,
        between_texts=True,
        uses_seed=False,
    ),
}


@dataclass
class Evaluation:
    """All that was measured so far.

    head: what was evaluated, and with which options. groups: by name, with their seconds.
    left_out: groups that were asked for and not measured, with the reason. notes: on the rows.
    """

    head: dict[str, Any]
    groups: dict[str, tuple[SeededGroup, float]] = field(default_factory=dict)
    left_out: dict[str, str] = field(default_factory=dict)
    notes: list[str] = field(default_factory=list)

    def to_json(self) -> dict[str, Any]:
        """Return everything as plain values; a figure that is no number is null."""
        groups = {
            name: {**group.to_json(), "seconds": round(seconds, 2)}
            for name, (group, seconds) in self.groups.items()
        }
        content = {**self.head, "notes": self.notes, "groups": groups, "left_out": self.left_out}
        return {key: without_nan(value) for key, value in content.items()}


def without_nan(value: Any) -> Any:
    """Return the same nested value with None for every number that JSON cannot hold."""
    # Standard JSON knows neither NaN nor infinity, and strict readers refuse the whole file.
    if isinstance(value, Mapping):
        return {key: without_nan(part) for key, part in value.items()}
    if isinstance(value, list | tuple):
        return [without_nan(part) for part in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def say(line: str) -> None:
    """Print a line of progress to stderr; tables alone go to stdout."""
    print(line, file=sys.stderr, flush=True)


def _say_under(label: str, line: str) -> None:
    say(f"{label}: {line}")


def evaluate_run(options: WholeOptions) -> Iterator[str]:
    """Measure all groups, yielding the lines of each table as it is finished, then the paths.

    Raises ValueError for what a user can cause, before anything is measured where it can be.
    """
    options.check()
    spec = None if options.attributes is None else SampleSpec.load(options.attributes)
    opened = open_run(options.checkpoint, backbone=options.backbone, device=options.device)
    baselines = open_baselines(options.baseline, opened, backbone=options.backbone)
    directory = Path(options.output)
    directory.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory() as scratch:
        # Rows come from the run's data, or from a raw file that is prepared first.
        rows, result = RowSelection.of(options), Evaluation(_head(options, baselines))
        if options.input:
            say(f"preparing {options.input}")
            raw = prepare_input(opened, options.input, rows, Path(scratch))
            rows = raw.rows
            result.notes.append(raw.note)
        subject = Subject(options, opened, baselines, rows, spec)
        yield from result.notes
        # A finished group is on the disk before the next one begins.
        for name in options.groups:
            yield from _measure_group(name, subject, result)
            files.write_json(directory / "evaluation.json", result.to_json())
    files.write_text(directory / "evaluation.html", html_page(result.to_json()))
    yield f"wrote {directory / 'evaluation.json'} and {directory / 'evaluation.html'}"


def _head(options: WholeOptions, baselines: Baselines) -> dict[str, Any]:
    """Return what was evaluated, and how."""
    plain, reading = (
        None if run is None else str(run.checkpoint)
        for run in (baselines.nothing, baselines.instruction)
    )
    return {
        "version": cdpvae.__version__,
        "checkpoint": options.checkpoint,
        "baseline": plain,
        "instruction_baseline": reading,
        "options": dataclasses.asdict(options),
    }


def _measure_group(name: str, subject: Subject, result: Evaluation) -> Iterator[str]:
    """Measure a group with every seed, put it into the result, and yield its table."""
    # Say at once why a group cannot be measured.
    measure, module = MEASURES[name], f"cdpvae.evaluation.groups.{name}"
    reason = None
    model = subject.opened.model
    if measure.needs_latent and not model.latent.reads_text:
        reason = "the run has no latent"
    elif measure.between_texts and model.config.reads_instruction:
        reason = "the decoder reads the instruction, and between two texts there is none"
    if reason:
        result.left_out[name] = reason
        yield f"{name}: left out, {reason}"
        return
    function = getattr(importlib.import_module(module), f"measure_{name}")
    # Measure with every seed; one is enough where nothing is random.
    started = time.monotonic()
    count = subject.options.seeds if measure.uses_seed else 1
    seeds = list(range(subject.options.seed, subject.options.seed + count))
    groups: list[FigureGroup] = []
    for seed in seeds:
        label = f"{name}, seed {seed}" if count > 1 else name
        keyed: dict[str, Any] = {"seed": seed} if measure.uses_seed else {}
        keyed["progress"] = partial(_say_under, label)
        if measure.shares_rows:
            keyed["encoded"] = subject.encoded(seed, keyed["progress"])
        groups.append(function(subject.opened, subject.rows, **measure.arguments(subject), **keyed))
    seconds = time.monotonic() - started
    say(f"{name}: finished in {seconds:.1f} s")
    result.groups[name] = SeededGroup(seeds, groups), seconds
    yield from result.groups[name][0].lines()
