"""The description's own commands and snippets, under the package's name.

What the description superseded (Accelerate, `torch.load`) is replaced as the README says.
"""

from __future__ import annotations

import pytest
import torch

from support.runs import merged, run_warm, train

pytestmark = pytest.mark.launch


@pytest.fixture(scope="module")
def checkpoint(small_settings, tmp_path_factory):
    root = tmp_path_factory.mktemp("description")
    settings = merged(small_settings, training={"max_steps": 4, "eval_rows": 0})
    # torchrun --nproc_per_node=2 -m cdpvae.train --phase 1 --config custom.json
    done = train("torchrun", 2, settings, root, "--phase", "1", port=29691)
    assert done.returncode == 0, done.stderr[-3000:]
    return root / "run" / "checkpoint-4"


def command(module: str, *arguments: str):
    return run_warm(module, *arguments)


def test_preprocess_command_reaches_for_the_hub():
    """Without a network the command ends in one line that names the data set of the phase."""
    done = command(
        "cdpvae.preprocess",
        "--phase",
        "1",
        "--max-samples",
        "10000",
        "--tokenizer",
        "no/such/tokenizer",
    )
    assert done.returncode == 2
    assert done.stderr.count("error: ") == 1 and "no/such/tokenizer" in done.stderr


def test_evaluate_reconstruction_command(checkpoint, tmp_path):
    done = command(
        "cdpvae.evaluate_reconstruction",
        "--checkpoint",
        str(checkpoint),
        "--num-samples",
        "10",
        "--max-length",
        "8",
        "--output",
        str(tmp_path / "r.json"),
    )
    assert done.returncode == 0, done.stderr[-2000:]
    for word in (
        "NLL from z~q",
        "negative ELBO",
        "z-use test",
        "shuffled",
        "prior",
        "zero",
        "bleu4",
        "rouge_l",
        "exact_match",
        "token_accuracy",
        "reference:",
    ):
        assert word in done.stdout, word


def test_check_latents_command(checkpoint, tmp_path):
    done = command(
        "cdpvae.check_latents", "--checkpoint", str(checkpoint), "--output", str(tmp_path)
    )
    assert done.returncode == 0, done.stderr[-2000:]
    for word in (
        "active units (var > 0.01)",
        "active units (var > 0.2)",
        "cap",
        "effective rank",
        "mean cosine",
        "z-use test",
    ):
        assert word in done.stdout, word
    assert (tmp_path / "latents.png").read_bytes()[:4] == b"\x89PNG"


def test_generate_command(checkpoint):
    done = command(
        "cdpvae.generate",
        "--checkpoint",
        str(checkpoint),
        "--text",
        "Describe the red house.",
        "Describe the blue river.",
        "--interpolate",
        "--num-steps",
        "3",
        "--max-length",
        "5",
    )
    assert done.returncode == 0, done.stderr[-2000:]
    assert [line.split()[0] for line in done.stdout.splitlines()] == ["0.00:", "0.50:", "1.00:"]


def test_latent_space_operations(checkpoint):
    from cdpvae import LlamaSoftPromptVAE, ModelConfig

    assert ModelConfig().latent_dim == 64
    model = LlamaSoftPromptVAE.from_pretrained(checkpoint)
    instruction_ids = torch.tensor([[0, 10, 11, 12], [0, 13, 2, 2]])
    attention_mask = torch.tensor([[1, 1, 1, 1], [1, 1, 0, 0]])
    # Encode instruction to latent
    z, mu, logvar = model.encode(instruction_ids, attention_mask)
    assert torch.equal(z, mu) and logvar.shape == (2, 8)
    # Generate from latent
    generated_ids = model.generate(z, max_length=256, temperature=0.8, top_p=0.9)
    assert generated_ids.shape[0] == 2 and generated_ids.shape[1] <= 256
    # Interpolate between two latents
    z_interpolated = model.interpolate(z[0], z[1], num_steps=10)
    assert z_interpolated.shape == (10, 8)
    assert torch.equal(z_interpolated[0], z[0]) and torch.equal(z_interpolated[-1], z[1])


def test_collapse_control_snippet():
    from cdpvae import AdaptiveInterventionScheduler, CollapseMonitor, SoftPromptVAELoss

    loss_fn = SoftPromptVAELoss(latent_dim=64)
    collapse_monitor = CollapseMonitor(latent_dim=64)
    intervention_scheduler = AdaptiveInterventionScheduler(
        initial_bow_weight=1.5,
        initial_contrastive_weight=0.1,
    )
    mu = torch.zeros(16, 64)
    for _batch in range(3):
        metrics = collapse_monitor.update(mu, torch.zeros(16, 64), mu)
        if metrics.is_collapsing:
            intervention = intervention_scheduler.intervene(metrics)
            loss_fn.bow_loss_weight = intervention["bow_weight"]
    assert loss_fn.bow_loss_weight == 3.0


def test_augmentation_snippet():
    from cdpvae import AugmentationConfig, TextAugmenter

    augmenter = TextAugmenter(AugmentationConfig(span_mask_prob=0.15, word_dropout_rate=0.1))
    input_ids = torch.arange(1, 41).view(2, 20)
    attention_mask = torch.ones_like(input_ids)
    aug_ids, aug_mask = augmenter.augment(input_ids, attention_mask)
    assert aug_ids.shape == aug_mask.shape == (2, 20)
    assert not torch.equal(aug_ids, input_ids)
