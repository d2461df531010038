"""The table of the monitor: its kinds, how a run is judged, what is trained again and what not."""

from __future__ import annotations

import json
import re
import shlex
from pathlib import Path

import pytest
import torch
from transformers import LlamaForCausalLM

from benchmarks.monitor import MonitorOptions, Table, finished_rows, main, plan_run
from benchmarks.support import monitor_kinds
from benchmarks.support.monitor_kinds import KINDS, make_trained_decoder, settings_of
from benchmarks.support.monitor_rows import Watch, summary, verdict
from cdpvae.config import parse_settings
from cdpvae.data import LlamaTokenizerWrapper
from cdpvae.experiments.runs import RunFailed, Trained
from cdpvae.models.text_vae import Backbone, LlamaSoftPromptVAE
from cdpvae.train import TrainOptions
from support.runs import REPOSITORY


@pytest.mark.parametrize(
    ("cost", "kl", "expected"),
    [
        (0.499, 0.1, "collapsed"),
        (0.0, 36.0, "collapsed"),
        # Half a nat is the border of both words.
        (0.5, 0.9, "healthy"),
        (0.5, 1.0, "neither"),
        (24.0, 36.0, "healthy"),
        (12.0, 36.0, "neither"),
    ],
)
def test_a_run_is_judged_by_the_definition_of_the_issue(cost, kl, expected):
    assert verdict(cost, kl) == expected


def check(step: int, use: float, *, judged: bool, fired: bool = False) -> dict:
    return {"step": step, "use": use, "use_counts": float(judged), "is_collapsing": fired}


def settings(steps: int = 400):
    """Settings of a run that is never started."""
    places = {"backbone": "backbone", "processed": "processed", "output": "run"}
    return settings_of({}, **places, steps=steps, seed=0, ranks=1)


def test_the_watch_reads_the_first_firing_and_the_judged_uses():
    checks = [
        # Low before the grace period is over: nothing to be learnt of the monitor.
        check(120, -0.5, judged=False),
        check(140, 0.2, judged=True),
        check(160, 0.1, judged=True, fired=True),
        check(180, 0.4, judged=True, fired=True),
    ]
    watch = Watch.of(checks, settings())
    # A third of 400 steps.
    assert watch == Watch(grace_steps=133, first_firing=160, least_use=0.1, last_use=0.4)
    assert watch.steps_after_grace == 27


def test_a_watch_without_a_firing_or_a_judged_check():
    watch = Watch.of([check(20, 0.2, judged=False)], settings())
    assert watch.first_firing is watch.steps_after_grace is watch.least_use is None
    with pytest.raises(ValueError, match=r"checks\.jsonl holds no use of z"):
        Watch.of([{"step": 20, "is_collapsing": False}], settings())


class Faked:
    """A trainer that writes canned checks, and what is measured of its runs."""

    def __init__(self) -> None:
        self.trained: list[str] = []
        self.failing = ""

    def train(self, run, device) -> Trained:
        self.trained.append(run.name)
        if self.failing and self.failing in run.name:
            raise RunFailed("error: no space\nleft")
        directory = Path(run.settings.training.output_dir)
        directory.mkdir(parents=True)
        fires = "high_beta" in run.name
        checks = [check(20, 0.1, judged=False), check(40, 0.2, judged=True, fired=fires)]
        (directory / "checks.jsonl").write_text("".join(json.dumps(c) + "\n" for c in checks))
        steps = run.settings.training.max_steps
        return Trained(directory / f"checkpoint-{steps}", steps, 1.5)

    def measure(self, checkpoint: Path, device) -> dict[str, float]:
        name = checkpoint.parent.name
        cost = 20.0 if "healthy" in name else 3.0 if "helped" in name else 0.01
        return {"cost_shuffled": cost, "cost_shuffled_se": 0.1, "kl": 30.0, "nll_q": 5.0}


def make_table(tmp_path: Path, **options) -> tuple[Table, Faked, list[str]]:
    faked, said = Faked(), []
    own = {"output": str(tmp_path / "runs"), "results": str(tmp_path / "rows.csv"), "steps": 60}
    options = MonitorOptions(**{**own, **options})
    return Table(options, faked.train, faked.measure, said.append), faked, said


