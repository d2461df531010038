"""Commands on checkpoints whose decoder reads the instruction: what they measure and refuse."""

from __future__ import annotations

import json
import shutil

import pytest
import torch

from cdpvae import check_latents, decode, evaluate, evaluate_reconstruction, generate
from cdpvae.config import parse_settings
from cdpvae.data import LlamaTokenizerWrapper, PreprocessedDataset
from cdpvae.data.dataset import MANIFEST
from cdpvae.evaluation.checkpoint import RowSelection, open_run
from cdpvae.evaluation.groups.samples import write
from cdpvae.evaluation.likelihood import evaluate_likelihood
from cdpvae.experiments.measure import Evaluation
from cdpvae.models.text_vae import Backbone, LlamaSoftPromptVAE
from support.runs import merged

FEW = ["--num-rows", "6", "--text-rows", "4", "--num-texts", "4", "--pairs", "1", "--iw-rows", "2"]
FEW += ["--iw-samples", "2", "--dimension-rows", "2", "--max-length", "6", "--device", "cpu"]
READING = {"decoder_reads": "instruction"}
NONE = {"latent": {"kind": "none"}}
GAUSSIAN = {
    "latent": {"kind": "gaussian", "latent_dim": 8},
    "vae_hidden_dim": 16,
    "num_soft_tokens": 4,
    "pooling_heads": 4,
}


@pytest.fixture(scope="module")
def checkpoints(tmp_path_factory, small_settings, backbone_dir):
    """Untrained models as training would write them, with a LoRA that does something."""
    found = {}
    for name, model in (
        ("vae", GAUSSIAN),
        ("cvae", {**GAUSSIAN, **READING}),
        ("plain", NONE),
        ("reading", {**NONE, **READING}),
    ):
        path = tmp_path_factory.mktemp(name) / "checkpoint-1"
        path.mkdir()
        base = {key: small_settings["model"][key] for key in ("backbone", "lora_r", "lora_alpha")}
        settings = parse_settings({**small_settings, "loss": {}, "model": {**base, **model}})
        torch.manual_seed(1)
        saved = LlamaSoftPromptVAE(settings.model, Backbone.load(settings.model))
        for key, parameter in saved.named_parameters():
            if "lora_B" in key:
                torch.nn.init.normal_(parameter, std=0.02)
        saved.save_pretrained(path)
        (path / "settings.json").write_text(settings.dump())
        LlamaTokenizerWrapper.from_pretrained(str(backbone_dir)).save_pretrained(path / "tokenizer")
        found[name] = str(path)
    return found


def the_error(capsys) -> str:
    line = capsys.readouterr().err.strip().splitlines()[-1]
    assert line.startswith("error: ")
    return line


@pytest.mark.parametrize("name", ["vae", "cvae", "reading"])
def test_the_whole_evaluation(checkpoints, name, tmp_path):
    arguments = ["--checkpoint", checkpoints[name], *FEW, "--output", str(tmp_path)]
    baselines = ["--baseline", checkpoints["reading"], checkpoints["plain"]]
    assert evaluate.main([*arguments, *baselines]) == 0
    content = json.loads((tmp_path / "evaluation.json").read_text())
    assert content["baseline"] == checkpoints["plain"]
    assert content["instruction_baseline"] == checkpoints["reading"]
    page = (tmp_path / "evaluation.html").read_text()
    assert f"beside {checkpoints['plain']} and {checkpoints['reading']}" in page
    # The third figure is the likelihood of that checkpoint on the same rows.
    figures = {f["name"]: f for f in content["groups"]["likelihood"]["figures"]}
    reading = open_run(checkpoints["reading"], device="cpu")
    rows = reading.rows(RowSelection("validation", None, 6, 32))
    expected = evaluate_likelihood(reading.model, rows, seed=0).nll_q
    third = figures["NLL when the decoder reads the instruction"]
    assert third["value"] == pytest.approx(expected)
    assert "what the instruction is worth" in figures
    # Texts are written from the instruction, but not between two of them.
    if name == "vae":
        assert content["left_out"] == {}
    else:
        assert "interpolation" in content["left_out"]
        notes = content["groups"]["samples"]["notes"]
        assert any("reads the instructions of the real texts" in note for note in notes)
    assert ("use" in content["groups"]) == (name != "reading")
    if name == "cvae":
        samples = {f["name"] for f in content["groups"]["samples"]["figures"]}
        assert {"consistency, one z", "consistency, two z", "round trip"} <= samples
        assert "the decoder reads" in content["left_out"]["interpolation"]


def test_samples_have_the_instructions_of_their_rows(checkpoints):
    """Written in batches or at once, every text belongs to its own instruction."""
    opened = open_run(checkpoints["reading"], device="cpu")
    rows = [
        ids.tolist()
        for batch in opened.rows(RowSelection("validation", None, 5, 5))
        for ids in batch.instruction.rows()
    ]
    z = torch.zeros(5, 0)
    together = write(opened, z, 5, 6, instructions=rows)
    assert write(opened, z, 2, 6, instructions=rows) == together
    assert write(opened, z, 5, 6, instructions=rows[::-1]) == together[::-1]
    assert len(set(together)) > 1


