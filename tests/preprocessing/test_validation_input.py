"""A validation split from files of its own: what it holds, and what is not trained on for it."""

from __future__ import annotations

import itertools
import json
import random
from pathlib import Path

import pytest
from datasets import load_from_disk

from cdpvae import files
from cdpvae.config import DataConfig
from cdpvae.preprocess import main
from cdpvae.preprocessing.pipeline import preprocess
from cdpvae.preprocessing.report.terminal import terminal_report
from support.overlap import five_grams, pairs_by_brute_force
from support.processed import MIXED, WORDS, files_of, mixed_records, rows_of

# What judges real text is off, and the share of a split that files do not give.
PLAIN = {name: value for name, value in MIXED.items() if name != "validation_fraction"}
REPEATS, INSTRUCTION = "duplicate of a validation row", "instruction of a validation row"


@pytest.fixture
def process(tmp_path, wrapper):
    """process(train, validation, out=..., **settings): records or paths -> Processed."""
    number = itertools.count()

    def file_of(records) -> str:
        if isinstance(records, str):
            return records
        path = tmp_path / f"{next(number)}.jsonl"
        path.write_text("".join(json.dumps(record) + "\n" for record in records))
        return str(path)

    def run(train, validation, out="out", **settings):
        config = DataConfig(
            input=(file_of(train),),
            validation_input=(file_of(validation),),
            processed_dir=str(tmp_path / out),
            **{"workers": 1, **PLAIN, **settings},
        )
        return preprocess(config, wrapper, progress=False)

    return run


@pytest.fixture(scope="module")
def mixed(tmp_path_factory) -> tuple[str, ...]:
    """Two files with duplicates within and across them, the second one for validation."""
    return mixed_records(tmp_path_factory.mktemp("inputs"), count=300)


def pair(number: int, **changes: str) -> dict[str, str]:
    """A pair of random words, unlike that of every other number."""
    draw = random.Random(10_000 + number)
    instruction, response = (" ".join(draw.choices(WORDS, k=k)) for k in (20, 40))
    return {"instruction": instruction, "output": response, **changes}


def responses(path: Path, split: str) -> list[str]:
    return load_from_disk(str(path / split))["response"][:]


def test_rows_of_a_split_are_those_of_its_files_in_order(process):
    done = process([pair(n) for n in range(30)], [pair(n) for n in range(100, 110)])
    assert responses(done.path, "train") == [pair(n)["output"] for n in range(30)]
    assert responses(done.path, "validation") == [pair(n)["output"] for n in range(100, 110)]
    sources = done.manifest["sources"].values()
    assert [(part["train"], part["validation"]) for part in sources] == [(0, 10), (30, 0)]
    assert done.manifest["split"] == "all rows of validation_input"
    # Ids number the records of all inputs, so that no two rows share one.
    assert len({row["record_id"] for row in rows_of(done.path)}) == 40
    assert list(done.manifest["validation_input"][0]) == ["file", "bytes", "sha256"]
    # The reports name the file and its rows.
    page = (done.path / "report.html").read_text()
    assert "the validation split is all rows of validation_input" in page
    name = done.manifest["validation_input"][0]["file"]
    report = json.loads((done.path / "report.json").read_text())
    assert report["sources"][name]["validation"] == 10 and report["validation_input"]
    assert page.count(name) == 2, "in the table of inputs, and with its hash"
    (line,) = [line for line in terminal_report(done).splitlines() if line.startswith(name)]
    assert line.split()[1:] == ["10", "10", "0", "0", "10", "0", "10"]


