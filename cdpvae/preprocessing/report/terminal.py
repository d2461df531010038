"""The report as text for the terminal; `report.html` beside the data shows more.

Counts are raw records up to `converted` and instruction-response pairs after it.
"""

from __future__ import annotations

from typing import Any

from cdpvae.preprocessing.pipeline import Processed

COLUMNS = ("read", "converted", "filtered", "duplicates", "kept", "train", "validation")
CATEGORIES = ("not_converted", "filtered", "duplicates")


def terminal_report(processed: Processed) -> str:
    """Return one line per input, then every reason with its number, then what was not read."""
    manifest = processed.manifest
    # A table of the inputs.
    lines = _table([*manifest["sources"].items(), ("total", manifest["counts"])])
    total = manifest["counts"]
    if total["pairs"] != total["converted"]:
        lines.append(f"{total['converted']:,} converted records hold {total['pairs']:,} pairs")
    # The reasons, and the inputs that could not be read.
    for category in CATEGORIES:
        reasons = sorted(total[category].items(), key=lambda item: (-item[1], item[0]))
        for reason, number in reasons:
            lines.append(f"{category.replace('_', ' ')}: {reason}: {number:,}")
    for name, problem in manifest["problems"].items():
        lines.append(f"NOT READ TO ITS END: {name}: {problem}")
    # Where the result is, and how long it took.
    seconds = manifest["run"]["seconds"]
    parts = ", ".join(f"{stage} {value:.1f}" for stage, value in seconds.items())
    done = f"written in {sum(seconds.values()):.1f} s ({parts})"
    if processed.reused:
        done = "reused, made before from the same inputs and settings"
    lines.append(f"{processed.path}: {done}")
    page = processed.path / "report.html"
    lines.append(f"{page}: lengths, languages, an example of every reason")
    return "\n".join(lines)


def _table(rows: list[tuple[str, dict[str, Any]]]) -> list[str]:
    """Return a table with a line for each name and its counts, the columns aligned."""
    # Reasons are summed up to one number a category.
    lines: list[list[str]] = [["source", *COLUMNS]]
    for name, counts in rows:
        sums = {category: sum(counts[category].values()) for category in CATEGORIES}
        cells = {**counts, **sums}
        lines.append([name, *(f"{cells[column]:,}" for column in COLUMNS)])
    # Names stand on the left of their column, numbers on the right.
    widths = [max(len(line[i]) for line in lines) for i in range(len(lines[0]))]
    return [
        "  ".join([line[0].ljust(widths[0]), *map(str.rjust, line[1:], widths[1:])])
        for line in lines
    ]