def test_only_what_collapsed_is_trained_again_with_interventions(tmp_path):
    table, faked, said = make_table(tmp_path)
    assert table.work(["healthy", "high_beta"], [0])
    assert [name.rpartition("_")[0] for name in faked.trained] == [
        "healthy_seed-0_watched",
        "high_beta_seed-0_watched",
        "high_beta_seed-0_helped",
    ]
    rows = list(finished_rows(tmp_path / "rows.csv").values())
    assert [row["verdict"] for row in rows] == ["healthy", "collapsed", "neither"]
    assert [row["first_firing_step"] for row in rows] == ["", "40", "40"]
    assert [row["steps_after_grace"] for row in rows] == ["", "20", "20"]
    for row in rows:
        assert row["grace_steps"] == "20" and row["steps"] == "60" and row["last_use"] == "0.2"
        assert row["command"].endswith(f"--kinds {row['kind']} --seeds 0 --steps 60 --ranks 1")
        assert str(tmp_path) not in " ".join(row.values())
    assert "false alarms in healthy runs: 0" in said[-1]


def test_finished_rows_are_skipped_and_others_are_not(tmp_path):
    table, faked, _ = make_table(tmp_path)
    table.work(["healthy"], [0])
    table.work(["healthy"], [0])
    assert len(faked.trained) == 1
    # Another place of the same data is no other run; other settings are.
    elsewhere, faked, _ = make_table(tmp_path, shared="somewhere")
    elsewhere.work(["healthy"], [0])
    assert faked.trained == []
    for changed in ({"steps": 80}, {"num_rows": 500}, {"ranks": 2}):
        other, faked, _ = make_table(tmp_path, **changed)
        other.work(["healthy"], [0])
        assert len(faked.trained) == 1, changed


def test_a_failed_run_is_said_left_out_and_made_next_time(tmp_path):
    table, faked, said = make_table(tmp_path)
    faked.failing = "high_beta"
    assert not table.work(["high_beta", "healthy"], [0])
    assert any("failed: error: no space left" in line for line in said)
    assert [key[0] for key in finished_rows(tmp_path / "rows.csv")] == ["healthy"]
    faked.failing = ""
    assert table.work(["high_beta", "healthy"], [0])
    assert [name.split("_seed")[0] for name in faked.trained].count("healthy") == 1


def row(kind: str, seed: int, switch: str, cost: float, lag: str, end: str) -> dict[str, str]:
    values = {"kind": kind, "seed": seed, "interventions": switch, "cost_shuffled": cost}
    return {
        k: str(v) for k, v in {**values, "kl": 4, "steps_after_grace": lag, "verdict": end}.items()
    }


def test_the_summary_says_who_collapsed_who_was_caught_and_who_was_helped():
    rows = [
        row("healthy", 0, "off", 24, "", "healthy"),
        row("healthy", 1, "off", 25, "60", "healthy"),
        # Caught in both seeds, helped in one of two.
        row("high_beta", 0, "off", 0.1, "27", "collapsed"),
        row("high_beta", 0, "on", 4.1, "27", "healthy"),
        row("high_beta", 1, "off", 0.3, "47", "collapsed"),
        row("high_beta", 1, "on", 0.1, "47", "collapsed"),
        # Caught too late; a run with interventions is missing.
        row("no_pressure", 0, "off", 0.0, "107", "collapsed"),
        row("frozen_projector", 0, "off", 3.0, "", "healthy"),
    ]
    lines = summary(rows)
    cells = {line.split()[0]: re.split(r"  +", line)[1:] for line in lines[1:-1]}
    assert cells == {
        "healthy": ["2", "2 healthy", "24.50", "4.00", "1 of 2", "at most 60", "-", "-"],
        "high_beta": ["2", "2 collapsed", "0.20", "4.00", "2 of 2", "at most 47", "2.10", "1 of 2"],
        "no_pressure": ["1", "1 collapsed", "0.00", "4.00", "1 of 1", "at most 107", "-", "-"],
        "frozen_projector": ["1", "1 healthy", "3.00", "4.00", "0 of 1", "-", "-", "-"],
    }
    assert lines[-1] == (
        "false alarms in healthy runs: 1; kinds whose every run collapsed: 2, caught within 100 "
        "steps of the grace: 1, use higher with interventions: 0"
    )


