import gzip
import json

import pytest
from datasets import load_from_disk

from cdpvae.config import DataConfig
from cdpvae.data import LlamaTokenizerWrapper, PreprocessedDataset
from cdpvae.preprocessing.pipeline import preprocess
from cdpvae.preprocessing.report.terminal import terminal_report
from support.processed import files_of, rows_of

COLUMNS = ["record_id", "source", "instruction", "response", "instruction_ids", "response_ids"]


@pytest.fixture
def process(tmp_path, wrapper):
    """process(paths, overwrite=..., **settings) -> Processed, at tmp_path/out.

    The records are templates with a tokenizer of a few hundred pieces: what judges real text is
    off unless a test asks for it.
    """

    def run(*paths, overwrite=False, wrapper=wrapper, out="out", **settings):
        plain = {"language_filter": False, "quality_filter": False, "deduplication": "exact"}
        settings = {**plain, **settings}
        config = DataConfig(input=paths, processed_dir=str(tmp_path / out), **settings)
        return preprocess(config, wrapper, overwrite=overwrite, progress=False)

    return run


def test_rows_arrive_whole_and_in_order(process, write_records, alpaca_records, wrapper):
    records = alpaca_records(50)
    done = process(write_records("a.json", records), validation_fraction=0.3)
    rows = rows_of(done.path)
    assert list(rows[0]) == COLUMNS
    assert [row["record_id"] for row in rows] == list(range(50))
    for record, row in zip(records, rows, strict=True):
        assert row["source"] == "a.json"
        assert (row["instruction"], row["response"]) == (record["instruction"], record["output"])
        assert row["instruction_ids"] == wrapper.encode_instruction(record["instruction"])
        assert row["response_ids"] == wrapper.encode_response(record["output"])
    schema = load_from_disk(str(done.path / "train")).data.schema
    assert [str(field.type) for field in schema] == [
        "int64", "string", "string", "string", "list<item: int32>", "list<item: int32>"
    ]  # fmt: skip


def test_the_data_set_reads_what_was_written(process, write_records, alpaca_records, wrapper):
    done = process(write_records("a.json", alpaca_records(2500)), validation_fraction=0.3)
    for split in ("train", "validation"):
        dataset = PreprocessedDataset(done.path, split)
        stored = load_from_disk(str(done.path / split))
        assert len(dataset) == len(stored) == done.manifest["counts"][split] > 500
        for index in (0, 700, min(1000, len(dataset) - 1), len(dataset) - 1):
            row = {key: stored[index][key] for key in ("instruction_ids", "response_ids")}
            assert dataset[index] == row
            assert dataset.response_lengths[index] == len(row["response_ids"])
        dataset.check_tokenizer(wrapper)


def test_counts_add_up_and_every_loss_has_a_reason(process, tmp_path, alpaca_records):
    good = alpaca_records(5)
    lines = [json.dumps(record) for record in [*good, good[0], good[3]]]
    lines += ['{"instruction": "cut', json.dumps({"instruction": "no answer"}), "", "3"]
    lines += [json.dumps({"instruction": "short", "output": good[0]["output"]})]
    lines += [json.dumps({"instruction": good[0]["instruction"], "output": "word " * 2000})]
    (tmp_path / "a.jsonl").write_text("\n".join(lines))
    (tmp_path / "b.txt.gz").write_bytes(gzip.compress(("A line of text. " * 10 + "\n").encode()))
    done = process(str(tmp_path / "a.jsonl"), str(tmp_path / "b.txt.gz"))
    counts = done.manifest["counts"]
    assert counts["not_converted"] == {
        "record is not valid JSON": 1,
        "no key output, response, answer, completion or chosen": 1,
        "record is not an object": 1,
    }
    assert counts["filtered"] == {
        "instruction shorter than 10 tokens": 1,
        "response longer than 1024 tokens": 1,
    }
    assert (counts["read"], counts["duplicates"]) == (13, {"exact duplicate": 2})
    assert counts["kept"] == 6
    for part in (counts, *done.manifest["sources"].values()):
        assert part["read"] == sum(part["not_converted"].values()) + part["converted"]
        dropped = sum(part["filtered"].values()) + sum(part["duplicates"].values())
        assert part["converted"] == part["pairs"] == dropped + part["kept"]
        assert part["kept"] == part["train"] + part["validation"]
    assert done.manifest["sources"]["b.txt.gz"]["kept"] == 1
    examples = json.loads((done.path / "report.json").read_text())["examples"]
    example = examples["not converted: record is not valid JSON"]
    assert (example["record_number"], example["line"]) == (7, 8)
    assert '{"instruction": "cut' in example["excerpt"]
    assert len(examples) == 6
    twice = examples["duplicates: exact duplicate"]
    assert (twice["record_number"], twice["line"]) == (5, 6)
    assert twice["excerpt"] == twice["kept"]
    assert good[0]["instruction"] in twice["excerpt"]
    assert json.loads((done.path / "manifest.json").read_text()) == done.manifest
    table = terminal_report(done).splitlines()
    assert table[3].split() == ["total", "13", "10", "2", "2", "6", *table[3].split()[6:]]
    assert "not converted: record is not valid JSON: 1" in table


