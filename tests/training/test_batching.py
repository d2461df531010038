"""Runs whose micro-batches have a budget of tokens, and runs on a stream of records."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from support.runs import merged, sentences, train

pytestmark = pytest.mark.launch

STEPS, STOP = 6, 4
TOKENS = {"batching": "tokens", "tokens_per_micro_batch": 300, "max_steps": STEPS}


def curve(directory: Path) -> list[dict]:
    lines = (directory / "run" / "steps.jsonl").read_text().splitlines()
    return [json.loads(line) for line in lines]


def run(ranks: int, settings: dict, directory: Path, *flags: str, port: int) -> str:
    kind = "torchrun" if ranks > 1 else "python"
    done = train(kind, ranks, settings, directory, *flags, port=port)
    assert done.returncode == 0, done.stderr[-3000:]
    return done.stdout


def test_a_token_budget_trains_on_two_ranks_and_resumes(small_settings, tmp_path):
    """Row counts differ between micro-batches while the losses gather over ranks."""
    settings = merged(
        small_settings,
        training=TOKENS,
        loss={"queue_size": 24},
        augmentation={"augmentation_probability": 0.7},
    )
    out = run(2, settings, tmp_path / "whole", port=29681)
    assert "4 micro-batches of at most 300 tokens a step" in out
    run(2, settings, tmp_path / "cut", "--stop-after", str(STOP), port=29682)
    run(2, settings, tmp_path / "cut", "--resume", "latest", "--prefetch", "0", port=29683)
    whole = curve(tmp_path / "whole")
    assert curve(tmp_path / "cut") == whole and len(whole) == STEPS
    assert all(line["total"] == line["total"] and line["kl_raw"] > 0 for line in whole)


@pytest.mark.slow
def test_a_stream_trains_and_resumes(small_settings, tmp_path):
    source = tmp_path / "pairs.jsonl"
    source.write_text("".join(json.dumps(row) + "\n" for row in sentences(60)))
    settings = merged(small_settings, training={"max_steps": STEPS, "per_device_batch_size": 5})
    settings["data"] = {
        "streaming": True,
        "input": [str(source)],
        "min_instruction_tokens": 3,
        "min_response_tokens": 5,
        "language_filter": False,
        "quality_filter": False,
    }
    out = run(1, settings, tmp_path / "whole", port=29684)
    assert "10 rows a step, streamed from pairs.jsonl" in out
    assert "streaming gave " in out
    run(1, settings, tmp_path / "cut", "--stop-after", str(STOP), port=29685)
    run(1, settings, tmp_path / "cut", "--resume", "latest", port=29686)
    assert curve(tmp_path / "cut") == curve(tmp_path / "whole")


@pytest.mark.parametrize(
    ("data", "training", "words"),
    [
        pytest.param({}, {"max_steps": None}, "streaming=true needs max_steps", id="no_end"),
        pytest.param({}, TOKENS, "batching='tokens' needs all lengths", id="unknown_lengths"),
        pytest.param(
            {"decontaminate": ["test.jsonl"]}, {}, "has no effect with streaming=true", id="idle"
        ),
        pytest.param(
            {"validation_input": ["valid.jsonl"]},
            {},
            r"validation_input=\['valid.jsonl'\] has no effect with streaming=true",
            id="split",
        ),
    ],
)
def test_what_a_stream_cannot_do_is_refused_before_training(
    small_settings, tmp_path, data, training, words
):
    from cdpvae.config import parse_settings
    from cdpvae.tasks.text_vae.loading import build_loader

    settings = merged(small_settings, training=training, data={"streaming": True, **data})
    with pytest.raises(ValueError, match=words):
        build_loader(parse_settings(settings), world=None, tokenizer=None, splits={})
