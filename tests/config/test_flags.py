"""Settings on the command line: flags, families, help, and one line for whatever is wrong."""

from __future__ import annotations

import dataclasses
import json
import re
from collections import Counter

import pytest

from cdpvae.command_line import parse_settings_and
from cdpvae.config import GaussianConfig, NoLatentConfig, Settings, SettingsError, all_settings
from cdpvae.config import load_settings as load
from cdpvae.config.flags import in_flags
from cdpvae.preprocess import READS, PreprocessOptions
from cdpvae.train import TrainOptions
from support.runs import REPOSITORY


def parse(*argv: str) -> Settings:
    return parse_settings_and(TrainOptions, "test", argv)[0]


def parse_for_preprocessing(*argv: str) -> Settings:
    return parse_settings_and(PreprocessOptions, "test", argv, READS)[0]


def shown(capsys, parse, *argv: str) -> set[str]:
    """The flags that --help lists."""
    with pytest.raises(SystemExit) as done:
        parse(*argv, "--help")
    assert done.value.code == 0
    return set(re.findall(r"^[│ ]*(--[a-z][a-z0-9-]+)", capsys.readouterr().out, re.MULTILINE))


def test_flags_are_unique():
    """Flags carry no group, so two settings must not share one; nor a command's own flags."""
    flags = Counter(setting.flag for setting in all_settings())
    options = [field.name for kind in (TrainOptions, PreprocessOptions) for field in fields(kind)]
    flags.update(["--config", "--print-config", "--help", *options])
    assert [flag for flag, count in flags.items() if count > 1] == []
    # A switch's negative form is a flag as well.
    negative = {"--no-" + s.flag.removeprefix("--") for s in all_settings() if s.annotation is bool}
    assert negative & flags.keys() == set()


def fields(kind: type) -> tuple[dataclasses.Field, ...]:
    return dataclasses.fields(kind)


@pytest.mark.parametrize("family", ["gaussian", "none"])
def test_help_lists_every_setting_of_the_family(capsys, family):
    expected = {s.flag for s in all_settings() if s.family in (None, family)}
    assert shown(capsys, parse, "--latent", family) == expected


def test_preprocessing_shows_what_it_reads_and_no_more(capsys):
    data = {s.flag for s in all_settings() if s.path[0] == "data"}
    expected = data | {"--backbone", "--tokenizer", "--overwrite"}
    assert shown(capsys, parse_for_preprocessing) == expected


@pytest.mark.parametrize("flag", ["--beta-max", "--latent", "--latent-dim", "--no-deep-prefix"])
def test_preprocessing_refuses_a_setting_of_training(flag):
    with pytest.raises(SettingsError, match="this command does not read it") as refused:
        parse_for_preprocessing(flag, "1")
    assert flag.replace("--no-", "--") in str(refused.value) and "\n" not in str(refused.value)


def test_preprocessing_takes_a_whole_file_and_prints_it(capsys, tmp_path):
    """Groups that preprocessing does not read are validated, kept and printed."""
    path = tmp_path / "settings.json"
    path.write_text(json.dumps({"loss": {"beta_max": 0.25}, "data": {"phase": 2}}))
    with pytest.raises(SystemExit):
        parse_for_preprocessing("--config", str(path), "--max-samples", "7", "--print-config")
    path.write_text(capsys.readouterr().out)
    settings = load(path)
    found = settings.loss.beta_max, settings.data.phase, settings.data.max_samples
    assert found == (0.25, 2, 7)
    path.write_text(json.dumps({"loss": {"beta_max": -1.0}}))
    with pytest.raises(SettingsError, match="loss.beta_max=-1.0"):
        parse_for_preprocessing("--config", str(path))


def test_flags_override_the_file(tmp_path):
    path = tmp_path / "custom.json"
    path.write_text(json.dumps({"training": {"learning_rate": 0.5, "seed": 3}}))
    settings = parse("--config", str(path), "--learning-rate", "0.25", "--phase", "2")
    assert settings.training.learning_rate == 0.25
    assert settings.training.seed == 3
    assert settings.data.phase == 2


