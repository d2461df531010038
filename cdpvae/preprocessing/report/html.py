"""The report as one HTML page that loads nothing: no script, font or image from outside.

Numbers come from `report.json`'s content, texts from the records: every text is escaped, and the
page forbids scripts in addition. Light and dark follow the reader's system.
"""

from __future__ import annotations

from html import escape
from typing import Any

from cdpvae.preprocessing.report.style import STYLE

# The categories of dropped records: key of the counts, heading, CSS class with the colour.
CATEGORIES = (
    ("not_converted", "not converted", "not-converted"),
    ("filtered", "filtered", "filtered"),
    ("duplicates", "duplicates", "duplicates"),
)
LANGUAGES_SHOWN = 12
# Sizes of the histograms in SVG units: height, width of a bar, left margin.
HEIGHT, BAR, LEFT = 150, 15, 46


def html_report(report: dict[str, Any]) -> str:
    """Return the page. report: the content of `report.json`."""
    # Sections without content are left out.
    counts = report["counts"]
    sections = [
        _problems(report["problems"]),
        _section("From records to rows", _funnel(counts)),
        _section("By input", _sources(report["sources"], counts)),
        _section("Lengths in tokens", _lengths(report["lengths"])),
        _section("Languages", _languages(report["languages"])) if report["languages"] else "",
        _section("What was dropped, and why", _reasons(counts, report["examples"])),
        _section("Inputs and settings", _origin(report)),
    ]
    # The policy allows the page its own style and nothing else.
    return (
        '<!doctype html>\n<html lang="en"><head><meta charset="utf-8">\n'
        '<meta http-equiv="Content-Security-Policy" '
        "content=\"default-src 'none'; style-src 'unsafe-inline'\">\n"
        '<meta name="viewport" content="width=device-width, initial-scale=1">\n'
        f"<title>Preprocessing report</title>\n<style>{STYLE}</style></head>\n<body><main>\n"
        f"{_header(counts, report['split'])}\n" + "\n".join(filter(None, sections)) + "\n"
        "</main></body></html>\n"
    )


def _header(counts: dict[str, Any], split: str) -> str:
    """Return the title, the share that is kept and the four main numbers."""
    tiles = (
        ("records read", counts["read"]),
        ("pairs kept", counts["kept"]),
        ("train", counts["train"]),
        ("validation", counts["validation"]),
    )
    shown = "".join(f"<li><b>{number:,}</b><span>{name}</span></li>" for name, number in tiles)
    share = _percent(counts["kept"], counts["pairs"])
    return (
        "<header><h1>Preprocessing report</h1>"
        f"<p>{share} of {counts['pairs']:,} instruction-response pairs are kept; "
        f"the validation split is {escape(split)}.</p><ul class=tiles>{shown}</ul></header>"
    )


def _section(title: str, content: str) -> str:
    return f"<section><h2>{title}</h2>{content}</section>"


def _problems(problems: dict[str, str]) -> str:
    """Return an alert that names the inputs not read to their end, if there are any."""
    if not problems:
        return ""
    items = "".join(
        f"<li><b>{escape(name)}</b>: {escape(text)}</li>" for name, text in problems.items()
    )
    return f"<section class=alert><h2>Not read to the end</h2><ul>{items}</ul></section>"


def _funnel(counts: dict[str, Any]) -> str:
    """Return one bar a step, and below each bar how many records were dropped before it."""
    # The steps, and the category that is dropped on the way to each of them.
    dropped = {key: sum(counts[key].values()) for key, _, _ in CATEGORIES}
    steps = [("read", counts["read"]), ("converted", counts["converted"])]
    if counts["pairs"] != counts["converted"]:
        steps.append(("pairs in them", counts["pairs"]))
    unfiltered = counts["pairs"] - dropped["filtered"]
    steps += [("past the filters", unfiltered), ("kept", counts["kept"])]
    categories = dict(zip(("converted", "past the filters", "kept"), CATEGORIES, strict=True))
    # A bar for each of them, as wide as its share of the largest.
    widest = max(number for _, number in steps) or 1
    rows = []
    for name, number in steps:
        below = ""
        if name in categories and dropped[categories[name][0]]:
            key, heading, colour = categories[name]
            below = f"<span class='dropped {colour}'>&minus;{dropped[key]:,} {heading}</span>"
        rows.append(
            f"<div class=step><span class=name>{name}</span>"
            f"<span class=track><i style='width:{100 * number / widest:.2f}%'></i></span>"
            f"<span class=number>{number:,}</span>{below}</div>"
        )
    return f"<div class=funnel>{''.join(rows)}</div>"