def test_the_healthy_kind_is_what_the_quickstart_trains(tmp_path):
    """What a checkpoint may differ in without another figure aside, as the script itself says."""
    from cdpvae.command_line import parse_settings_and

    script = (REPOSITORY / "launch" / "quickstart.sh").read_text()
    sizes = re.search(r"^sizes=\(\n(.*?)^\)", script, re.MULTILINE | re.DOTALL)[1]
    argv = shlex.split(sizes.replace("$((64 / ranks))", "64"))
    argv += ["--config", str(monitor_kinds.RECOMMENDED), "--max-steps", "400"]
    expected = parse_settings_and(TrainOptions, "test", argv)[0].model_dump()
    found = settings().model_dump()
    assert found["collapse"].pop("collapse_interventions") is False
    assert expected["collapse"].pop("collapse_interventions") is True
    found["model"].pop("backbone"), expected["model"].pop("backbone")
    for name in ("output_dir", "save_steps", "keep_checkpoints", "eval_steps", "sample_rows"):
        found["training"].pop(name), expected["training"].pop(name)
    for name in ("logging_steps", "eval_rows", "sample_max_length"):
        found["training"].pop(name), expected["training"].pop(name)
    for name in ("model", "loss", "augmentation", "collapse", "training"):
        assert found[name] == expected[name], name


@pytest.mark.parametrize("kind", KINDS)
def test_every_kind_has_settings_and_a_hash_of_its_own(kind):
    options = MonitorOptions()
    runs = [plan_run(options, kind, 0), plan_run(options, kind, 0, interventions=True)]
    others = [plan_run(options, other, 0) for other in KINDS if other != kind]
    hashes = [run.planned.settings_hash for run in (*runs, *others)]
    assert len(set(hashes)) == len(hashes)
    assert [r.planned.settings.collapse.collapse_interventions for r in runs] == [False, True]
    assert all(r.planned.settings.collapse.watch_use for r in runs)


@pytest.mark.parametrize(
    ("argv", "words"),
    [
        (["--kinds", "healthy,ill"], "--kinds ill: must be of healthy, frozen_posterior"),
        (["--seeds", "0,0"], "must be different whole numbers"),
        (["--ranks", "3"], "--ranks 3: must divide the 64 rows of a step"),
        (["--shared", "nowhere"], "--shared nowhere: holds no backbone/"),
    ],
)
def test_a_mistake_is_one_line(argv, words, capsys, tmp_path):
    (tmp_path / "backbone").mkdir()
    (tmp_path / "processed").mkdir()
    arguments = ["--shared", str(tmp_path), "--output", str(tmp_path / "out"), *argv]
    assert main(arguments) == 2
    error = capsys.readouterr().err
    assert words in error and error.count("\n") == 1
    assert not (tmp_path / "out").exists()


def test_the_trained_decoder_is_the_base_with_its_lora(backbone_dir, small_settings, tmp_path):
    model = {**small_settings["model"], "latent": {"kind": "none"}}
    config = parse_settings({"model": model}).model
    tokens = LlamaTokenizerWrapper.from_pretrained(backbone_dir).special_tokens()
    vae = LlamaSoftPromptVAE(config, Backbone.load(config, torch.float32), tokens)
    generator = torch.Generator().manual_seed(0)
    lora = {name: p for name, p in vae.named_parameters() if "lora_" in name}
    for parameter in lora.values():
        parameter.data.normal_(0, 0.1, generator=generator)
    vae.save_pretrained(tmp_path / "checkpoint")
    make_trained_decoder(tmp_path / "checkpoint", backbone_dir, tmp_path / "decoder")

    # W + alpha / sqrt(r) B A (rsLoRA), in fp32: one product of rank 4.
    base = LlamaForCausalLM.from_pretrained(backbone_dir).state_dict()
    merged = LlamaForCausalLM.from_pretrained(tmp_path / "decoder").state_dict()
    assert merged.keys() == base.keys()
    adapted = 0
    for name, weight in base.items():
        stem = name.removesuffix(".weight")
        pair = [p.detach() for n, p in lora.items() if f".{stem}.lora_" in n]
        if pair:
            a, b = pair
            weight = weight + config.lora_alpha / config.lora_r**0.5 * b @ a
            adapted += 1
        torch.testing.assert_close(merged[name], weight, rtol=1e-5, atol=1e-5)
    assert adapted == 2 * len(config.lora_target_modules)
    # The processed data belongs to the tokenizer.
    assert (tmp_path / "decoder" / "tokenizer.json").read_bytes() == (
        backbone_dir / "tokenizer.json"
    ).read_bytes()