@pytest.mark.parametrize("deduplication", ["exact", "minhash"])
def test_a_training_row_that_repeats_a_validation_row_goes(process, deduplication):
    near = pair(100)["output"] + " amber"
    train = [pair(0), pair(100), pair(100), pair(1), pair(1), pair(100, output=near)]
    train += [pair(2), pair(102, output="another answer to that which validation asks")]
    validation = [pair(100), pair(101), pair(101), pair(102)]
    done = process(train, validation, deduplication=deduplication)
    assert responses(done.path, "train") == [pair(n)["output"] for n in (0, 1, 2)]
    assert responses(done.path, "validation") == [pair(n)["output"] for n in (100, 101, 102)]
    # Under exact deduplication a near-duplicate goes because of its instruction.
    repeated = {"exact": 2, "minhash": 3}[deduplication]
    counts = done.manifest["counts"]
    assert counts["duplicates"] == {
        "exact duplicate": 2, REPEATS: repeated, INSTRUCTION: 4 - repeated
    }  # fmt: skip
    assert counts["pairs"] == counts["kept"] + 6
    # The example shows the training row, and the validation row that stays.
    examples = json.loads((done.path / "report.json").read_text())["examples"]
    assert examples[f"duplicates: {REPEATS}"]["line"] == 2
    for reason, number in ((REPEATS, 100), (INSTRUCTION, {"exact": 100, "minhash": 102})):
        number = number if isinstance(number, int) else number[deduplication]
        assert pair(number)["output"][:40] in examples[f"duplicates: {reason}"]["kept"]
        assert reason in (done.path / "report.html").read_text()


def test_without_deduplication_everything_stays(process):
    records = [pair(0), pair(100), pair(100)]
    done = process(records, records[1:], deduplication="none")
    assert done.manifest["counts"]["duplicates"] == {}
    assert (done.manifest["counts"]["train"], done.manifest["counts"]["validation"]) == (3, 2)


def chain() -> list[dict[str, str]]:
    """Three pairs of which the middle one is near both others, and these are not near each other.

    60 words have 56 shingles, and a changed word five of them: 51 of 61 are shared, and 46 of 66.
    """
    words = pair(100)["output"].split()
    first, middle, last = (list(words) for _ in range(3))
    first[20], last[30] = "otherwise", "elsewhere"
    return [pair(100, output=" ".join(text)) for text in (first, middle, last)]


def test_the_validation_split_does_not_depend_on_what_is_trained_on(process):
    """A training row that connects two validation rows to a cluster removes none of them."""
    first, middle, last = chain()
    sets = [five_grams(f"{p['instruction']} {p['output']}") for p in (first, middle, last)]
    assert pairs_by_brute_force(sets, 0.8) == [(0, 1), (1, 2)]
    done = process([pair(0), middle, pair(1)], [first, last, pair(101)], similarity=0.8)
    expected = [record["output"] for record in (first, last, pair(101))]
    assert responses(done.path, "validation") == expected
    assert responses(done.path, "train") == [pair(n)["output"] for n in (0, 1)]
    # In one file the three are a cluster.
    together = process([pair(0)], [first, middle, last], similarity=0.8, out="together")
    assert responses(together.path, "validation") == [first["output"]]


@pytest.mark.parametrize("turns", ["first", "all"])
def test_nothing_of_validation_is_trained_on(process, mixed, turns):
    """By brute force over the rows: equal instructions, and near-duplicates."""
    train, validation = mixed
    done = process(train, validation, turns=turns)
    sides = [load_from_disk(str(done.path / split)).to_list() for split in ("validation", "train")]
    assert not set.intersection(*({row["instruction"] for row in rows} for rows in sides))
    held_out, rows = len(sides[0]), sides[0] + sides[1]
    texts = [five_grams(f"{row['instruction']}\n{row['response']}") for row in rows]
    # Validation rows may be alike, where a training row made them a cluster.
    assert not [p for p in pairs_by_brute_force(texts, 0.85) if p[1] >= held_out]
    assert {row["source"] for row in sides[0]} == {Path(validation).name}
    assert {row["source"] for row in sides[1]} == {Path(train).name}
    counts = done.manifest["counts"]
    assert counts["duplicates"][REPEATS] > 5
    dropped = sum(counts["filtered"].values()) + sum(counts["duplicates"].values())
    assert counts["pairs"] == counts["kept"] + dropped
    # The rows of validation are those that its file alone gives.
    other = process([pair(0)], validation, turns=turns, out="other")
    bytes_of = [(d.path / "validation" / "data-00000-of-00001.arrow") for d in (done, other)]
    assert bytes_of[0].read_bytes() == bytes_of[1].read_bytes()


