"""docs/one_step.md lists the way of a batch; one tiny step must go that way."""

from __future__ import annotations

import json
import re
import sys

from support.runs import REPOSITORY, merged, run_command

PAGE = REPOSITORY / "docs" / "one_step.md"
WORKER = REPOSITORY / "tests" / "tasks" / "text_vae" / "trace_worker.py"


def documented() -> list[str]:
    """`file:function` of every row of the page, in order."""
    return re.findall(r"^\| `([\w/.]+:[\w.<>]+)`", PAGE.read_text(), re.MULTILINE)


def test_the_page_lists_the_way_of_a_batch(small_settings, tmp_path):
    """Every function of the page is called in a step, and first called in the page's order."""
    settings = merged(
        small_settings,
        augmentation={"augmentation_probability": 1.0},
        collapse={"check_every": 1},
        training={
            "max_steps": 2,
            "stop_after": 1,
            "logging_steps": 1,
            "eval_rows": 0,
            "prefetch": 0,
            "output_dir": str(tmp_path / "run"),
        },
    )
    (tmp_path / "settings.json").write_text(json.dumps(settings))
    trace = tmp_path / "trace.json"
    done = run_command([sys.executable, str(WORKER), str(tmp_path / "settings.json"), str(trace)])
    assert done.returncode == 0, done.stderr[-3000:]
    called = {name: number for number, name in enumerate(json.loads(trace.read_text()))}
    listed = documented()
    assert len(listed) > 20
    assert [name for name in listed if name not in called] == []
    assert listed == sorted(listed, key=called.__getitem__)
