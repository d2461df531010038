"""The plan of a sweep: the product, its names and hashes, and what is refused before training."""

from __future__ import annotations

from pathlib import Path

import pytest

from cdpvae.config import Settings, SettingsError, parse_settings
from cdpvae.experiments.plan import make_plan, parse_seeds, parse_varied, settings_hash


def plan(*vary: str, seeds=(0,), base: Settings | None = None):
    varied = [parse_varied(text) for text in vary]
    return make_plan(base or Settings(), varied, seeds, Path("out"), "rows 8")


def test_the_product_of_settings_and_seeds():
    runs = plan("loss.beta_max=0.5,2", "model.num_soft_tokens=4,8", seeds=(3, 7))
    found = [
        (r.settings.loss.beta_max, r.settings.model.num_soft_tokens, r.settings.training.seed)
        for r in runs
    ]
    assert found == [(b, n, s) for b in (0.5, 2.0) for n in (4, 8) for s in (3, 7)]
    assert len({run.name for run in runs}) == len({run.settings_hash for run in runs}) == 8
    assert {run.settings.training.output_dir for run in runs} == {
        f"out/runs/{r.name}" for r in runs
    }
    # What does not vary stays as the base has it.
    assert {run.settings.loss.free_bits for run in runs} == {Settings().loss.free_bits}


@pytest.mark.parametrize(
    ("text", "values"),
    [
        ("loss.beta_max=4,8", (4.0, 8.0)),
        ("loss.bow_reduction=bce,categorical", ("bce", "categorical")),
        ("training.max_steps=5,null", (5, None)),
        ("model.deep_prefix=true,false", (True, False)),
        # A comma inside a list separates no values.
        ('model.lora_target_modules=["q_proj","v_proj"],["o_proj"]', None),
        # A text that reads as a number stays a text.
        ("model.backbone=123", ("123",)),
    ],
)
def test_values_are_read_by_the_type_of_the_setting(text, values):
    found = parse_varied(text).values
    if values is None:
        assert [list(value) for value in found] == [["q_proj", "v_proj"], ["o_proj"]]
    else:
        assert found == values
        assert [type(value) for value in found] == [type(value) for value in values]


def test_a_varied_family_brings_its_own_defaults():
    with_z, without = plan("model.latent.kind=gaussian,none")
    assert with_z.settings.model.latent.latent_dim == 64
    assert without.settings.model.latent.kind == "none"


@pytest.mark.parametrize(
    ("vary", "words"),
    [
        (["loss.beta_mx=1,2"], ["loss.beta_mx", "loss.beta_max"]),
        (["loss.beta_max"], ["KEY=V1,V2"]),
        (["loss.beta_max="], ["KEY=V1,V2"]),
        (["loss.beta_max=one"], ["'one'", "number"]),
        (["loss.beta_max=1,-1"], ["beta_max=-1", "greater than or equal"]),
        (["loss.beta_max=1,1.0"], ["twice"]),
        (["loss.beta_max=1", "loss.beta_max=2"], ["twice"]),
        (["training.seed=1,2"], ["--seeds"]),
        (["loss.contrastive_weight=0", "loss.queue_size=8"], ["queue_size=8"]),
    ],
)
def test_a_mistake_is_one_line_before_anything_runs(vary, words):
    with pytest.raises(SettingsError) as error:
        plan(*vary)
    assert "\n" not in str(error.value)
    for word in words:
        assert word in str(error.value)


@pytest.mark.parametrize("text", ["", "1,1", "a", "-1", "1,"])
def test_seeds_that_are_refused(text):
    with pytest.raises(SettingsError, match="--seeds"):
        parse_seeds(text)


def test_the_hash_changes_with_what_decides_the_figures_alone():
    def hashed(measured="rows 8", **groups):
        return settings_hash(parse_settings(groups), measured)

    base = hashed()
    # A setting at its default, and those that change no figure.
    assert hashed(loss={"beta_max": Settings().loss.beta_max}) == base
    assert hashed(training={"output_dir": "elsewhere", "save_steps": 7}) == base
    assert hashed(loss={"free_bits": 0.25}) != base
    assert hashed(training={"max_steps": 10}) != base
    assert hashed(measured="rows 9") != base


def test_values_that_no_file_name_can_hold_keep_their_runs_apart():
    names = [run.name for run in plan("model.backbone=a/b,a:b")]
    assert len({*names}) == 2 and not any("/" in name for name in names)