@pytest.mark.parametrize("some", [{}, {"max_samples": 97}], ids=["all", "some"])
def test_workers_and_shards_leave_no_trace(process, mixed, some):
    expected = files_of(process(*mixed, out="one", **some).path)
    other = process(*mixed, out="two", workers=2, shard_records=37, **some)
    assert files_of(other.path) == expected
    if some:
        counts = other.manifest["counts"]
        assert (counts["train"], counts["validation"] > 97) == (97, True)
        # The training file is read to the record that completes the number.
        read = other.manifest["sources"][Path(mixed[0]).name]["read"]
        assert 97 <= read < 300
        assert other.manifest["sources"][Path(mixed[1]).name]["read"] == 300


class Killed(BaseException):
    """Stands for the end of the process: nothing of ours catches it."""


def test_interrupted_at_every_write_and_continued(process, tmp_path, monkeypatch):
    directory = tmp_path / "inputs"
    directory.mkdir()
    few = mixed_records(directory, count=40, seed=1)
    how = {"shard_records": 25, "max_samples": 20}
    expected = files_of(process(*few, out="whole", **how).path)
    write_bytes = files.write_bytes
    for number in itertools.count():
        written: list[Path] = []

        def interrupted(path, content, written=written, number=number):
            if len(written) == number:
                raise Killed
            write_bytes(path, content)
            written.append(path)

        with monkeypatch.context() as patch:
            patch.setattr(files, "write_bytes", interrupted)
            try:
                process(*few, out=f"out-{number}", **how)
                break
            except Killed:
                pass
        assert files_of(process(*few, out=f"out-{number}", **how).path) == expected, written[-1:]
    assert number > 12, "work.json, shards, ends, stage, decisions, two splits, reports, manifest"


@pytest.mark.parametrize(
    ("train", "validation", "settings", "message"),
    [
        pytest.param(
            [pair(0)], [], {}, r"input 1.jsonl: holds no record; name a file with records in "
            "validation_input", id="empty"
        ),
        pytest.param(
            [pair(0)], [{"no": 1}], {}, "1.jsonl: none of 1 records converts", id="unknown format"
        ),
        pytest.param(
            [pair(0)], [pair(1, output="a")], {"min_response_tokens": 5}, "none of 1 "
            r"converted records of validation_input is kept: response shorter than 5 tokens \(1\)",
            id="filtered"
        ),
        pytest.param(
            [pair(1), pair(1)], [pair(1)], {}, "none of 2 converted records of input is kept: "
            r"repeats a validation row \(2\); change the files", id="all repeated"
        ),
        pytest.param([], [pair(1)], {}, "input 0.jsonl: holds no record", id="nothing to train on"),
        pytest.param(
            [pair(0), pair(1, split="validation")], [pair(2)], {}, "1 of 2 kept records of input "
            "declare split=validation; drop that key, or drop validation_input", id="declared"
        ),
        pytest.param(
            [pair(0)], [pair(2, split="train")], {}, "1 of 1 kept records of validation_input "
            "declare split=train", id="declared in validation"
        ),
    ],
)  # fmt: skip
def test_what_gives_no_split_is_one_line(process, tmp_path, train, validation, settings, message):
    with pytest.raises(ValueError, match=message) as refused:
        process(train, validation, **settings)
    assert "\n" not in str(refused.value)
    assert {p.suffix for p in tmp_path.iterdir()} == {".jsonl"}, "nothing is left behind"


