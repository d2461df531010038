"""How well texts come back from their codes, over all rows and by the length of the reference."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace

from cdpvae.evaluation.checkpoint import OpenedRun, RowSelection
from cdpvae.evaluation.figures import Figure, FigureGroup
from cdpvae.evaluation.reconstruction import GeneratedText, generate_texts, score_sources
from cdpvae.evaluation.statistics import JACKKNIFE_PARTS, jackknife_errors

# Longest reference of each bucket, in tokens; the last bucket holds all that is longer.
BUCKET_ENDS = (16, 32, 64, 128)
SHOWN = 10
# Key of `score_sources`, what a figure calls it, and how it is measured.
SCORES = (
    ("bleu4", "BLEU-4", "corpus sacreBLEU"),
    ("rouge_l", "ROUGE-L", "mean F1 over texts"),
    ("exact_match", "exact match", "share of equal texts"),
    ("token_accuracy", "token accuracy", "equal ids at equal positions over reference tokens"),
)


def measure_reconstruction(
    opened: OpenedRun,
    rows: RowSelection,
    *,
    seed: int,
    text_rows: int,
    max_length: int,
    progress: Callable[[str], None],
) -> FigureGroup:
    """Write greedy texts from z = mu and z ~ q, and score them against their references.

    opened: the run.
    rows: which rows.
    seed: of z ~ q(z|x).
    text_rows: how many of them, the first ones.
    max_length: tokens per text; a longer reference cannot come back whole.
    progress: told what is under way.
    """
    limit = text_rows if rows.limit is None else min(text_rows, rows.limit)
    progress(f"writing texts of at most {limit} rows")
    texts = generate_texts(opened, replace(rows, limit=limit), max_length, seed)
    if not texts:
        raise ValueError(f"--text-rows {text_rows}: no row to reconstruct; give at least 1")
    # All rows first, then the buckets that hold any.
    progress(f"scoring {len(texts)} texts")
    figures = _figures(texts, "")
    for name, part in _buckets(texts):
        figures += _figures(part, f", {name}")
    cut = sum(len(text.reference_ids) > max_length for text in texts)
    notes = [f"{cut} references are longer than --max-length {max_length} tokens"] if cut else []
    shown = [
        {"instruction": text.instruction, "reference": text.reference, **text.generated}
        for text in texts[:SHOWN]
    ]
    return FigureGroup(name="reconstruction", figures=figures, texts=shown, notes=notes)


def _buckets(texts: Sequence[GeneratedText]) -> list[tuple[str, list[GeneratedText]]]:
    """Return the texts by length of reference, empty buckets left out."""
    buckets, start = [], 0
    for end in (*BUCKET_ENDS, None):
        name = f"over {start} tokens" if end is None else f"{start + 1}-{end} tokens"
        part = [
            text
            for text in texts
            if len(text.reference_ids) > start and (end is None or len(text.reference_ids) <= end)
        ]
        # A reference without a token belongs to the first bucket.
        if not start:
            part += [text for text in texts if not text.reference_ids]
        if part:
            buckets.append((name, part))
        start = end or start
    return buckets


def _figures(texts: Sequence[GeneratedText], suffix: str) -> list[Figure]:
    """Return the four scores of every source of z; `suffix` ends the figures' names."""
    sources = list(texts[0].generated)

    def score(numbers: Sequence[int]) -> list[float]:
        by_source = score_sources([texts[number] for number in numbers])
        return [by_source[source][key] or 0.0 for source in sources for key, _, _ in SCORES]

    # Every score of a corpus has an error by the same jackknife.
    values = score(range(len(texts)))
    known = jackknife_errors(score, len(texts))
    errors: Sequence[float | None] = [None] * len(values) if known is None else known
    labels = [(source, name, how) for source in sources for _, name, how in SCORES]
    return [
        Figure(
            name=f"{name}, {source}{suffix}",
            value=value,
            unit="share",
            estimator=f"{how}, greedy; error by jackknife of {JACKKNIFE_PARTS} parts",
            rows=len(texts),
            standard_error=error,
            cap=1.0,
        )
        for (source, name, how), value, error in zip(labels, values, errors, strict=True)
    ]
