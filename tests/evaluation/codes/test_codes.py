"""Codes of a corpus: order and ids, kill and continue, and texts equal to those of `generate`."""

from __future__ import annotations

import json
import shutil

import pyarrow.parquet as pq
import pytest
import torch

from cdpvae import decode, encode, generate
from cdpvae.config import Settings
from cdpvae.data import LlamaTokenizerWrapper
from cdpvae.evaluation.checkpoint import open_run
from cdpvae.evaluation.codes.encode import encode_tokens
from cdpvae.models.text_vae import LlamaSoftPromptVAE
from support.runs import sentences


@pytest.fixture(scope="module")
def make_checkpoint(tmp_path_factory, backbone_dir, small_settings):
    """latent -> a saved, untrained run."""

    def make(seed=3, **latent):
        path = tmp_path_factory.mktemp("run") / "checkpoint-1"
        model = {**small_settings["model"], "latent": latent}
        settings = Settings.model_validate_json(json.dumps({"model": model}))
        torch.manual_seed(seed)
        saved = LlamaSoftPromptVAE(settings.model)
        # An untrained decoder writes the same whatever z is: codes and prompts are made large.
        heads = saved.head_modules()
        for name, parameter in saved.named_parameters():
            if "projector" in heads and ("mu_head.weight" in name or name.startswith("projector")):
                parameter.data.mul_(8.0)
        saved.save_pretrained(path)
        (path / "settings.json").write_text(settings.dump())
        LlamaTokenizerWrapper.from_pretrained(str(backbone_dir)).save_pretrained(path / "tokenizer")
        return str(path)

    return make


@pytest.fixture(scope="module")
def checkpoint(make_checkpoint):
    return make_checkpoint(kind="gaussian", latent_dim=8)


@pytest.fixture(scope="module")
def texts(tmp_path_factory):
    """40 pairs with their own ids, and two records that give none: numbers 3 and 17."""
    path = tmp_path_factory.mktemp("input") / "pairs.jsonl"
    lines = [json.dumps({**row, "id": f"r{n}"}) for n, row in enumerate(sentences(40))]
    lines[3], lines[17] = '{"instruction": "cut', '{"title": "no pair"}'
    path.write_text("\n".join(lines) + "\n")
    return path


def encode_flags(checkpoint, texts, output, *more):
    flags = ["--checkpoint", checkpoint, "--input", str(texts), "--output", str(output)]
    return [*flags, "--part-records", "10", "--rows-per-batch", "4", *more]


@pytest.fixture(scope="module")
def codes(tmp_path_factory, checkpoint, texts):
    path = tmp_path_factory.mktemp("codes") / "codes.parquet"
    assert encode.main(encode_flags(checkpoint, texts, path)) == 0
    return path


def the_error(capsys):
    """The one line of the error, which is the last on stderr, after the bar of loading weights."""
    line = capsys.readouterr().err.splitlines()[-1]
    assert line.startswith("error: ")
    return line


def fail_at(monkeypatch, name, call):
    """Let the model's method raise at its n-th call, as a kill between two batches."""
    real, calls = getattr(LlamaSoftPromptVAE, name), iter(range(10**6))

    def method(self, *args, **kwargs):
        if next(calls) == call:
            raise KeyboardInterrupt
        return real(self, *args, **kwargs)

    monkeypatch.setattr(LlamaSoftPromptVAE, name, method)


def test_bad_records_shift_no_id_and_order_is_that_of_the_input(codes, checkpoint):
    table = pq.read_table(codes)
    expected = [n for n in range(40) if n not in (3, 17)]
    assert table["id"].to_pylist() == expected
    assert table["record_id"].to_pylist() == [f"r{n}" for n in expected]
    # Each row is the code of its own text, whatever was encoded beside it.
    opened = open_run(checkpoint)
    for row in (0, 3, 20, 37):
        text = sentences(40)[expected[row]]["instruction"]
        with torch.no_grad():
            code = encode_tokens(opened, [opened.tokenizer.encode_instruction(text)], 1)
        for name, tensor in code.tensors().items():
            found = torch.tensor(table[name][row].as_py())
            torch.testing.assert_close(found, tensor[0], rtol=1e-5, atol=1e-6)


def test_skipped_records_are_counted_by_reason(checkpoint, texts, tmp_path, capsys):
    assert encode.main(encode_flags(checkpoint, texts, tmp_path / "c.parquet")) == 0
    said = capsys.readouterr().out
    assert "38 rows of 40 records" in said
    assert said.count("skipped: ") == 2 and "unknown format: 1" in said


@pytest.mark.parametrize("call", [2, 6, 11])
def test_a_killed_encode_continues_to_equal_bytes(
    codes, checkpoint, texts, tmp_path, monkeypatch, call
):
    flags = encode_flags(checkpoint, texts, tmp_path / "codes.parquet")
    with monkeypatch.context() as patch:
        fail_at(patch, "infer", call)
        assert encode.main(flags) == 130
    assert not (tmp_path / "codes.parquet").exists()
    # Of 3 batches a part, and one call that looks at shapes.
    parts = list((tmp_path / "codes.parquet.parts").glob("part-*"))
    assert len(parts) == (call - 1) // 3
    assert encode.main(flags) == 0
    assert (tmp_path / "codes.parquet").read_bytes() == codes.read_bytes()
    assert not (tmp_path / "codes.parquet.parts").exists()


