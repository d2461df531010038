"""Old names of settings: accepted everywhere, one line of notice, and never written again."""

from __future__ import annotations

import json

import pytest

from cdpvae.command_line import parse_settings_and
from cdpvae.config import (
    DataConfig,
    GaussianConfig,
    LossConfig,
    ModelConfig,
    NoLatentConfig,
    Settings,
    SettingsError,
    load_settings,
    parse_settings,
)
from cdpvae.config.renames import RENAMES, print_notice
from cdpvae.train import TrainOptions

# Every old key with a value that is not the default, and the settings that it stands for.
OLD_KEYS = {
    "model.no_latent": (True, {"model": {"latent": {"kind": "none"}}}),
    "model.latent_dim": (9, {"model": {"latent": {"kind": "gaussian", "latent_dim": 9}}}),
    "model.logvar_init_bias": (
        -1.0,
        {"model": {"latent": {"kind": "gaussian", "logvar_init_bias": -1.0}}},
    ),
    "model.logvar_clamp": (3.0, {"model": {"latent": {"kind": "gaussian", "logvar_clamp": 3.0}}}),
    "loss.loss_scale": ("elbo", {"loss": {"objective": "elbo"}}),
    "data.engine": ("ray", {"data": {"executor": "ray"}}),
}

# Every old flag, what was written after it, and the settings that it stands for.
OLD_FLAGS = [
    (["--no-latent"], {"model": {"latent": {"kind": "none"}}}),
    (["--no_latent"], {"model": {"latent": {"kind": "none"}}}),
    (["--no-no-latent"], {}),
    (["--loss-scale", "elbo"], {"loss": {"objective": "elbo"}}),
    (["--loss_scale=elbo"], {"loss": {"objective": "elbo"}}),
    (["--engine", "ray"], {"data": {"executor": "ray"}}),
]


@pytest.fixture(autouse=True)
def notices_not_yet_printed():
    print_notice.cache_clear()


def test_every_rename_is_tested_here():
    assert [rename.old for rename in RENAMES] == list(OLD_KEYS)


def nested(key: str, value) -> dict:
    group, name = key.split(".")
    return {group: {name: value}}


def parse(*argv: str) -> Settings:
    return parse_settings_and(TrainOptions, "test", argv)[0]


@pytest.mark.parametrize("key", OLD_KEYS)
def test_an_old_key_is_its_new_form(key, capsys):
    value, new = OLD_KEYS[key]
    expected = parse_settings(new)
    assert expected != Settings() and capsys.readouterr().err == ""
    settings = parse_settings(nested(key, value), source="old.json")
    assert settings == expected
    said = capsys.readouterr().err
    assert said.startswith(f"notice: old.json: {key} is now ") and said.count("\n") == 1


@pytest.mark.parametrize("key", OLD_KEYS)
def test_what_is_written_has_the_new_form_only(key):
    dumped = json.loads(parse_settings(nested(key, OLD_KEYS[key][0])).dump())
    group, name = key.split(".")
    assert name not in dumped[group]
    assert parse_settings(dumped) == parse_settings(OLD_KEYS[key][1])


@pytest.mark.parametrize(("argv", "new"), OLD_FLAGS, ids=lambda value: str(value))
def test_an_old_flag_is_its_new_form(argv, new, capsys):
    assert parse(*argv) == parse_settings(new)
    said = capsys.readouterr().err
    assert said.startswith(f"notice: {argv[0].partition('=')[0]} is now --")
    assert said.count("\n") == 1


def test_a_notice_is_printed_once_and_by_one_rank(capsys, monkeypatch):
    for _ in range(3):
        parse_settings({"loss": {"loss_scale": "elbo"}}, source="a.json")
    assert capsys.readouterr().err == "notice: a.json: loss.loss_scale is now loss.objective\n"
    monkeypatch.setenv("RANK", "1")
    parse_settings({"loss": {"loss_scale": "elbo"}}, source="b.json")
    assert capsys.readouterr().err == ""


def test_constructors_accept_old_keywords_in_silence(capsys):
    assert ModelConfig(latent_dim=32) == ModelConfig(latent=GaussianConfig(latent_dim=32))
    assert ModelConfig(latent_dim=32).latent_dim == 32
    with pytest.raises(ValueError, match="latent.kind=none has no z"):
        _ = ModelConfig(no_latent=True).latent_dim
    assert ModelConfig(no_latent=True) == ModelConfig(latent=NoLatentConfig())
    assert ModelConfig(no_latent=False, logvar_clamp=3.0).latent.logvar_clamp == 3.0
    assert LossConfig(loss_scale="elbo").objective == "elbo"
    assert DataConfig(engine="ray").executor == "ray"
    with pytest.raises(ValueError, match="latent_dim"):
        ModelConfig(latent_dim=0)
    assert capsys.readouterr() == ("", "")


def test_a_whole_file_of_an_older_version(tmp_path, capsys):
    """Old files of a model without latent name the Gaussian's settings, which had no effect."""
    old = json.loads(Settings().dump())
    del old["model"]["latent"]
    old["model"] |= {"latent_dim": 8, "logvar_init_bias": -2.0, "logvar_clamp": 10.0}
    old["loss"]["loss_scale"] = old["loss"].pop("objective")
    old["data"]["engine"] = old["data"].pop("executor")
    path = tmp_path / "settings.json"
    for no_latent, latent in ((False, GaussianConfig(latent_dim=8)), (True, NoLatentConfig())):
        old["model"]["no_latent"] = no_latent
        path.write_text(json.dumps(old))
        assert load_settings(path).model.latent == latent
    with_latent, without = capsys.readouterr().err.splitlines()
    assert all(f"{key} is now" in with_latent for key in OLD_KEYS)
    assert "model.latent.kind=none" in without and "latent_dim" not in without


@pytest.mark.parametrize(
    ("content", "words"),
    [
        (
            {"loss": {"loss_scale": "elbo", "objective": "elbo"}},
            ["loss.loss_scale is the old name of loss.objective", "drop loss.loss_scale"],
        ),
        (
            {"model": {"no_latent": True, "latent": {"kind": "gaussian"}}},
            ["model.no_latent is the old name of model.latent.kind"],
        ),
        ({"model": {"no_latent": "yes"}}, ["model.no_latent='yes'", "true or false"]),
        (
            {"model": {"latent_dim": 8, "latent": {"kind": "none"}}},
            ["unknown key 'model.latent.latent_dim'"],
        ),
        ({"model": {"latent_dim": 0}}, ["model.latent.latent_dim=0", "greater"]),
    ],
)
def test_what_is_wrong_with_an_old_key_is_one_line(content, words):
    with pytest.raises(SettingsError) as refused:
        parse_settings(content)
    assert "\n" not in str(refused.value)
    for word in words:
        assert word in str(refused.value)
