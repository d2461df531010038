"""The evaluation as one HTML page that loads nothing: pictures are inside it, as PNG.

Every text is escaped, and the page forbids scripts in addition. Light and dark follow the reader's
system.
"""

from __future__ import annotations

import base64
import io
from collections.abc import Mapping, Sequence
from html import escape
from typing import Any

from cdpvae.preprocessing.report.style import STYLE

# What the page has beside the style of the preprocessing report.
OWN_STYLE = """
img { max-width: 100%; background: #fff; border-radius: 8px; margin-top: 1rem }
td.words { text-align: left; font-size: .82rem; color: var(--soft) }
pre { white-space: pre-wrap; overflow-wrap: anywhere; margin: .2rem 0 .8rem }
"""
TITLES = {
    "likelihood": "Likelihood",
    "use": "Use of z",
    "latent": "The latent space",
    "reconstruction": "Reconstruction",
    "samples": "Texts from the prior",
    "interpolation": "Interpolation",
}
COLUMNS = ("figure", "value", "standard error", "spread over seeds", "cap", "rows", "unit", "how")
PER_ROW = 2


def html_page(result: Mapping[str, Any]) -> str:
    """Return the page. result: the content of `evaluation.json`."""
    sections = [_section(name, group) for name, group in result["groups"].items()]
    # What was asked for and is missing is said, not hidden.
    left_out = "".join(
        f"<li>{escape(name)}: {escape(reason)}</li>" for name, reason in result["left_out"].items()
    )
    if left_out:
        sections.append(f"<section><h2>Left out</h2><ul>{left_out}</ul></section>")
    # The policy allows the page its own style and its own pictures.
    return (
        '<!doctype html>\n<html lang="en"><head><meta charset="utf-8">\n'
        '<meta http-equiv="Content-Security-Policy" '
        "content=\"default-src 'none'; img-src data:; style-src 'unsafe-inline'\">\n"
        '<meta name="viewport" content="width=device-width, initial-scale=1">\n'
        f"<title>Evaluation</title>\n<style>{STYLE}{OWN_STYLE}</style></head>\n<body><main>\n"
        f"{_header(result)}\n" + "\n".join(sections) + f"\n{_options(result)}\n"
        "</main></body></html>\n"
    )


def _header(result: Mapping[str, Any]) -> str:
    """Return what was evaluated, against what, and how rows were chosen."""
    # Likelihoods without a baseline are hard to judge, so the head says whether there is one.
    given = [result["baseline"], result.get("instruction_baseline")]
    known = " and ".join(path for path in given if path)
    beside = f"beside {known}" if known else "without a baseline"
    notes = "".join(f"<p>{escape(note)}</p>" for note in result["notes"])
    return (
        f"<header><h1>Evaluation</h1><p>{escape(result['checkpoint'])}, {escape(beside)}</p>"
        f"{notes}</header>"
    )


def _section(name: str, group: Mapping[str, Any]) -> str:
    """Return the table of a group, its picture, its notes, and its texts folded away."""
    seeds = ", ".join(map(str, group["seeds"]))
    notes = "".join(f"<li>{escape(note)}</li>" for note in group["notes"])
    return (
        f"<section id={escape(name)}><h2>{escape(TITLES.get(name, name))}</h2>"
        f"<div class=scroll><table>{_table(group['figures'])}</table></div>"
        f"{picture(group['series'])}"
        + (f"<ul>{notes}</ul>" if notes else "")
        + _texts(group["texts"])
        + f"<small>{group['seconds']:.1f} s; seeds {seeds}</small></section>"
    )


def _table(figures: Sequence[Mapping[str, Any]]) -> str:
    """Return the head and a row for each figure."""
    # A number that was not measured leaves its cell empty.
    head = "".join(f"<th>{name}" for name in COLUMNS)
    rows = []
    for figure in figures:
        numbers = (
            _number(figure["value"], "not a number"),
            _number(figure["standard_error"], ""),
            _number(figure["spread_over_seeds"], ""),
            _number(figure["cap"], ""),
            f"{figure['rows']:,}",
        )
        cells = "".join(f"<td>{number}" for number in numbers)
        how = figure["estimator"] + (f" ({figure['note']})" if figure["note"] else "")
        rows.append(
            f"<tr><th>{escape(figure['name'])}{cells}<td class=words>{escape(figure['unit'])}"
            f"<td class=words>{escape(how)}"
        )
    return f"<tr>{head}{''.join(rows)}"


def _number(value: float | None, missing: str) -> str:
    return missing if value is None else f"{value:.4g}"


def picture(series: Mapping[str, Sequence[float | None]]) -> str:
    """Draw every series in a plot of its own -> an <img> with the PNG inside; "" without any."""
    drawn = {
        name: [float("nan") if value is None else value for value in values]
        for name, values in series.items()
        if len(values)
    }
    if not drawn:
        return ""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    # As many plots as series, a few in a row.
    lines = -(-len(drawn) // PER_ROW)
    across = min(PER_ROW, len(drawn))
    figure, axes = pyplot.subplots(
        lines, across, figsize=(5.2 * across, 2.8 * lines), layout="constrained", squeeze=False
    )
    for axis in axes.flat[len(drawn) :]:
        axis.set_axis_off()
    for axis, (name, values) in zip(axes.flat, drawn.items(), strict=False):
        axis.bar(range(len(values)), values, color="#3b6ea5")
        axis.set_title(name, fontsize=10)
    # The PNG is written to memory and becomes part of the page.
    content = io.BytesIO()
    figure.savefig(content, format="png", dpi=110)
    pyplot.close(figure)
    encoded = base64.b64encode(content.getvalue()).decode()
    names = escape(", ".join(drawn), quote=True)
    return f'<img alt="{names}" src="data:image/png;base64,{encoded}">'


def _texts(texts: Sequence[Mapping[str, str]]) -> str:
    """Return examples, folded away."""
    if not texts:
        return ""
    # Texts keep their line breaks, as they are part of what was written.
    shown = "<hr>".join(
        "".join(
            f"<small>{escape(what)}</small><pre>{escape(text)}</pre>"
            for what, text in example.items()
        )
        for example in texts
    )
    return f"<details><summary>{len(texts)} examples</summary>{shown}</details>"


def _options(result: Mapping[str, Any]) -> str:
    """Return the options of the command, folded away."""
    rows = "".join(
        f"<tr><th>{escape(name)}<td><code>{escape(str(value))}</code>"
        for name, value in result["options"].items()
    )
    return (
        f"<section><details><summary>options; version {escape(result['version'])}</summary>"
        f"<table class=plain>{rows}</table></details></section>"
    )