def test_unfinished_work_on_another_input_is_refused(
    checkpoint, texts, tmp_path, monkeypatch, capsys
):
    output = tmp_path / "codes.parquet"
    with monkeypatch.context() as patch:
        fail_at(patch, "infer", 6)
        encode.main(encode_flags(checkpoint, texts, output))
    other = tmp_path / "other.txt"
    other.write_text("Another text.\n")
    capsys.readouterr()
    assert encode.main(encode_flags(checkpoint, other, output)) == 2
    said = the_error(capsys)
    assert "begun with another input" in said


def test_greedy_texts_are_those_of_generate(codes, checkpoint, tmp_path, capsys):
    output = tmp_path / "texts.jsonl"
    flags = ["--checkpoint", checkpoint, "--max-length", "12"]
    assert decode.main([*flags, "--input", str(codes), "--output", str(output)]) == 0
    capsys.readouterr()
    rows = [json.loads(line) for line in output.read_text().splitlines()]
    pairs = sentences(40)
    assert generate.main([*flags, "--text", *(pairs[r["id"]]["instruction"] for r in rows)]) == 0
    written = [f"{n}:  {row['text']}\n" for n, row in enumerate(rows, 1)]
    assert capsys.readouterr().out == "".join(written)
    assert len({row["text"] for row in rows}) > 1


@pytest.mark.parametrize("torn", [b"", b'{"id": 4, "te', b'{"id": 5}\n{"id"'])
def test_a_killed_decode_continues_to_equal_bytes(codes, checkpoint, tmp_path, monkeypatch, torn):
    def flags(name):
        output = ["--input", str(codes), "--output", str(tmp_path / name)]
        how = ["--from", "sample", "--temperature", "0.9", "--top-p", "0.9", "--seed", "5"]
        return ["--checkpoint", checkpoint, *output, *how, "--max-length", "8",
                "--rows-per-batch", "5"]  # fmt: skip

    assert decode.main(flags("whole.jsonl")) == 0
    with monkeypatch.context() as patch:
        fail_at(patch, "generate", 3)
        assert decode.main(flags("killed.jsonl")) == 130
    lines = tmp_path / "killed.jsonl.unfinished" / "lines.jsonl"
    assert lines.read_bytes().count(b"\n") == 15
    lines.write_bytes(lines.read_bytes() + torn)
    assert decode.main(flags("killed.jsonl")) == 0
    assert (tmp_path / "killed.jsonl").read_bytes() == (tmp_path / "whole.jsonl").read_bytes()


def test_codes_of_another_shape_are_refused(codes, make_checkpoint, tmp_path, capsys):
    other = make_checkpoint(kind="gaussian", latent_dim=4)
    output = str(tmp_path / "t.jsonl")
    assert decode.main(["--checkpoint", other, "--input", str(codes), "--output", output]) == 2
    said = the_error(capsys)
    assert "shapes=" in said


def test_codes_of_other_weights_are_refused_unless_told(
    codes, checkpoint, make_checkpoint, tmp_path, capsys
):
    """The same family and shapes from another seed; the same weights elsewhere are the same."""

    def flags(run, name, *more):
        files = ["--input", str(codes), "--output", str(tmp_path / name)]
        return ["--checkpoint", run, *files, "--max-length", "8", *more]

    other = make_checkpoint(seed=4, kind="gaussian", latent_dim=8)
    assert decode.main(flags(other, "refused.jsonl")) == 2
    said = the_error(capsys)
    assert "made by another checkpoint" in said and checkpoint in said
    assert "--any-checkpoint" in said and not (tmp_path / "refused.jsonl").exists()
    assert decode.main(flags(other, "forced.jsonl", "--any-checkpoint")) == 0
    # A copy has other files beside the weights, and may have another name.
    copy = tmp_path / "copied"
    shutil.copytree(checkpoint, copy)
    (copy / "README.md").write_text("moved\n")
    assert decode.main(flags(str(copy), "copied.jsonl")) == 0
    assert (tmp_path / "copied.jsonl").read_text() != (tmp_path / "forced.jsonl").read_text()


def test_a_file_from_before_the_hash_of_the_weights_is_judged_by_the_checkpoint(
    codes, checkpoint, make_checkpoint, tmp_path, capsys
):
    table = pq.read_table(codes)
    description = json.loads(table.schema.metadata[b"cdpvae"])
    del description["weights_sha256"]
    old = tmp_path / "old.parquet"
    pq.write_table(table.replace_schema_metadata({b"cdpvae": json.dumps(description)}), old)
    flags = ["--input", str(old), "--max-length", "4", "--output"]
    assert decode.main(["--checkpoint", checkpoint, *flags, str(tmp_path / "a.jsonl")]) == 0
    other = make_checkpoint(seed=4, kind="gaussian", latent_dim=8)
    assert decode.main(["--checkpoint", other, *flags, str(tmp_path / "b.jsonl")]) == 2
    assert "checkpoint_sha256" in the_error(capsys)


def test_a_file_without_codes_is_refused(checkpoint, texts, tmp_path, capsys):
    output = str(tmp_path / "t.jsonl")
    flags = ["--checkpoint", checkpoint, "--input", str(texts), "--output", output]
    assert decode.main(flags) == 2
    said = the_error(capsys)
    assert "cdpvae.encode" in said


def test_a_run_without_a_latent_has_no_codes(make_checkpoint, texts, tmp_path, capsys):
    flags = encode_flags(make_checkpoint(kind="none"), texts, tmp_path / "c.parquet")
    assert encode.main(flags) == 2
    assert "--latent none" in capsys.readouterr().err