def test_narrow_commands_take_both_baselines(checkpoints, tmp_path, capsys):
    both = ["--baseline", checkpoints["plain"], checkpoints["reading"]]
    flags = ["--checkpoint", checkpoints["vae"], "--num-rows", "6", "--device", "cpu", *both]
    output = tmp_path / "texts.json"
    texts = ["--num-samples", "2", "--max-length", "5", "--output", str(output)]
    assert evaluate_reconstruction.main([*flags, *texts]) == 0
    assert "the same decoder without z: NLL" in capsys.readouterr().out
    content = json.loads(output.read_text())
    assert content["baseline"]["nll_q"] != content["instruction_baseline"]["nll_q"]
    assert check_latents.main([*flags, "--output", str(tmp_path / "latents")]) == 0
    assert "the instruction is worth" in capsys.readouterr().out
    # Two of one kind would leave open which of them counts.
    same = ["--baseline", checkpoints["plain"], checkpoints["plain"]]
    assert check_latents.main(["--checkpoint", checkpoints["vae"], *same]) == 2
    assert "both have decoder_reads='nothing'" in the_error(capsys)


def test_texts_are_answered_and_nothing_else_is(checkpoints, tmp_path, capsys):
    text = ["--text", "the red house", "a river", "--max-length", "5", "--device", "cpu"]
    for name in ("reading", "cvae"):
        assert generate.main(["--checkpoint", checkpoints[name], *text]) == 0
        assert len(capsys.readouterr().out.splitlines()) >= 2
        for flags in (["--samples", "2"], [*text, "--interpolate"]):
            assert generate.main(["--checkpoint", checkpoints[name], *flags]) == 2
            said = the_error(capsys)
            assert "decoder_reads='instruction'" in said and "gives its decoder no inst" in said
    assert generate.main(["--checkpoint", checkpoints["plain"], *text]) == 2
    assert "--latent none" in the_error(capsys)
    flags = ["--input", "codes.parquet", "--output", str(tmp_path / "texts.jsonl")]
    assert decode.main(["--checkpoint", checkpoints["cvae"], *flags]) == 2
    assert "a file of codes gives its decoder no instruction" in the_error(capsys)


def test_a_sweep_has_no_baseline_that_reads(checkpoints):
    Evaluation(6, 4, checkpoints["plain"]).check()
    with pytest.raises(ValueError, match="its decoder reads the instruction"):
        Evaluation(6, 4, checkpoints["reading"]).check()
    # Nor is a decoder that reads compared with one that does not.
    beside = Evaluation(6, 4, checkpoints["plain"])
    assert "baseline_nll" in beside(open_run(checkpoints["vae"]).checkpoint, None)
    assert "baseline_nll" not in beside(open_run(checkpoints["cvae"]).checkpoint, None)


def test_rows_that_are_their_own_instruction_are_refused(checkpoints, processed_dir, tmp_path):
    """Whatever the settings say of the target: the manifest knows what the rows are."""
    copy = tmp_path / "processed"
    shutil.copytree(processed_dir, copy)
    manifest = json.loads((copy / MANIFEST).read_text())
    manifest["settings"]["target"] = "reconstruction"
    (copy / MANIFEST).write_text(json.dumps(manifest))
    rows = RowSelection("validation", str(copy), 4, 4)
    assert open_run(checkpoints["plain"], device="cpu").rows(rows)
    with pytest.raises(ValueError, match="would read the text that it is to write"):
        open_run(checkpoints["reading"], device="cpu").rows(rows)
    PreprocessedDataset(processed_dir, "validation").check_may_be_read()


def test_older_settings_have_a_decoder_that_reads_nothing(checkpoints, small_settings, tmp_path):
    """A checkpoint from before the setting: neither of its files has the key."""
    old = tmp_path / "checkpoint-1"
    shutil.copytree(checkpoints["vae"], old)
    for file in ("settings.json", "config.json"):
        text = (old / file).read_text()
        content = json.loads(text)
        group = content["model"] if "model" in content else content
        holder = next(part for part in (group, *content.values()) if "decoder_reads" in part)
        assert holder.pop("decoder_reads") == "nothing"
        (old / file).write_text(json.dumps(content))
    opened = open_run(str(old), device="cpu")
    rows = opened.rows(RowSelection("validation", None, 6, 32))
    now = open_run(checkpoints["vae"], device="cpu")
    assert not opened.model.config.reads_instruction
    assert evaluate_likelihood(opened.model, rows, seed=0) == evaluate_likelihood(
        now.model, rows, seed=0
    )
    assert parse_settings(merged(small_settings)).model.decoder_reads == "nothing"