def _sources(sources: dict[str, Any], total: dict[str, Any]) -> str:
    """Return a table with a row for each input, and their total where there are several."""
    # A single input needs no line with the total.
    rows = [*sources.items()]
    if len(rows) > 1:
        rows.append(("total", total))
    categories = "".join(f"<th>{heading}" for _, heading, _ in CATEGORIES[1:])
    head = f"<tr><th>input<th>read<th>converted{categories}<th>kept<th>train<th>validation<th>"
    # Numbers of each input, and a bar that shows their shares.
    body = []
    for name, counts in rows:
        numbers = [counts["read"], counts["converted"]]
        numbers += [sum(counts[key].values()) for key, _, _ in CATEGORIES[1:]]
        numbers += [counts["kept"], counts["train"], counts["validation"]]
        cells = "".join(f"<td>{number:,}" for number in numbers)
        body.append(f"<tr><th>{escape(name)}{cells}<td class=mix>{_mix(counts)}")
    legend = "".join(
        f"<span class='key {colour}'>{heading}</span>" for _, heading, colour in CATEGORIES
    )
    return (
        f"<div class=scroll><table>{head}{''.join(body)}</table></div>"
        f"<p class=legend><span class='key kept'>kept</span>{legend}</p>"
    )


def _mix(counts: dict[str, Any]) -> str:
    """Return one bar that shows which shares are kept and dropped, by colour."""
    parts = [("kept", counts["kept"])]
    parts += [(colour, sum(counts[key].values())) for key, _, colour in CATEGORIES]
    whole = sum(number for _, number in parts) or 1
    bars = "".join(
        f"<i class={colour} style='width:{100 * number / whole:.2f}%'></i>"
        for colour, number in parts
        if number
    )
    return f"<span class=stack>{bars}</span>"


def _lengths(lengths: dict[str, Any]) -> str:
    """Return a histogram for each side, and their legend."""
    charts = "".join(_histogram(side, **numbers) for side, numbers in lengths.items())
    return (
        f"<div class=charts>{charts}</div><p class=legend><span class='key before'>before the "
        "length filter</span><span class='key kept'>kept</span></p>"
    )


def _histogram(side: str, width: int, before: list[int], kept: list[int]) -> str:
    """Return the histogram of one side: what is kept, in front of what came to the length filter.

    side: instruction or response.
    width: of a bin, in tokens.
    before: numbers before the length filter, by bin.
    kept: numbers of what is kept, by bin.
    """
    # Two bars a bin, and over them an area that shows the numbers.
    highest = max(*before, *kept, 1)
    marks = []
    for index, (count_before, count_kept) in enumerate(zip(before, kept, strict=True)):
        last = index == len(before) - 1
        bounds = f"over {index * width}" if last else f"{index * width + 1}-{(index + 1) * width}"
        left = LEFT + index * BAR
        for number, colour in ((count_before, "before"), (count_kept, "kept")):
            tall = HEIGHT * number / highest
            if number:
                marks.append(
                    f"<rect class={colour} x={left + 1} y={HEIGHT + 10 - tall:.2f} "
                    f"width={BAR - 2} height={tall:.2f} />"
                )
        marks.append(
            f"<rect class=hit x={left} y=10 width={BAR} height={HEIGHT}><title>{bounds} tokens: "
            f"{count_before:,}, kept {count_kept:,}</title></rect>"
        )
    # Grid lines with numbers on the left, and lengths in tokens below every eighth bin.
    base, end = HEIGHT + 10, LEFT + len(before) * BAR
    levels = [(base - HEIGHT * share, highest * share) for share in (0, 0.5, 1)]
    grid = "".join(
        f"<line x1={LEFT} x2={end} y1={y:.1f} y2={y:.1f} />"
        f"<text class=up x={LEFT - 6} y={y + 4:.1f}>{value:,.0f}</text>"
        for y, value in levels
    )
    ticks = "".join(
        f"<text x={LEFT + index * BAR} y={base + 16}>{index * width}</text>"
        for index in range(0, len(before), 8)
    )
    return (
        f"<figure><figcaption>{side}</figcaption><svg viewBox='0 0 {end + 8} {base + 24}' role=img "
        f"aria-label='lengths of the {side}'>{grid}{''.join(marks)}{ticks}</svg></figure>"
    )


