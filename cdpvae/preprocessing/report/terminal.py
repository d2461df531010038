"""What became of every record, as text for the terminal; `report.html` beside the data shows more.

Counts are records up to `converted` and instruction-response pairs after it.
"""

from __future__ import annotations

from typing import Any

from cdpvae.preprocessing.pipeline import Processed

COLUMNS = ("read", "converted", "filtered", "duplicates", "kept", "train", "validation")
REASONS = ("not_converted", "filtered", "duplicates")


def report(processed: Processed) -> str:
    """One line per source, then every reason with its number, then what could not be read."""
    manifest = processed.manifest
    text = _table([*manifest["sources"].items(), ("total", manifest["counts"])])
    total = manifest["counts"]
    pairs_differ = total["pairs"] != total["converted"]
    if pairs_differ:
        text.append(f"{total['converted']:,} converted records hold {total['pairs']:,} pairs")
    for stage in REASONS:
        for reason, number in sorted(total[stage].items(), key=lambda item: (-item[1], item[0])):
            text.append(f"{stage.replace('_', ' ')}: {reason}: {number:,}")
    for name, problem in manifest["problems"].items():
        text.append(f"NOT READ TO ITS END: {name}: {problem}")
    seconds = manifest["run"]["seconds"]
    parts = ", ".join(f"{stage} {value:.1f}" for stage, value in seconds.items())
    done = f"written in {sum(seconds.values()):.1f} s ({parts})"
    if processed.reused:
        done = "reused, made before from the same inputs and settings"
    text.append(f"{processed.path}: {done}")
    text.append(f"{processed.path / 'report.html'}: lengths, languages, an example of every reason")
    return "\n".join(text)


def _table(rows: list[tuple[str, dict[str, Any]]]) -> list[str]:
    lines = [("source", *COLUMNS)]
    for name, counts in rows:
        cells = {**counts, **{stage: sum(counts[stage].values()) for stage in REASONS}}
        lines.append((name, *(f"{cells[column]:,}" for column in COLUMNS)))
    widths = [max(len(line[i]) for line in lines) for i in range(len(lines[0]))]
    return [
        "  ".join([line[0].ljust(widths[0]), *map(str.rjust, line[1:], widths[1:])])
        for line in lines
    ]