def test_the_same_inputs_give_the_same_bytes(process, write_records, alpaca_records):
    path = write_records("a.jsonl", alpaca_records(40))
    first, second = (process(path, out=out, validation_fraction=0.5) for out in ("one", "two"))
    assert files_of(first.path) == files_of(second.path)
    assert first.manifest["counts"] == second.manifest["counts"]


def test_equal_settings_are_reused_others_refused(process, tmp_path, write_records, alpaca_records):
    path = write_records("a.jsonl", alpaca_records(10))
    first = process(path)
    again = process(path)
    assert not first.reused and again.reused and again.manifest == first.manifest
    assert "reused" in terminal_report(again)
    with pytest.raises(ValueError, match="made with another max_samples; .* --overwrite"):
        process(path, max_samples=4)
    assert len(rows_of(first.path)) == 10
    assert len(rows_of(process(path, max_samples=4, overwrite=True).path)) == 4
    write_records("a.jsonl", alpaca_records(11))
    with pytest.raises(ValueError, match="made with another inputs;"):
        process(path, max_samples=4)
    assert [p.name for p in sorted(tmp_path.iterdir())] == ["a.jsonl", "out"]


def test_another_tokenizer_is_another_data_set(
    process, write_records, alpaca_records, build_tokenizer
):
    path = write_records("a.jsonl", alpaca_records(3))
    process(path)
    tokenizer = build_tokenizer(("<x>",), bos_token="<s>", eos_token="</s>")
    with pytest.raises(ValueError, match="made with another tokenizer;"):
        process(path, wrapper=LlamaTokenizerWrapper(tokenizer))


def test_a_directory_of_something_else_is_never_replaced(
    process, tmp_path, write_records, alpaca_records
):
    path = write_records("a.jsonl", alpaca_records(3))
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "thesis.txt").write_text("mine")
    with pytest.raises(ValueError, match="holds no processed data"):
        process(path, overwrite=True)
    assert (tmp_path / "out" / "thesis.txt").read_text() == "mine"
    (tmp_path / "out" / "thesis.txt").unlink()
    assert process(path).manifest["counts"]["kept"] == 3


def test_max_samples_counts_kept_records(process, write_records, alpaca_records):
    good = alpaca_records(6)
    records = [{"no": 1}, good[0], good[0], good[1], *good]
    done = process(write_records("a.jsonl", records), max_samples=3)
    assert [row["record_id"] for row in rows_of(done.path)] == [1, 3, 6]
    assert done.manifest["counts"]["read"] == 7


def test_validation_is_decided_by_the_instruction_alone(process, write_records, alpaca_records):
    records = alpaca_records(200)
    other_answers = [{**r, "output": r["output"] + " It is late."} for r in records]
    done = process(write_records("a.json", records + other_answers), validation_fraction=0.25)
    splits = {
        split: {row["instruction"] for row in load_from_disk(str(done.path / split))}
        for split in ("train", "validation")
    }
    assert not splits["train"] & splits["validation"]
    assert 30 <= len(splits["validation"]) <= 70  # 50 expected, 3 standard deviations are 18


def test_declared_splits_are_respected_when_all_records_have_them(
    process, write_records, alpaca_records
):
    records = [{**r, "split": "train"} for r in alpaca_records(9)]
    records[4]["split"] = records[7]["split"] = "validation"
    done = process(write_records("a.json", records), validation_fraction=0.9)
    validation = load_from_disk(str(done.path / "validation"))
    assert validation["record_id"][:] == [4, 7]
    assert done.manifest["split"] == "declared by the records"
    del records[0]["split"]
    with pytest.raises(ValueError, match="8 of 9 kept records declare a split"):
        process(write_records("b.json", records), out="mixed")
    # A key of that name with other values is metadata like any other.
    other = [{**r, "split": "test"} for r in alpaca_records(9)]
    assert process(write_records("c.json", other), out="other").manifest["split"].startswith("by")


