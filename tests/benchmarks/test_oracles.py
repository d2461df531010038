"""z of training rows from a table or from the encoder: what a step moves, and what is kept."""

from __future__ import annotations

import copy

import pytest
import torch
from torch.nn import functional as F

from benchmarks import oracles
from benchmarks.support import rows as results
from cdpvae.config import parse_settings
from cdpvae.data import VAECollator
from cdpvae.tasks.text_vae.loading import open_data
from cdpvae.tasks.text_vae.setup import load_model
from support.runs import merged

ROWS, RATE = 40, 0.1


@pytest.fixture(scope="module")
def nested(small_settings):
    """A linear channel without dropout, InfoNCE and bag of words, with the order term."""
    made = merged(
        small_settings,
        model={
            "projections": "linear",
            "positional_slots": 4,
            "positional_length": 16,
            "pooling_dropout": 0.0,
            "lora_dropout": 0.0,
        },
        loss={
            "bow_weight": 0.0,
            "order_weight": 0.5,
            "contrastive_weight": 0.0,
            "word_dropout": 0.0,
            # The whole KL weight from the first step: it must not count.
            "beta_cycles": 1,
            "beta_ramp_ratio": 0.0,
            "free_bits": 0.0,
        },
        augmentation={"augmentation_probability": 0.0},
        # Two micro-batches a step: their gradients must be averaged.
        training={"gradient_accumulation_steps": 2, "prefetch": 0, "warmup_ratio": 0.0},
    )
    del made["model"]["vae_hidden_dim"]
    return made


def opened(nested):
    """Settings, tokenizer, the first rows of training and a fresh model."""
    settings = parse_settings(nested)
    tokenizer, splits = open_data(settings)
    model = load_model(settings, tokenizer)
    return settings, tokenizer, oracles.first_rows(splits["train"], ROWS), model


def watched(monkeypatch) -> list[int]:
    """The indices of the rows that are collated, in their order."""
    seen: list[int] = []
    collate = VAECollator.__call__

    def watch(self, rows, index):
        seen.extend(index)
        return collate(self, rows, index)

    monkeypatch.setattr(VAECollator, "__call__", watch)
    return seen


def test_the_table_moves_the_rows_of_the_batch_alone(nested, monkeypatch, capsys):
    settings, tokenizer, dataset, model = opened(nested)
    oracle = oracles.Oracle(model, ROWS)
    before = copy.deepcopy(oracle.state_dict())
    seen = watched(monkeypatch)
    oracles.fit(oracle, settings, tokenizer, dataset, 2, RATE)
    # Also in the second step the first step's rows stay where they are: no momentum moves them.
    assert len(set(seen)) == 16
    moved = (oracle.table.weight != before["table.weight"]).all(1)
    assert sorted(seen) == moved.nonzero().flatten().tolist()
    assert (oracle.table.weight - before["table.weight"]).abs().max() <= RATE
    changed = {n for n, v in oracle.state_dict().items() if not v.equal(before[n])}
    assert {n.split(".")[1] for n in changed} == {"weight", "backbone", "projector", "positional"}
    assert all("lora_" in name for name in changed if ".backbone." in name)
    assert "step 2/2" in capsys.readouterr().out


