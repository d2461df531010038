"""Settings of recipes: what has no effect is refused, what a baseline has no use for is off."""

from __future__ import annotations

import pytest

from cdpvae.config import SettingsError, parse_settings


@pytest.mark.parametrize(
    ("content", "words"),
    [
        ({"loss": {"order_weight": 1.0}}, ["order_weight=1.0", "positional_slots=0"]),
        ({"loss": {"word_dropout_fall_ratio": 0.1}}, ["fall_ratio=0.1", "word_dropout_start"]),
        ({"loss": {"order_fall_ratio": 0.5}}, ["order_fall_ratio=0.5", "order_weight=0"]),
        ({"loss": {"word_dropout_start": 0.3}}, ["word_dropout_start=0.3", "word_dropout=0.4"]),
        ({"model": {"projections": "linear", "vae_hidden_dim": 9}}, ["vae_hidden_dim=9", "linear"]),
        ({"model": {"projections": "linear", "encoder_dropout": 0}}, ["encoder_dropout=0.0"]),
    ],
)
def test_refused(content, words):
    with pytest.raises(SettingsError) as error:
        parse_settings(content)
    assert all(word in str(error.value) for word in words), str(error.value)
    assert "\n" not in str(error.value)


def test_the_baseline_of_a_recipe_needs_no_other_file():
    """latent.kind=none: the decoder alone, so nothing of z is trained or projected."""
    recipe = {"positional_slots": 8, "projections": "linear", "latent": {"kind": "none"}}
    settings = parse_settings({"model": recipe, "loss": {"order_weight": 1.0}})
    assert settings.model.positional_slots == 0
    assert settings.loss.order_weight == 0