def _languages(languages: dict[str, int]) -> str:
    """Return a bar for each of the most frequent languages; `languages` is in falling order."""
    rows = [*languages.items()][:LANGUAGES_SHOWN]
    # Rare languages share one bar.
    rest = sum(languages.values()) - sum(number for _, number in rows)
    if rest:
        rows.append((f"{len(languages) - len(rows)} others", rest))
    return _bars(rows, sum(languages.values()))


def _bars(rows: list[tuple[str, int]], whole: int) -> str:
    """Return a bar for each name with its number and its share of `whole`."""
    # The longest bar fills the width.
    widest = max((number for _, number in rows), default=1) or 1
    return (
        "<div class=funnel>"
        + "".join(
            f"<div class=step><span class=name>{escape(name)}</span>"
            f"<span class=track><i style='width:{100 * number / widest:.2f}%'></i></span>"
            f"<span class=number>{number:,} <small>{_percent(number, whole)}</small></span></div>"
            for name, number in rows
        )
        + "</div>"
    )


def _reasons(counts: dict[str, Any], examples: dict[str, Any]) -> str:
    """Return every reason with its number and, folded away, its example."""
    parts = []
    for key, heading, colour in CATEGORIES:
        # Raw records that do not convert are a share of what was read, all others of the pairs.
        whole = counts["read"] if key == "not_converted" else counts["pairs"]
        for reason, number in counts[key].items():
            parts.append(
                f"<details><summary><span class='key {colour}'>{heading}</span> {escape(reason)}"
                f"<b>{number:,} <small>{_percent(number, whole)}</small></b></summary>"
                f"{_example(examples.get(f'{heading}: {reason}'))}</details>"
            )
    return "".join(parts) or "<p>Nothing.</p>"


def _example(example: dict[str, Any] | None) -> str:
    """Return where an example comes from, its text, and what stays in the place of a duplicate."""
    if example is None:
        return "<p>No example.</p>"
    # Readers count from 1; record_number counts from 0.
    place = f"record {example['record_number'] + 1}"
    if example["line"] is not None:
        place = f"line {example['line']}"
    text = f"<p>{escape(example['source'])}, {place}</p><pre>{escape(example['excerpt'])}</pre>"
    if example.get("kept") is not None:
        text += f"<p>stays in its place</p><pre>{escape(example['kept'])}</pre>"
    return text


def _origin(report: dict[str, Any]) -> str:
    """Return the inputs with their hashes, and the settings, folded away."""
    inputs = "".join(
        f"<tr><th>{escape(str(one.get('file') or one.get('hub')))}"
        f"<td>{one.get('bytes', '')}<td><code>{escape(str(one.get('sha256', '')))}</code>"
        for one in [*report.get("validation_input", []), *report["inputs"]]
    )
    settings = "".join(
        f"<tr><th>{escape(name)}<td><code>{escape(str(value))}</code>"
        for name, value in report["settings"].items()
    )
    return (
        f"<details><summary>inputs</summary><div class=scroll><table class=plain><tr><th>input"
        f"<th>bytes<th>SHA-256{inputs}</table></div></details>"
        f"<details><summary>settings</summary><table class=plain>{settings}</table></details>"
    )


def _percent(part: int, whole: int) -> str:
    return f"{100 * part / whole:.1f}&nbsp;%" if whole else "0&nbsp;%"
