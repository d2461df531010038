"""What lies between two texts: how evenly texts change on the way, and how likely they are.

Where the attributes of the rows are known, also what arithmetic between latents does to them.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from statistics import fmean

import torch
from torch import Tensor

from cdpvae.evaluation.checkpoint import OpenedRun, RowSelection, refuse_without_instruction
from cdpvae.evaluation.figures import Figure, FigureGroup
from cdpvae.evaluation.groups.arithmetic import measure_arithmetic
from cdpvae.evaluation.groups.samples import sentence_bleu, write
from cdpvae.evaluation.scorer import TextScorer
from cdpvae.evaluation.statistics import mean_and_error
from cdpvae.sample.pairs import SampleSpec

MODES = ("linear", "slerp")
STEPS = 11
SHOWN = 2


def measure_interpolation(
    opened: OpenedRun,
    rows: RowSelection,
    *,
    scorer: TextScorer,
    pairs: int,
    max_length: int,
    progress: Callable[[str], None],
    spec: SampleSpec | None = None,
    triples: int = 0,
) -> FigureGroup:
    """Write greedy texts on the ways between the means of neighbouring rows, and measure them.

    opened: the run.
    rows: which rows; the first and second are a pair, the third and fourth, and so on.
    scorer: the language model that judges.
    pairs: how many, at most.
    max_length: tokens per text.
    progress: told what is under way.
    spec: the attributes of the rows, for arithmetic between latents; None for none.
    triples: how many rows a, b, c of it, at most.

    Raises ValueError for a model without a latent, a decoder that reads the instruction, or fewer
    than two rows.
    """
    refuse_without_instruction(opened, "a way between two texts")
    # Neighbouring rows are the ends of a way.
    means = _means(opened, replace(rows, limit=2 * pairs))
    count = len(means) // 2
    if not count:
        raise ValueError(f"{len(means)} rows make no pair to walk between; give at least two")
    starts, ends = means[: 2 * count : 2], means[1 : 2 * count : 2]
    figures: list[Figure] = []
    series: dict[str, list[float]] = {}
    shown: list[dict[str, str]] = []
    for mode in MODES:
        progress(f"{mode}: {count} ways of {STEPS} texts")
        # Latents have the steps first; texts are put together way by way.
        z = opened.model.latent.interpolate(starts, ends, STEPS, mode)
        written = write(opened, z.flatten(0, 1), rows.rows_per_batch, max_length)
        ways = [written[way::count] for way in range(count)]
        figures += _figures(mode, ways, scorer)
        # Where on the way texts change most, and some ways to read.
        series[f"BLEU of neighbours by step, {mode}"] = [
            fmean(sentence_bleu(way[step + 1], way[step]) for way in ways)
            for step in range(STEPS - 1)
        ]
        shown += [
            {f"{mode} {step / (STEPS - 1):.1f}": text for step, text in enumerate(way)}
            for way in ways[:SHOWN]
        ]
    # Arithmetic takes its rows from all of them.
    notes = [scorer.note]
    if spec is not None:
        added = measure_arithmetic(
            opened,
            _means(opened, rows),
            [instruction for batch in opened.rows(rows) for instruction, _ in opened.texts(batch)],
            spec,
            triples=triples,
            rows_per_batch=rows.rows_per_batch,
            max_length=max_length,
            progress=progress,
        )
        figures += added.figures
        shown += [dict(text) for text in added.texts]
        notes += added.notes
    return FigureGroup(
        name="interpolation", figures=figures, series=series, texts=shown, notes=notes
    )


@torch.no_grad()
def _means(opened: OpenedRun, rows: RowSelection) -> Tensor:
    """Return the means of the codes of rows -> (rows, *shape)."""
    model = opened.model
    if not model.latent.reads_text:
        raise ValueError(
            f"checkpoint={str(opened.checkpoint)!r} was trained without a latent; there is nothing "
            "to walk in"
        )
    # Means, without noise: a way between two draws would differ with every seed.
    with model.evaluating():
        return torch.cat(
            [
                model.latent.mean(model.infer(batch.instruction.to(model.device)))
                for batch in opened.rows(rows)
            ]
        )


def _figures(mode: str, ways: list[list[str]], scorer: TextScorer) -> list[Figure]:
    """Return smoothness and perplexities of ways; errors are over ways, whose texts are kin."""
    # How much neighbouring texts share, beside what the ends share.
    near = [
        fmean(sentence_bleu(way[step + 1], way[step]) for step in range(len(way) - 1))
        for way in ways
    ]
    far = [sentence_bleu(way[-1], way[0]) for way in ways]
    figures = [
        Figure(
            name=f"{name}, {mode}",
            value=mean_and_error(values)[0],
            unit="share",
            estimator=how,
            rows=len(values),
            standard_error=mean_and_error(values)[1],
            cap=1.0,
        )
        for name, values, how in (
            ("smoothness", near, f"mean BLEU-4 of neighbouring texts, {STEPS} steps, greedy"),
            ("BLEU of the two ends", far, "mean BLEU-4 of first and last text"),
        )
    ]
    # How likely the texts in between are, beside the ends.
    for name, parts in (
        ("interpolants", [way[1:-1] for way in ways]),
        ("ends", [[way[0], way[-1]] for way in ways]),
    ):
        texts = [text for part in parts for text in part]
        value, error, scored = scorer.perplexity(texts, together=len(parts[0]))
        figures.append(
            Figure(
                name=f"PPL of {name}, {mode}",
                value=value,
                unit="perplexity per token of the scorer",
                estimator="exp of nats over tokens, end of text not counted; error by "
                "linearisation over ways",
                rows=scored,
                standard_error=error,
            )
        )
    return figures
