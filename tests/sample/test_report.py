"""The quickstart's verdict: each measure against its bound, from the files of the evaluation."""

import json

import pytest

from cdpvae import sample_report
from cdpvae.sample.pairs import SampleSpec
from cdpvae.sample.report import Measure, judge_run

SPEC = SampleSpec({"colour": ("red", "blue"), "size": ("big", "small", "wide", "tall")})
# The right colour in one of two answers, the right size in both.
TEXTS = [
    {"reference": "red and big", "generated": {"z=mu": "red and big", "z~q": "blue and tall"}},
    {"reference": "blue, small", "generated": {"z=mu": "red, small", "z~q": "blue and tall"}},
]


@pytest.fixture
def files(tmp_path):
    """files(changes of the reconstruction) -> the command's arguments."""

    def write(**changes) -> list[str]:
        reconstruction = {
            "likelihood": {"nll_q": 2.5, "neg_elbo": 38.5, "costs": {"shuffled": 24.0, "zero": 1}},
            "baseline": {"nll_q": 12.25},
            "texts": TEXTS,
            **changes,
        }
        (tmp_path / "reconstruction.json").write_text(json.dumps(reconstruction))
        # The first threshold counts; the second is there to be read by mistake.
        verdicts = [
            {"name": "active units (var > 0.01)", "value": 6.0},
            {"name": "active units (var > 0.2)", "value": 1.0},
            {"name": "KL, nats per sequence", "value": 30.0},
        ]
        latents = {"verdicts": verdicts, "kl_per_dim": [0.5] * 8}
        (tmp_path / "latents.json").write_text(json.dumps(latents))
        SPEC.save(tmp_path / "attributes.json")
        names = ("reconstruction", "latents", "attributes")
        return [arg for name in names for arg in (f"--{name}", str(tmp_path / f"{name}.json"))]

    return write


def paths(arguments: list[str]) -> list[str]:
    return arguments[1::2]


def test_every_measure_beside_its_bound(files):
    report = judge_run(*paths(files()))
    assert report.measures == {
        "cost of shuffled z, nats/sequence": Measure(24.0, 10.0),
        "active units, share": Measure(0.75, 0.5),
        "colour right, times chance": Measure(0.5 * 2, 5.0),
        "size right, times chance": Measure(1.0 * 4, 5.0),
    }
    assert [m.reached for m in report.measures.values()] == [True, True, False, False]
    assert not report.reached
    assert Measure(5.0, 5.0).reached


def test_table_shows_likelihoods_and_the_decoder_without_z(files):
    shown = judge_run(*paths(files())).lines()
    assert shown[1].split() == "cost of shuffled z, nats/sequence 24.00 10.0 ok".split()
    assert shown[3].split() == "colour right, times chance 1.00 5.0 MISSED".split()
    assert [line.split()[-1] for line in shown[-3:]] == ["2.50", "38.50", "12.25"]
    without = judge_run(*paths(files(baseline=None))).lines()
    assert without == shown[:-1]


def test_command_prints_writes_and_exits_by_the_verdict(files, tmp_path, capsys):
    arguments = files()
    output = tmp_path / "report.json"
    assert sample_report.main([*arguments, "--output", str(output)]) == 0
    assert "MISSED" in capsys.readouterr().out
    written = json.loads(output.read_text())
    assert written["active units, share"] == {"value": 0.75, "at_least": 0.5, "reached": True}
    assert not written["size right, times chance"]["reached"]
    with pytest.raises(SystemExit) as stop:
        sample_report.main([*arguments, "--strict"])
    assert stop.value.code == 1


def test_strict_passes_when_every_bound_is_reached(files, monkeypatch):
    monkeypatch.setattr("cdpvae.sample.report.MIN_TIMES_CHANCE", 1.0)
    assert sample_report.main([*files(), "--strict"]) == 0


@pytest.mark.parametrize("flag", ["--reconstruction", "--latents", "--attributes"])
def test_missing_files_are_named(files, capsys, flag):
    arguments = files()
    place = arguments.index(flag)
    for wrong in (arguments[:place] + arguments[place + 2 :], [*arguments, flag, "none.json"]):
        assert sample_report.main(wrong) == 2
        error = capsys.readouterr().err
        assert flag in error and "no such file" in error and error.count("\n") == 1


def test_answers_are_needed(files, capsys):
    assert sample_report.main(files(texts=[])) == 2
    assert "raise its --num-samples" in capsys.readouterr().err
