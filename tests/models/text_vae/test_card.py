"""The model card says what the model is, and the same of the same model."""

from __future__ import annotations

import pytest
from huggingface_hub import ModelCard

from cdpvae.config import parse_settings

COUNTS = {"read": 1200, "filtered": {"short": 30, "language": 12}, "train": 1000}
FIGURES = {"nll_q": 12.345678, "active_units": 3.0}


@pytest.fixture
def run_settings(tmp_path):
    """Settings of a run, of which the directory and the point of resuming say nothing."""
    training = {"learning_rate": 0.5, "output_dir": str(tmp_path), "resume": "latest"}
    return parse_settings({"training": training})


def test_the_card_has_what_the_hub_reads(make_model):
    card = make_model(backbone="meta-llama/Llama-3.1-8B").generate_model_card()
    front = card.data.to_dict()
    assert front["library_name"] == "cdpvae" and front["license"] == "apache-2.0"
    assert front["base_model"] == "meta-llama/Llama-3.1-8B"
    assert {"cdpvae", "text-vae", "lora"} <= set(front["tags"])


def test_the_card_has_settings_counts_and_figures(make_model, run_settings):
    model = make_model()
    text = model.generate_model_card(
        settings=run_settings, counts=COUNTS, step=40, figures=FIGURES
    ).text
    for row in (
        f"| model.latent.latent_dim | `{model.config.latent.latent_dim}` |",
        "| training.learning_rate | `0.5` |",
        "| filtered | 42 |",
        "| train | 1,000 |",
        "After step 40.",
        "| nll_q | 12.3457 |",
        "from_pretrained(",
    ):
        assert row in text, row
    # A setting of the default is not listed.
    assert "training.weight_decay" not in text


def test_the_card_does_not_depend_on_where_and_when(make_model, run_settings, tmp_path):
    (tmp_path / "backbone").mkdir()
    model = make_model(backbone=str(tmp_path / "backbone"))
    for name, settings in (("a", run_settings), ("b", run_settings.model_copy(deep=True))):
        settings.training.__dict__["output_dir"] = name
        settings.training.__dict__["resume"] = None if name == "a" else "latest"
        kwargs = {"settings": settings, "counts": COUNTS, "step": 40, "figures": FIGURES}
        model.save_pretrained(tmp_path / name, model_card_kwargs=kwargs)
    texts = [(tmp_path / name / "README.md").read_bytes() for name in "ab"]
    assert texts[0] == texts[1]
    assert str(tmp_path).encode() not in texts[0]
    assert "base_model" not in ModelCard.load(tmp_path / "a" / "README.md").data.to_dict()


def test_what_is_not_known_is_said_to_be(make_model):
    text = make_model().generate_model_card().text
    assert "Not evaluated." in text and "No counts known." in text
