"""Settings of the rate: what has no effect is refused in one line with the way out."""

from __future__ import annotations

import pytest

from cdpvae.config import SettingsError, parse_settings

TARGET = {"rate_target": 8.0, "free_bits": 0.0}


UNDROPPED = {"encoder_dropout": 0.0, "pooling_dropout": 0.0}


def latent(**settings) -> dict:
    return {"latent": {"kind": "gaussian", **settings}, **UNDROPPED}


@pytest.mark.parametrize(
    ("content", "words"),
    [
        ({"loss": {"rate_target": 8.0}}, ["free_bits=0.5", "set free_bits to 0"]),
        ({"loss": {**TARGET, "beta_max": 0}}, ["beta_max=0", "above 0"]),
        ({"loss": {**TARGET, "rate_target": 0}}, ["rate_target=0", "greater"]),
        ({"loss": {"free_bits_variant": "rows"}}, ["free_bits_variant='rows'", "sample"]),
        ({"model": latent(posterior="delta")}, ["committed_rate=0.0", "'delta'"]),
        ({"model": latent(committed_rate=0.2)}, ["committed_rate=0.2", "'free'"]),
        (
            {"model": latent(posterior="delta", committed_rate=5.0)},
            ["committed_rate=5.0", "logvar_clamp=10.0", "4.50"],
        ),
        (
            {
                "model": {
                    **latent(posterior="batch_norm", committed_rate=0.1),
                    "pooling_dropout": 0.1,
                }
            },
            ["'batch_norm'", "pooling_dropout=0.1", "set both to 0"],
        ),
        (
            {"model": latent(posterior="batch_norm", committed_rate=0.2), "loss": TARGET},
            ["rate_target=8.0", "12.8"],
        ),
    ],
)
def test_refused(content, words):
    with pytest.raises(SettingsError) as error:
        parse_settings(content)
    message = str(error.value)
    assert "\n" not in message and all(word in message for word in words), message


def test_a_target_beside_a_lower_commitment():
    held = latent(posterior="batch_norm", committed_rate=0.1)
    settings = parse_settings({"model": held, "loss": TARGET})
    assert settings.loss.rate_target == 8.0 and settings.model.latent.committed_rate == 0.1


def test_without_a_latent_there_is_no_rate_to_control():
    """The baseline of a run with a target is that run's file and `--latent none`."""
    settings = parse_settings({"model": {"latent": {"kind": "none"}}, "loss": TARGET})
    assert settings.loss.rate_target is None