def test_a_family_keeps_the_files_values_and_starts_at_its_defaults(tmp_path):
    path = tmp_path / "custom.json"
    latent = {"kind": "gaussian", "latent_dim": 9, "logvar_clamp": 3.0}
    path.write_text(json.dumps({"model": {"latent": latent}}))
    same = parse("--config", str(path), "--latent", "gaussian", "--latent-dim", "7")
    assert same.model.latent == GaussianConfig(latent_dim=7, logvar_clamp=3.0)
    assert parse("--config", str(path), "--latent=none").model.latent == NoLatentConfig()
    path.write_text(json.dumps({"model": {"latent": {"kind": "none"}}}))
    assert parse("--config", str(path)).model.latent == NoLatentConfig()
    other = parse("--config", str(path), "--latent", "gaussian", "--latent_dim", "7")
    assert other.model.latent == GaussianConfig(latent_dim=7)


def test_short_flags_of_the_description():
    settings = parse("--phase", "1", "--max-samples", "10000", "--memory-efficient")
    assert settings.data.max_samples == 10000
    assert settings.loss.contrastive_weight == 0.0
    assert settings.augmentation.augmentation_probability == 0.0


@pytest.mark.parametrize(
    ("argv", "words"),
    [
        (["--lerning-rate", "1"], ["--lerning-rate", "--learning-rate"]),
        (["--learning-rate", "fast"], ["--learning-rate", "fast"]),
        (["--learning-rate", "nan"], ["--learning-rate nan", "finite"]),
        (["--phase", "7"], ["7", "1", "2", "3"]),
        (["--latent-dim", "0"], ["--latent-dim 0", "greater"]),
        (["--latent", "vq"], ["--latent", "vq", "gaussian", "none"]),
        (
            ["--latent", "none", "--latent-dim", "8"],
            ["--latent-dim has no effect with --latent none", "--latent gaussian"],
        ),
        (
            ["--deep-prefix", "--latent", "none"],
            ["--deep-prefix has no effect with --latent none"],
        ),
        (
            ["--contrastive-weight", "0.2", "--augmentation-probability", "0"],
            ["--contrastive-weight 0.2", "--augmentation-probability 0"],
        ),
        (
            ["--languages", "de", "fr", "--no-language-filter"],
            ["--languages de fr has no effect with --no-language-filter"],
        ),
        (["--batching", "tokens"], ["--batching tokens needs --tokens-per-micro-batch"]),
        (["--eta-min", "1"], ["--eta-min 1.0", "--learning-rate 0.0002"]),
        (["--config", "nowhere.json"], ["nowhere.json"]),
        (["--config"], ["--config"]),
    ],
)
def test_a_wrong_command_line_is_one_line(argv, words):
    with pytest.raises(SettingsError) as refused:
        parse(*argv)
    assert "\n" not in str(refused.value) and "│" not in str(refused.value)
    for word in words:
        assert word in str(refused.value)


@pytest.mark.parametrize(
    ("message", "expected"),
    [
        ("model.latent.latent_dim=0: too small", "--latent-dim 0: too small"),
        ("data: max_instruction_tokens=1 is low", "--max-instruction-tokens 1 is low"),
        # word_dropout begins word_dropout_rate, and min_word_dropout ends in it.
        ("word_dropout_rate=2, min_word_dropout=3", "--word-dropout-rate 2, --min-word-dropout 3"),
        # Names that are also words stay words, as long as no value follows.
        ("no format of the input; format=text", "no format of the input; --format text"),
        ("language_filter=false; deep_prefix=true", "--no-language-filter; --deep-prefix"),
        ("runs/no_such.latent_dim.json is missing", "runs/no_such.latent_dim.json is missing"),
    ],
)
def test_messages_name_settings_as_flags(message, expected):
    assert in_flags(message) == expected


def test_print_config_round_trips(capsys, tmp_path):
    with pytest.raises(SystemExit) as done:
        parse("--print-config", "--latent", "none", "--seed", "3")
    assert done.value.code == 0
    path = tmp_path / "printed.json"
    path.write_text(capsys.readouterr().out)
    settings = load(path)
    assert settings.model.latent == NoLatentConfig() and settings.training.seed == 3
    assert settings.loss.beta_max == 0.0


def test_a_printed_file_is_the_shipped_one(capsys):
    """description.json is what no flag at all prints, key by key and in the same order."""
    with pytest.raises(SystemExit):
        parse("--print-config")
    shipped = (REPOSITORY / "cdpvae" / "configs" / "description.json").read_text()
    assert json.dumps(json.loads(shipped)) == json.dumps(json.loads(capsys.readouterr().out))