def test_an_unreadable_validation_file_is_an_error_a_damaged_one_a_line(process, tmp_path):
    broken = tmp_path / "broken.jsonl.gz"
    broken.write_bytes(b"\x1f\x8b no gzip data follows")
    with pytest.raises(ValueError, match=r"broken.jsonl.gz: cannot be read.*validation_input"):
        process([pair(0)], str(broken))
    # As any input, a file with a bad line costs that line.
    damaged = tmp_path / "damaged.jsonl"
    damaged.write_text(json.dumps(pair(1)) + '\n{"instruction": "cut')
    counts = process([pair(0)], str(damaged)).manifest["counts"]
    assert counts["not_converted"] == {"record is not valid JSON": 1} and counts["kept"] == 2


def test_records_may_declare_the_split_of_their_file(process):
    done = process([pair(0, split="train"), pair(1)], [pair(2, split="validation")])
    assert (done.manifest["counts"]["train"], done.manifest["counts"]["validation"]) == (2, 1)


def test_the_command_takes_files_and_refuses_a_share(tmp_path, tokenizer_dir, capsys):
    for name, numbers in (("train.jsonl", (0, 1)), ("valid.jsonl", (2,)), ("more.jsonl", (3,))):
        path = tmp_path / name
        path.write_text("".join(json.dumps(pair(number)) + "\n" for number in numbers))
    paths = [str(tmp_path / name) for name in ("train.jsonl", "valid.jsonl", "more.jsonl")]
    arguments = ["--input", paths[0], "--validation-input", *paths[1:], "--no-language-filter"]
    arguments += ["--tokenizer", str(tokenizer_dir), "--processed-dir", str(tmp_path / "out")]
    assert main([*arguments, "--validation-fraction", "0.1"]) == 2
    error = capsys.readouterr().err
    assert "--validation-fraction 0.1 has no effect with" in error and error.count("\n") == 1
    assert "validation" in error.split("with", 1)[1] and not (tmp_path / "out").exists()
    assert main(arguments) == 0
    assert len(responses(tmp_path / "out", "train")) == len(
        responses(tmp_path / "out", "validation")
    )
    capsys.readouterr()
    # Another file of validation is other data.
    assert main([*arguments[:-1], str(tmp_path / "out"), "--validation-input", paths[1]]) == 2
    assert "was made with another validation_input" in capsys.readouterr().err
    assert main([*arguments, "--validation-input", str(tmp_path / "missing.jsonl")]) == 2
    assert "missing.jsonl': no such file" in capsys.readouterr().err


def test_without_such_files_the_manifest_is_that_of_before(tmp_path, wrapper):
    """Data and unfinished work of a version that did not know the setting stay valid."""
    path = tmp_path / "a.jsonl"
    path.write_text(json.dumps(pair(0)) + "\n")
    config = DataConfig(input=(str(path),), processed_dir=str(tmp_path / "out"), **PLAIN)
    done = preprocess(config, wrapper, progress=False)
    report = json.loads((done.path / "report.json").read_text())
    for content in (done.manifest, done.manifest["settings"], report, report["settings"]):
        assert "validation_input" not in content
    assert preprocess(config, wrapper, progress=False).reused


def test_a_phase_of_the_hub_with_local_validation(tmp_path, wrapper, monkeypatch):
    def hub(name, split, streaming):
        assert name == "mlabonne/FineTome-100k"
        return HubRows([pair(0), pair(2), pair(1)])

    monkeypatch.setattr("datasets.load_dataset", hub)
    path = tmp_path / "valid.jsonl"
    path.write_text(json.dumps(pair(2)) + "\n")
    config = DataConfig(
        validation_input=(str(path),), processed_dir=str(tmp_path / "out"), workers=1, **PLAIN
    )
    done = preprocess(config, wrapper, progress=False)
    assert responses(done.path, "train") == [pair(n)["output"] for n in (0, 1)]
    assert responses(done.path, "validation") == [pair(2)["output"]]


class HubRows(list):
    """Rows in the place of a streamed data set."""

    def skip(self, count: int) -> HubRows:
        return HubRows(self[count:])
