"""Learning rates of parts: which groups they reach, what a rate of 0 leaves as it is, resuming."""

from __future__ import annotations

import json

import pytest
import torch
from safetensors.torch import load_file

from cdpvae.config import SettingsError, TrainingConfig, parse_settings
from cdpvae.data import LlamaTokenizerWrapper
from cdpvae.tasks.text_vae.setup import load_model
from cdpvae.training.optimizer import (
    build_optimizer,
    build_scheduler,
    freeze_parts,
    parameter_groups,
    part_of,
)
from support.runs import merged, train

# Every part there is.
ALL_PARTS = {
    "encoder": "lora",
    "encoder_layer": "mix",
    "deep_prefix": True,
    "prefix_hidden_dim": 16,
    "prefix_bottleneck_dim": 8,
    "positional_slots": 4,
}
STEPS, STOP = 4, 2
FROZEN = {"pooling": 0, "latent": 0}


def make_model(settings: dict, **model):
    parsed = parse_settings(merged(settings, model=model))
    tokenizer = LlamaTokenizerWrapper.from_pretrained(parsed.model.backbone)
    return parsed.model, load_model(parsed, tokenizer)


@pytest.mark.parametrize(
    "changes",
    [{}, ALL_PARTS, {"latent": {"kind": "none"}}],
    ids=["as shipped", "every part", "no latent"],
)
def test_the_settings_name_exactly_the_parts_of_the_model(small_settings, changes):
    config, model = make_model(small_settings, **changes)
    trained = [name for name, p in model.named_parameters() if p.requires_grad]
    assert set(config.parts) == {part_of(name) for name in trained}
    # The engine sees the model inside a module of its own.
    assert set(config.parts) == {part_of(f"model.{name}") for name in trained}


def test_without_rates_of_parts_the_groups_are_those_of_before(small_settings):
    """Their order and names are those of the optimizer's state in every checkpoint so far."""
    _, model = make_model(small_settings, **ALL_PARTS)
    groups = parameter_groups(model, TrainingConfig(lora_learning_rate=1e-3))
    assert [(group["name"], group["lr"]) for group in groups] == [
        ("heads_no_decay", 2e-4),
        ("heads", 2e-4),
        ("lora", 1e-3),
    ]
    expected = {name for name, p in model.named_parameters() if p.requires_grad and "lora_" in name}
    names = {id(p): name for name, p in model.named_parameters()}
    assert {names[id(p)] for p in groups[2]["params"]} == expected


def test_a_rate_reaches_all_of_its_part_and_nothing_else(small_settings):
    _, model = make_model(small_settings, **ALL_PARTS)
    rates = {"projector": 3e-3, "encoder_lora": 5e-3, "bow_head": 7e-3, "positional": 0.0}
    config = TrainingConfig(part_learning_rates=rates, eta_min=0)
    freeze_parts(model, config)
    optimizer = build_optimizer(parameter_groups(model, config), config)
    scheduler = build_scheduler(optimizer, config, total_steps=100)
    # At the top of the warm-up every group has its own rate.
    for _ in range(10):
        optimizer.step()
        scheduler.step()
    rate = {id(p): group["lr"] for group in optimizer.param_groups for p in group["params"]}
    for name, parameter in model.named_parameters():
        part = part_of(name)
        # The base weights belong to the backbone, and are in no group either.
        if part in ("backbone", "positional"):
            assert not parameter.requires_grad and id(parameter) not in rate, name
        else:
            assert rate[id(parameter)] == pytest.approx(rates.get(part, 2e-4)), name
    # The first group's rate is what a step logs: that of the parts without one of their own.
    assert optimizer.param_groups[0]["name"] == "heads_no_decay"


@pytest.mark.parametrize(
    ("content", "words"),
    [
        ({"training": {"part_learning_rates": {"poling": 0}}}, ["'poling'", "pooling, latent"]),
        ({"training": {"part_learning_rates": {"positional": 0}}}, ["'positional'", "drop it"]),
        ({"training": {"part_learning_rates": {"latent": -1}}}, ["part_learning_rates", "-1"]),
        (
            {"training": {"part_learning_rates": {"lora": 0}, "lora_learning_rate": 1e-3}},
            ["lora_learning_rate=0.001", "'lora'", "drop one"],
        ),
    ],
)
def test_refused_in_one_line(content, words):
    with pytest.raises(SettingsError) as refused:
        parse_settings(content)
    message = str(refused.value)
    assert "\n" not in message and all(word in message for word in words), message


def test_the_baseline_of_a_recipe_keeps_the_rate_of_lora_alone():
    rates = {"pooling": 0, "lora": 1e-3}
    content = {"model": {"latent": {"kind": "none"}}, "training": {"part_learning_rates": rates}}
    assert parse_settings(content).training.part_learning_rates == {"lora": 1e-3}


@pytest.fixture(scope="module")
def run(small_settings, tmp_path_factory):
    """A run whose pooling and posterior stay as they start, stopped half way and continued."""
    directory = tmp_path_factory.mktemp("parts")
    settings = merged(small_settings, training={"max_steps": STEPS})
    rates = [word for part, rate in FROZEN.items() for word in (part, str(rate))]
    flags = ("--part-learning-rates", *rates)
    for more in (("--stop-after", str(STOP)), ("--resume", "latest")):
        done = train("python", 1, settings, directory, *flags, *more)
        assert done.returncode == 0, done.stderr[-3000:]
    whole = train("python", 1, settings, directory / "whole", *flags)
    assert whole.returncode == 0, whole.stderr[-3000:]
    return directory, settings


def test_a_rate_of_0_leaves_every_bit_of_its_part_and_the_others_move(run, small_settings):
    directory, _ = run
    _, model = make_model(small_settings)
    start = model.state_dict()
    end = load_file(directory / "run" / f"checkpoint-{STEPS}" / "heads.safetensors")
    moved: dict[str, set[bool]] = {}
    for name, tensor in end.items():
        moved.setdefault(part_of(name), set()).add(not torch.equal(tensor, start[name]))
    assert moved == {"pooling": {False}, "latent": {False}, "projector": {True}, "bow_head": {True}}
    assert json.loads((directory / "run" / "settings.json").read_text())["training"][
        "part_learning_rates"
    ] == {"pooling": 0.0, "latent": 0.0}


def test_a_run_with_a_frozen_part_continues_bit_for_bit(run):
    directory, _ = run
    for name in (f"checkpoint-{STEPS}/heads.safetensors", "steps.jsonl"):
        ours, theirs = (directory / p / "run" / name for p in (".", "whole"))
        assert ours.read_bytes() == theirs.read_bytes(), name


@pytest.mark.parametrize(
    "flags",
    [("--part-learning-rates", "pooling", "0.01", "latent", "0"), ()],
    ids=["another rate", "none"],
)
def test_a_continuation_keeps_the_rates(run, flags):
    directory, settings = run
    done = train("python", 1, settings, directory, "--resume", "latest", *flags)
    assert done.returncode != 0
    lines = done.stderr.strip().splitlines()
    assert len([line for line in lines if line.startswith("error: ")]) == 1
    assert "part-learning-rates" in done.stderr or "part_learning_rates.pooling" in done.stderr
    assert "a continuation keeps it" in done.stderr
