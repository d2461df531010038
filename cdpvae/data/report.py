"""What became of every record, as a table for the terminal."""

from __future__ import annotations

from cdpvae.data.pipeline import Processed

COLUMNS = ("read", "converted", "filtered", "duplicates", "kept", "train", "validation")


def report(processed: Processed) -> str:
    """A table for the terminal: one line per source, then the reasons."""
    manifest = processed.manifest
    lines = [("source", *COLUMNS)]
    for name, counts in [*manifest["sources"].items(), ("total", manifest["counts"])]:
        cells = {**counts, "filtered": sum(counts["filtered"].values())}
        lines.append((name, *(f"{cells[column]:,}" for column in COLUMNS)))
    widths = [max(len(line[i]) for line in lines) for i in range(len(lines[0]))]
    text = [
        "  ".join([line[0].ljust(widths[0]), *map(str.rjust, line[1:], widths[1:])])
        for line in lines
    ]
    for stage in ("not_converted", "filtered"):
        for reason, number in manifest["counts"][stage].items():
            text.append(f"{stage.replace('_', ' ')}: {reason}: {number:,}")
    done = f"written in {manifest['seconds']:.1f} s"
    if processed.reused:
        done = "reused, made before from the same inputs and settings"
    return "\n".join([*text, f"{processed.path}: {done}"])