def test_an_empty_split_is_not_written(process, write_records, alpaca_records):
    done = process(write_records("a.json", alpaca_records(5)), validation_fraction=0.0)
    assert not (done.path / "validation").exists()
    with pytest.raises(ValueError, match="the validation split has no rows"):
        PreprocessedDataset(done.path, "validation")


def test_reconstruction_reads_and_compares_the_response(
    process, write_records, alpaca_records, wrapper
):
    records = alpaca_records(3)
    records.append({**records[0], "instruction": "another instruction, the same response text"})
    done = process(write_records("a.json", records), target="reconstruction")
    rows = rows_of(done.path)
    assert [row["instruction"] for row in rows] == [r["output"] for r in records[:3]]
    assert all(row["response"] == row["instruction"] for row in rows)
    assert rows[0]["instruction_ids"] == wrapper.encode_instruction(records[0]["output"])
    assert done.manifest["counts"]["duplicates"] == {"exact duplicate": 1}


@pytest.mark.parametrize(
    ("records", "settings", "message"),
    [
        (
            [{"titel": "x", "body": "y"}, {"n": 1}],
            {},
            r"none of 2 records converts: unknown format \(2\); keys found: titel, body, n; "
            r"formats known: sharegpt \(conversations: .*; text \(text .*\(format=auto\)",
        ),
        ([], {}, "a.jsonl: holds no record"),
        (
            [{"instruction": "a", "output": "b"}],
            {},
            r"none of 1 converted records is kept: instruction shorter than 10 tokens \(1\)",
        ),
        (
            [{"instruction": "a", "output": "b"}],
            {"format": "messages"},
            r"no list messages \(1\); keys found: instruction, output; .* \(format=messages\)",
        ),
    ],
)
def test_errors_name_what_was_found_and_leave_nothing(
    process, tmp_path, write_records, records, settings, message
):
    path = write_records("a.jsonl", records)
    with pytest.raises(ValueError, match=message):
        process(path, **settings)
    assert [p.name for p in tmp_path.iterdir()] == ["a.jsonl"]


def test_an_existing_result_survives_a_failed_overwrite(process, write_records, alpaca_records):
    done = process(write_records("a.jsonl", alpaca_records(3)))
    before = files_of(done.path)
    with pytest.raises(ValueError, match="none of 1 records converts"):
        process(write_records("b.jsonl", [{"no": 1}]), overwrite=True)
    assert files_of(done.path) == before


def test_data_of_an_older_version_can_be_replaced(process, write_records, alpaca_records):
    path = write_records("a.jsonl", alpaca_records(3))
    manifest = process(path).path / "manifest.json"
    manifest.write_text(json.dumps({**json.loads(manifest.read_text()), "schema": 1}))
    with pytest.raises(ValueError, match="schema=1, this version reads"):
        process(path)
    assert process(path, overwrite=True).manifest["counts"]["kept"] == 3


def test_a_split_parts_no_group(process, write_records, alpaca_records):
    """Equal instructions, and the exchanges of one conversation, are on one side."""

    def turn(number, text):
        answer = f"{text} it is {number}."
        return [{"from": "human", "value": text}, {"from": "gpt", "value": answer}]

    records = [
        {"conversations": turn(n, f"Question {n} of a long talk that has many words")
         + turn(n, f"And the matter {n % 40} that several talks have in common")}
        for n in range(120)
    ]  # fmt: skip
    settings = {"turns": "all", "validation_fraction": 0.3, "min_response_tokens": 3}
    done = process(write_records("a.json", records), **settings)
    assert done.manifest["counts"]["pairs"] == done.manifest["counts"]["kept"] == 240
    sides = {
        split: load_from_disk(str(done.path / split)).to_list() for split in ("train", "validation")
    }
    assert len(sides["validation"]) > 20
    for name in ("record_id", "instruction"):
        train, validation = ({row[name] for row in rows} for rows in sides.values())
        assert not train & validation, name


def test_turns_choose_the_exchanges(process, write_records, alpaca_records):
    talk = [
        turn
        for record in alpaca_records(3)
        for turn in (
            {"role": "user", "content": record["instruction"]},
            {"role": "assistant", "content": record["output"]},
        )
    ]
    path = write_records("a.json", [{"messages": talk}])
    expected = [record["instruction"] for record in alpaca_records(3)]
    for turns, chosen in (("first", expected[:1]), ("last", expected[2:]), ("all", expected)):
        done = process(path, turns=turns, out=turns)
        assert [row["instruction"] for row in rows_of(done.path)] == chosen
        assert (done.manifest["counts"]["converted"], done.manifest["counts"]["pairs"]) == (
            1,
            len(chosen),
        )