# 0 shows whether micro-batches are averaged, 0.01 whether their sum is clipped.
@pytest.mark.parametrize("max_grad_norm", [0.0, 0.01])
def test_the_encoders_run_is_a_plain_step(max_grad_norm, nested, monkeypatch):
    """Forward, cross-entropy on whole logits, mean over micro-batches, clip, AdamW."""
    # With this epsilon the first step of AdamW is proportional to a small gradient.
    changes = {"adam_eps": 1.0, "learning_rate": 1.0, "max_grad_norm": max_grad_norm}
    settings, tokenizer, dataset, model = opened(merged(nested, training=changes))
    start, plain, training = copy.deepcopy(model), copy.deepcopy(model), settings.training
    seen = watched(monkeypatch)
    oracles.fit(oracles.Oracle(model), settings, tokenizer, dataset, 1, RATE)

    decoder = {n: p for n, p in plain.named_parameters() if p.requires_grad}
    decays = [p for p in decoder.values() if p.dim() == 2]
    others = [p for p in decoder.values() if p.dim() != 2]
    optimizer = torch.optim.AdamW(
        [{"params": decays}, {"params": others, "weight_decay": 0.0}],
        lr=training.learning_rate,
        weight_decay=training.weight_decay,
        eps=1.0,
    )
    batches = [VAECollator()(dataset.rows(part), part) for part in (seen[:4], seen[4:8])]
    targets = sum(len(batch.targets) for batch in batches)
    for batch in batches:
        mu = plain.encode(*batch.instruction.to_padded(2))[1]
        decoded = plain.decode(mu, batch.response.ids, batch.response)
        states = decoded.hidden[decoded.positions[batch.target_positions]]
        for weight, hidden in ((1.0, states), (0.5, decoded.predicted[batch.target_positions])):
            logits = hidden @ plain.backbone.head_weight.T
            nll = F.cross_entropy(logits, batch.targets, reduction="sum")
            (weight * nll / targets).backward(retain_graph=True)
    gradients = [p.grad for p in decoder.values() if p.grad is not None]
    norm = torch.stack([gradient.norm() for gradient in gradients]).norm()
    assert norm > 0.1
    if max_grad_norm:
        for gradient in gradients:
            gradient *= max_grad_norm / norm
    optimizer.step()

    # Two sums in another order: fp32's rounding, magnified by nothing.
    for name, parameter in model.named_parameters():
        first, expected = start.get_parameter(name), plain.get_parameter(name)
        atol = 1e-5 * (expected - first).norm().item() + 1e-6
        torch.testing.assert_close(parameter - first, expected - first, rtol=1e-3, atol=atol)
    moved = {n.split(".")[0] for n, p in decoder.items() if p.grad is not None}
    assert moved == {"pooling", "latent", "projector", "positional", "backbone"}


def test_a_finished_run_is_passed_over(nested, tmp_path, monkeypatch, capsys):
    path, config = tmp_path / "oracles.csv", tmp_path / "settings.json"
    config.write_text(parse_settings(nested).dump())
    arguments = ["--config", str(config), "--rows", "40", "--steps", "2", "--results", str(path)]

    # Stopped in the second run: the first one's row is there.
    fit = oracles.fit

    def fit_tables(oracle, *rest):
        if oracle.table is None:
            raise KeyboardInterrupt
        return fit(oracle, *rest)

    monkeypatch.setattr(oracles, "fit", fit_tables)
    assert oracles.run(oracles.benchmark, arguments) == 130
    assert [row["z"] for row in results.read(path)] == ["table"]

    # Continued: only the second one is trained. Then nothing is left to do.
    monkeypatch.setattr(oracles, "fit", fit)
    oracles.benchmark(arguments)
    table, encoder = results.read(path)
    assert encoder["z"] == "encoder" and table["settings"] == encoder["settings"]
    assert float(encoder["nll"]) > 0 and encoder["validation_bleu4"] and encoder["shuffled_cost"]
    assert not table["validation_nll"] and table["table_rate"] == "0.03"
    assert str(tmp_path) not in path.read_text() and "--config settings.json" in table["command"]
    monkeypatch.setattr(oracles, "fit", None)
    capsys.readouterr()
    oracles.benchmark([*arguments, "--num-threads", "1"])
    assert capsys.readouterr().out.count("its row is there already") == 2

    # Other settings are another run.
    with pytest.raises(TypeError):
        oracles.benchmark([*arguments, "--seed", "1"])


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        pytest.param(["--rows", "10,20", "--steps", "5"], "as many of one", id="pairs"),
        pytest.param(["--rows", "ten", "--steps", "5"], "whole numbers", id="numbers"),
        pytest.param(["--precision", "bf16"], "--precision fp32", id="precision"),
        pytest.param(["--rows", "9999", "--steps", "5"], "ask for fewer", id="rows"),
    ],
)
def test_what_cannot_be_is_refused(flags, message, nested, tmp_path):
    config = tmp_path / "settings.json"
    config.write_text(parse_settings(nested).dump())
    with pytest.raises(ValueError, match=message):
        oracles.benchmark(["--config", str(config), "--results", str(tmp_path / "x.csv"), *flags])
