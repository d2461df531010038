"""Settings: the description's defaults by value, and one line for whatever is wrong."""

from __future__ import annotations

import json

import pytest

from cdpvae.config import (
    GaussianConfig,
    ModelConfig,
    Settings,
    SettingsError,
    all_settings,
    load_settings,
    parse_settings,
)
from support.runs import REPOSITORY

CONFIGS = REPOSITORY / "cdpvae" / "configs"

# spec, tables of sections 1 to 6 and the dimension summary.
DESCRIPTION = {
    "model": {
        "backbone": "meta-llama/Llama-3.1-8B",
        "pooling_heads": 8,
        "pooling_dropout": 0.1,
        "vae_hidden_dim": 2048,
        "encoder_dropout": 0.1,
        "num_soft_tokens": 32,
        "projector_dropout": 0.1,
        "deep_prefix": False,
        "prefix_hidden_dim": 2048,
        "prefix_bottleneck_dim": 256,
        "prefix_scale_init": 0.1,
        "lora_r": 64,
        "lora_alpha": 128,
        "lora_dropout": 0.05,
        "use_rslora": True,
        "lora_target_modules": (
            "q_proj",
            "k_proj",
            "v_proj",
            "o_proj",
            "gate_proj",
            "up_proj",
            "down_proj",
        ),
        "latent": GaussianConfig(latent_dim=64, logvar_init_bias=-2.0, logvar_clamp=10.0),
    },
    "loss": {
        "beta_max": 1.0,
        "beta_cycles": 4,
        "beta_ramp_ratio": 0.5,
        "free_bits": 0.5,
        "bow_weight": 1.5,
        "contrastive_weight": 0.1,
        "temperature": 0.07,
        "normalize_latents": True,
        "word_dropout": 0.4,
        "objective": "per_token",
        "bow_reduction": "bce",
        "queue_size": 0,
    },
    "augmentation": {
        "augmentation_probability": 0.5,
        "span_mask_prob": 0.15,
        "span_max_len": 5,
        "word_dropout_rate": 0.1,
        "shuffle_window": 0,
    },
    "collapse": {
        "enable_collapse_monitoring": True,
        "au_variance": 0.01,
        "min_au_ratio": 0.3,
        "severe_au_ratio": 0.1,
        "min_mi": 1.0,
        "severe_mi": 0.5,
        "min_kl": 0.1,
        "mild_factor": 1.1,
        "moderate_factor": 1.3,
        "moderate_dropout_factor": 0.8,
        "max_bow_weight": 3.0,
        "max_contrastive_weight": 0.5,
        "min_word_dropout": 0.1,
    },
    "data": {
        "min_instruction_tokens": 10,
        "max_instruction_tokens": 512,
        "min_response_tokens": 20,
        "max_response_tokens": 1024,
    },
    "training": {
        "learning_rate": 2e-4,
        "weight_decay": 0.01,
        "eta_min": 2e-5,
        "warmup_ratio": 0.1,
        "max_grad_norm": 1.0,
        "per_device_batch_size": 8,
        "gradient_accumulation_steps": 12,
        "num_epochs": 10,
        "save_steps": 100,
        "logging_steps": 100,
        "gradient_checkpointing": True,
        "precision": "bf16",
    },
}


@pytest.mark.parametrize("group", DESCRIPTION)
def test_defaults_are_the_descriptions(group):
    values = getattr(Settings(), group)
    assert {key: getattr(values, key) for key in DESCRIPTION[group]} == DESCRIPTION[group]


def test_shipped_files():
    assert load_settings(CONFIGS / "description.json") == Settings()
    recommended = load_settings(CONFIGS / "recommended.json")
    assert recommended.loss.bow_reduction == "categorical"
    # Whatever else it changes must be argued for in the README, so it is listed here.
    changed = {"loss": {"bow_reduction": "categorical"}, "collapse": {"watch_use": True}}
    assert json.loads((CONFIGS / "recommended.json").read_text()) == changed
    # The recipe of docs/recipes.md: every lever that the page names is set.
    recipe = load_settings(CONFIGS / "autoencoder.json")
    assert recipe.model.positional_slots and recipe.loss.order_weight
    assert recipe.model.pooling_positions and recipe.model.pooling_queries > 1
    assert (recipe.model.projections, recipe.loss.word_dropout_start) == ("linear", 1.0)
    assert recipe.data.target == "reconstruction"


def gaussian(latent_dim) -> dict:
    return {"kind": "gaussian", "latent_dim": latent_dim}


