"""The command on a small run: JSON, page, raw input, and what is refused."""

from __future__ import annotations

import json
import re

import pytest

from cdpvae import evaluate
from support.runs import merged, sentences, train

OWN = "reconstruction,samples,interpolation"
FEW = ["--num-rows", "12", "--text-rows", "12", "--num-texts", "6", "--pairs", "2"]
FEW += ["--max-length", "8", "--device", "cpu"]


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory, small_settings):
    directory = tmp_path_factory.mktemp("evaluated")
    done = train("python", 1, small_settings, directory)
    assert done.returncode == 0, done.stderr[-2000:]
    return next((directory / "run").glob("checkpoint-*"))


@pytest.fixture(scope="module")
def evaluated(checkpoint, tmp_path_factory):
    """The result of two seeds over the groups that write texts."""
    output = tmp_path_factory.mktemp("evaluation")
    arguments = ["--checkpoint", str(checkpoint), "--only", OWN, "--seeds", "2"]
    assert evaluate.main([*arguments, *FEW, "--output", str(output)]) == 0
    return output


def figures_of(directory, group):
    content = json.loads((directory / "evaluation.json").read_text())
    return {figure["name"]: figure for figure in content["groups"][group]["figures"]}


def test_every_figure_says_what_it_is(evaluated):
    content = json.loads((evaluated / "evaluation.json").read_text())
    assert list(content["groups"]) == OWN.split(",")
    for group in content["groups"].values():
        assert group["figures"] and group["seconds"] > 0
        for figure in group["figures"]:
            assert figure["unit"] and figure["estimator"] and figure["rows"] > 0, figure
            assert figure["cap"] is None or figure["value"] <= figure["cap"] + 1e-9, figure


def test_seeds_change_what_is_random_and_nothing_else(evaluated):
    reconstruction = figures_of(evaluated, "reconstruction")
    assert reconstruction["BLEU-4, z=mu"]["spread_over_seeds"] == 0
    samples = figures_of(evaluated, "samples")
    first, second = samples["forward PPL, samples"]["values"]
    assert first != second
    assert len(set(samples["forward PPL, real texts"]["values"])) == 1


def test_figures_agree_with_each_other(evaluated):
    """Buckets divide the rows; real texts of validation repeat those of training."""
    reconstruction = figures_of(evaluated, "reconstruction")
    buckets = [f["rows"] for n, f in reconstruction.items() if n.startswith("BLEU-4, z=mu, ")]
    assert sum(buckets) == reconstruction["BLEU-4, z=mu"]["rows"] == 12
    samples = figures_of(evaluated, "samples")
    assert samples["4-grams seen in training, real texts"]["value"] > 0.5
    assert samples["self-BLEU-4, real texts"]["rows"] == 6
    walk = figures_of(evaluated, "interpolation")
    assert (
        walk["PPL of interpolants, slerp"]["rows"] <= 18 and walk["smoothness, slerp"]["rows"] == 2
    )
    # Both ways have the same ends.
    assert walk["PPL of ends, slerp"]["value"] == pytest.approx(
        walk["PPL of ends, linear"]["value"]
    )


def test_the_page_holds_everything_and_loads_nothing(evaluated):
    page = (evaluated / "evaluation.html").read_text()
    assert "data:image/png;base64," in page and "<script" not in page
    loaded = re.findall(r"(?:src|href)=[\"']?([^\"'>]*)", page)
    assert loaded and all(link.startswith("data:") for link in loaded)
    for group in OWN.split(","):
        for name in figures_of(evaluated, group):
            assert name in page


def test_a_raw_file_is_read_as_the_data_of_the_run_were(checkpoint, tmp_path, capsys):
    """The manifest's bounds keep 5 of 6 records; equal records are not thrown away."""
    pairs = [*sentences(4), sentences(1)[0], {"instruction": "a", "output": "b"}]
    raw = tmp_path / "raw.jsonl"
    raw.write_text("".join(json.dumps(pair) + "\n" for pair in pairs))
    arguments = ["--checkpoint", str(checkpoint), "--only", "reconstruction", *FEW]
    arguments += ["--input", str(raw), "--output", str(tmp_path / "out")]
    assert evaluate.main(arguments) == 0
    assert figures_of(tmp_path / "out", "reconstruction")["BLEU-4, z=mu"]["rows"] == 5
    (note,) = json.loads((tmp_path / "out" / "evaluation.json").read_text())["notes"]
    assert "5 rows of 6 records, converted by the settings of the run's data" in note
    assert "1 instruction" in note and note in capsys.readouterr().out


@pytest.mark.parametrize(
    ("flags", "said"),
    [
        (["--only", "likelihood,beauty"], "'beauty' is no group; choose from likelihood,use"),
        (["--only", ""], "is no group"),
        (["--seeds", "0"], "--seeds 0 must be at least 1"),
        (["--iw-rows", "some"], "--iw-rows 'some' must be all or a number"),
        (["--input", "a", "--processed-dir", "b"], "both name the rows"),
        (["--reverse-ppl", "1"], "--reverse-ppl 1 must be 0, or at least 2"),
        (["--reverse-ppl", "9", "--only", "use"], "--reverse-ppl has no effect with --only use"),
        (["--feature-model", "x", "--only", "use"], "--feature-model has no effect"),
        (["--attributes", "x", "--only", "use"], "add interpolation"),
        (["--attributes", "nowhere.json"], "No such file or directory: 'nowhere.json'"),
    ],
)
def test_what_cannot_be_measured_is_one_line(flags, said, capsys):
    assert evaluate.main(["--checkpoint", "nowhere", *flags]) == 2
    error = capsys.readouterr().err
    assert said in error and error.count("\n") == 1


def test_a_scorer_that_is_none_is_one_line(checkpoint, tmp_path, capsys):
    arguments = ["--checkpoint", str(checkpoint), "--only", "samples", *FEW]
    arguments += ["--scorer", str(tmp_path), "--output", str(tmp_path / "out")]
    assert evaluate.main(arguments) == 2
    assert capsys.readouterr().err.splitlines()[-1].startswith(f"error: scorer='{tmp_path}'")


def test_a_run_without_a_latent_says_what_it_lacks(small_settings, tmp_path, capsys):
    settings = merged(small_settings, training={"max_steps": 4})
    model = {
        k: v for k, v in settings["model"].items() if k in ("backbone", "lora_r", "lora_alpha")
    }
    settings["model"] = {**model, "latent": {"kind": "none"}}
    settings["loss"] = {}
    assert train("python", 1, settings, tmp_path).returncode == 0
    plain = next((tmp_path / "run").glob("checkpoint-*"))
    arguments = ["--checkpoint", str(plain), "--only", OWN, *FEW]
    assert evaluate.main([*arguments, "--output", str(tmp_path / "out")]) == 0
    content = json.loads((tmp_path / "out" / "evaluation.json").read_text())
    assert content["left_out"] == {"interpolation": "the run has no latent"}
    assert "BLEU-4, no z" in figures_of(tmp_path / "out", "reconstruction")
    assert not any("round trip" in name for name in figures_of(tmp_path / "out", "samples"))
    assert "interpolation: left out, the run has no latent" in capsys.readouterr().out
