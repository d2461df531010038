"""docs/extending.md, "A loss term", as written: edit a copy of the package, then train.

The term must be weighed, trained, written to `steps.jsonl` and shown in TensorBoard without any
further line.
"""

from __future__ import annotations

import json
import re
import shutil
import sys
import textwrap
from pathlib import Path

import pytest
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from support.runs import REPOSITORY, merged, run_command

PAGE = REPOSITORY / "docs" / "extending.md"
STEPS, WEIGHT = 8, 2.0


def blocks() -> dict[str, list[str]]:
    """Code blocks of the recipe by the file they are for."""
    recipe = PAGE.read_text().split("## A loss term")[1].split("\n## ")[0]
    parts = re.split(r"^ {3}`(cdpvae/[\w/]+\.py)`$", recipe, flags=re.MULTILINE)
    found = {}
    for file, text in zip(parts[1::2], parts[2::2], strict=True):
        code = re.findall(r"^ {3}```python\n(.*?)^ {3}```$", text, re.MULTILINE | re.DOTALL)
        found[file] = [textwrap.indent(textwrap.dedent(c), indent_of(c)) for c in code]
    return found


def indent_of(code: str) -> str:
    """The indentation beyond the list's own three spaces."""
    return " " * (len(code) - len(code.lstrip(" ")) - 3)


def insert(path: Path, after: str, code: str) -> None:
    """Put lines behind the first line that contains `after`."""
    lines = path.read_text().splitlines(keepends=True)
    number = next(i for i, line in enumerate(lines) if after in line)
    path.write_text("".join([*lines[: number + 1], code, *lines[number + 1 :]]))


@pytest.fixture
def extended(tmp_path) -> Path:
    """A copy of the package with the page's edits: a file, a setting, a line and its import."""
    shutil.copytree(REPOSITORY / "cdpvae", tmp_path / "cdpvae")
    shutil.copytree(REPOSITORY / "ds_configs", tmp_path / "ds_configs")
    edits = blocks()
    assert sorted(edits) == [
        "cdpvae/config/loss.py",
        "cdpvae/loss/anchor_norm.py",
        "cdpvae/loss/objective.py",
    ]
    (tmp_path / "cdpvae/loss/anchor_norm.py").write_text(edits["cdpvae/loss/anchor_norm.py"][0])
    insert(tmp_path / "cdpvae/config/loss.py", "group: ", edits["cdpvae/config/loss.py"][0])
    import_line, entry = edits["cdpvae/loss/objective.py"]
    objective = tmp_path / "cdpvae/loss/objective.py"
    insert(objective, "from cdpvae.config import Settings", import_line)
    insert(objective, "Rate.of(loss),", entry)
    return tmp_path


def test_a_term_is_one_file_one_setting_one_line(extended, small_settings, tmp_path):
    settings = merged(
        small_settings,
        loss={"contrastive_weight": 0.0},
        augmentation={"augmentation_probability": 0.0},
        collapse={"enable_collapse_monitoring": False},
        training={"max_steps": STEPS, "logging_steps": 1, "eval_rows": 0},
    )
    (tmp_path / "settings.json").write_text(json.dumps(settings))
    paths = f"{extended}:{REPOSITORY / 'kernels'}"
    command = [sys.executable, "-m", "cdpvae.train", "--config", "settings.json"]
    command += ["--anchor-norm-weight", str(WEIGHT), "--output-dir", "run"]
    done = run_command(command, cwd=tmp_path, variables={"PYTHONPATH": paths})
    assert done.returncode == 0, done.stderr[-3000:]

    lines = [json.loads(line) for line in (tmp_path / "run/steps.jsonl").read_text().splitlines()]
    norms = [line["anchor_norm"] for line in lines]
    # It counts: beta is 0 in the first step, so the total is these three.
    first = lines[0]
    assert norms[0] > 0
    expected = first["recon"] + 1.5 * first["bow"] + WEIGHT * norms[0]
    assert first["total"] == pytest.approx(expected, rel=1e-5)
    # It is trained on: the vectors shrink.
    assert norms[-1] < norms[0] / 2
    # It is shown, with its gradient at the anchor.
    board = EventAccumulator(str(tmp_path / "run/logs"), size_guidance={"scalars": 0})
    board.Reload()
    shown = [event.value for event in board.Scalars("train/anchor_norm")]
    assert shown == pytest.approx(norms, rel=1e-6)
    assert len(board.Scalars("grad_norm_at_mu/anchor_norm")) == STEPS