@pytest.mark.parametrize(
    ("content", "words"),
    [
        ({"modle": {}}, ["modle", "model"]),
        ({"model": {"latent_dims": 8}}, ["model.latent_dims", "model.latent.latent_dim"]),
        ({"model": {"latent": gaussian("64")}}, ["model.latent.latent_dim='64'", "integer"]),
        ({"model": {"latent": gaussian(0)}}, ["model.latent.latent_dim=0", "greater"]),
        ({"model": {"encoder_layer": "first"}}, ["model.encoder_layer", "first", "last", "mix"]),
        ({"model": {"encoder_layer": -1}}, ["encoder_layer", "-1"]),
        (
            {"model": {"latent": {"kind": "none"}, "deep_prefix": True}},
            ["deep_prefix=true", "latent.kind=none"],
        ),
        (
            {"model": {"latent": {"kind": "none", "latent_dim": 8}}},
            ["model.latent.latent_dim", "unknown key"],
        ),
        ({"model": {"latent": {"kind": "vq"}}}, ["model.latent.kind='vq'", "gaussian", "none"]),
        ({"model": {"latent": {"latent_dim": 8}}}, ["model.latent.kind is missing", "gaussian"]),
        ({"model": {"latent": 8}}, ["model.latent=8"]),
        ({"loss": {"queue_size": 8, "contrastive_weight": 0.0}}, ["queue_size=8"]),
        ({"augmentation": {"augmentation_probability": 0.0}}, ["contrastive_weight=0.1"]),
        ({"training": {"eta_min": 1.0}}, ["eta_min=1.0", "learning_rate"]),
        ({"training": {"precision": "fp16"}}, ["precision", "fp16", "bf16"]),
        ({"data": {"min_response_tokens": 2000}}, ["min_response_tokens=2000", "1024"]),
        ({"data": {"phase": 4}}, ["data.phase", "4"]),
        ({"data": {"language_filter": False, "languages": ["de"]}}, ["languages", "no effect"]),
        ({"data": {"languages": []}}, ["languages=[]", "language_filter=false"]),
        ({"data": {"quality_filter": False, "max_special_share": 0.5}}, ["max_special_share=0.5"]),
        ({"data": {"deduplication": "exact", "similarity": 0.9}}, ["similarity=0.9", "exact"]),
        (
            {"data": {"validation_input": ["b.txt"], "validation_fraction": 0.1}},
            ["validation_fraction=0.1 has no effect", 'validation_input=["b.txt"]'],
        ),
        (
            {"model": {"decoder_reads": "instruction"}, "data": {"target": "reconstruction"}},
            ["decoder_reads='instruction'", "target='reconstruction'"],
        ),
        ({"model": {"decoder_reads": "all"}}, ["model.decoder_reads='all'", "instruction"]),
        ({"data": {"executor": "slurm"}}, ["data.executor", "slurm", "ray"]),
    ],
)
def test_what_is_wrong_is_one_line(content, words):
    with pytest.raises(SettingsError) as refused:
        parse_settings(content)
    assert "\n" not in str(refused.value)
    for word in words:
        assert word in str(refused.value)


def test_decontamination_uses_the_similarity_of_near_duplicates():
    data = {"deduplication": "exact", "decontaminate": ["a.jsonl"], "similarity": 0.7}
    assert parse_settings({"data": data}).data.similarity == 0.7
    with pytest.raises(SettingsError, match="num_permutations=64 has no effect"):
        parse_settings({"data": {**data, "num_permutations": 64}})


def test_every_setting_has_help():
    assert [setting.key for setting in all_settings() if not setting.help] == []


def test_every_setting_has_a_default_of_its_own_type():
    """The list of settings is read off the classes: each entry must be what the classes have."""
    content = json.loads(Settings().dump())
    for setting in all_settings():
        if setting.family in (None, "gaussian"):
            value = content
            for name in setting.path:
                value = value[name]
            default = setting.default
            assert value == (list(default) if isinstance(default, tuple) else default), setting


def test_settings_survive_json_copies_and_assignments():
    settings = Settings.model_validate_json(Settings().dump())
    assert settings == Settings()
    changed = settings.model.model_copy(update={"latent": GaussianConfig(latent_dim=5)})
    assert changed.latent.latent_dim == 5 and settings.model.latent.latent_dim == 64
    changed.latent.latent_dim = 7
    with pytest.raises(ValueError, match="greater than or equal to 1"):
        changed.latent.latent_dim = 0
    with pytest.raises(ValueError, match="deep_prefix=true has no effect"):
        Settings(model={"latent": {"kind": "none"}}).model.deep_prefix = True
    assert ModelConfig(lora_target_modules=["q_proj"]).lora_target_modules == ("q_proj",)


def test_passes_of_an_instruction_are_counted():
    """By the encoder and by a decoder that reads it; once where neither does, as ever."""
    for kind, reads, passes in (
        ("gaussian", "nothing", 1),
        ("gaussian", "instruction", 2),
        ("none", "instruction", 1),
        ("none", "nothing", 1),
    ):
        model = parse_settings({"model": {"latent": {"kind": kind}, "decoder_reads": reads}}).model
        assert model.instruction_passes == passes
