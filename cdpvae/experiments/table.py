"""The table of a sweep: a CSV file with a row for every run that ended, well or not.

The file is all that a sweep remembers. It is written whole under another name and renamed, so that
a killed sweep leaves every earlier row.
"""

from __future__ import annotations

import csv
import io
from collections.abc import Iterable, Sequence
from pathlib import Path

from cdpvae.experiments.plan import PlannedRun
from cdpvae.files import write_text

FINISHED, FAILED = "finished", "failed"

# Figures and their standard errors, nats per sequence unless the name says otherwise.
FIGURES = (
    "rows",
    "tokens",
    "nll_q",
    "nll_q_se",
    "nll_mu",
    "kl",
    "kl_se",
    "neg_elbo",
    "neg_elbo_se",
    "cost_shuffled",
    "cost_shuffled_se",
    "cost_prior",
    "cost_zero",
    "active_units",
    "active_unit_ratio",
    "mutual_information",
    "mutual_information_cap",
    "baseline_nll",
    "baseline_nll_se",
)
BEFORE = ("run", "seed", "status")
AFTER = ("steps", "seconds", *FIGURES, "settings_hash", "commit", "versions", "last_line")

Row = dict[str, str]


class SweepTable:
    """Rows of `sweep.csv`. varied: keys of the settings that vary, a column each.

    Raises ValueError for a file of another sweep. `torn` is whether a last line without its end
    was left out.
    """

    def __init__(self, path: Path, varied: Sequence[str]) -> None:
        self.path, self.varied = path, tuple(varied)
        self.columns = (BEFORE[0], *self.varied, *BEFORE[1:], *AFTER)
        self.rows: list[Row] = []
        self.torn = False
        if path.exists():
            self._read()

    def _read(self) -> None:
        # A line without its end was cut short, and its figures may be too.
        text = path_text = self.path.read_text()
        if text and not text.endswith("\n"):
            path_text = text[: text.rfind("\n") + 1]
            self.torn = True
        reader = csv.DictReader(io.StringIO(path_text))
        found = tuple(reader.fieldnames or ())
        # Without the values that vary a row cannot be told from another; figures may be added.
        fixed = {*BEFORE, *AFTER}
        others = tuple(name for name in found if name not in fixed)
        if found and (others != self.varied or not {"seed", "status", "settings_hash"} <= {*found}):
            raise ValueError(
                f"{self.path}: its rows vary {', '.join(others) or 'nothing'}, this sweep varies "
                f"{', '.join(self.varied) or 'nothing'}; give another --output"
            )
        self.rows = [{k: v or "" for k, v in row.items() if k is not None} for row in reader]

    def key(self, row: Row) -> tuple[str, ...]:
        """Return what a row is found by, as `PlannedRun.key`."""
        return tuple(row[name] for name in (*self.varied, "seed"))

    def finished(self, run: PlannedRun) -> bool:
        """Say whether a run has its row. Raises ValueError where that has other settings."""
        for row in self.rows:
            if self.key(row) == run.key and row["status"] == FINISHED:
                if row["settings_hash"] != run.settings_hash:
                    raise ValueError(
                        f"{self.path}: the row {row['run']} was measured with other settings "
                        f"(hash {row['settings_hash']}, now {run.settings_hash}); restore them, "
                        "remove its line to measure it again, or give another --output"
                    )
                return True
        return False

    def put(self, row: Row) -> None:
        """Add a row in place of an earlier one of the same run, and write the file."""
        # A second attempt replaces the row of a failed one.
        self.rows = [old for old in self.rows if self.key(old) != self.key(row)] + [row]
        text = io.StringIO()
        writer = csv.DictWriter(text, self.columns, restval="", lineterminator="\n")
        writer.writeheader()
        writer.writerows(self.rows)
        write_text(self.path, text.getvalue())

    def lines(self) -> list[str]:
        """Return the table for a terminal: what varies, the rate, the distortion, use of z."""
        shown = ("kl", "nll_q", "neg_elbo", "cost_shuffled", "mutual_information", "baseline_nll")
        head = [*self.varied, "seed", *shown, "status"]
        body = [
            [*self.key(row), *(_number(row.get(name, "")) for name in shown), _status(row)]
            for row in sorted(self.rows, key=lambda row: _sortable(self.key(row)))
        ]
        # Columns as wide as their longest cell; the last one may be a whole error.
        widths = [max(len(line[column]) for line in [head, *body]) for column in range(len(head))]
        return [
            "  ".join(
                [cell.rjust(width) for cell, width in zip(line[:-1], widths[:-1], strict=True)]
                + [line[-1]]
            )
            for line in [head, *body]
        ]


def _number(text: str) -> str:
    return f"{float(text):.3f}" if text else "-"


def _status(row: Row) -> str:
    return row["status"] + (f": {row['last_line']}" if row["status"] == FAILED else "")


def _sortable(values: Iterable[str]) -> list[tuple[int, float, str]]:
    """Order numbers by value, and texts after them."""
    found = []
    for value in values:
        try:
            found.append((0, float(value), value))
        except ValueError:
            found.append((1, 0.0, value))
    return found
