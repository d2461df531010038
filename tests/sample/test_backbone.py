"""The embedded backbone: an ordinary Hugging Face directory, trained on what it should be."""

import json
import math

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from cdpvae import tiny_backbone
from cdpvae.sample.backbone import BackboneOptions, build_model, make_backbone
from cdpvae.sample.language_model import batches, evaluate, learning_rate_factor, token_nll
from cdpvae.sample.pairs import make_pairs
from cdpvae.sample.texts import Text, read_texts, split_texts
from cdpvae.sample.tokenizer import TokenSequence, encode, train_tokenizer

SMALL = {"hidden": 32, "layers": 1, "heads": 2, "vocab_size": 400, "steps": 30, "batch_size": 16}
SMALL |= {"learning_rate": 1e-2}


@pytest.fixture(scope="module")
def pairs_file(tmp_path_factory):
    path = tmp_path_factory.mktemp("text") / "pairs.jsonl"
    path.write_text("".join(json.dumps(r) + "\n" for r in make_pairs(300, 20, 0)))
    return path


@pytest.fixture(scope="module")
def backbone(pairs_file, tmp_path_factory):
    directory = tmp_path_factory.mktemp("backbone")
    options = BackboneOptions(input=str(pairs_file), output=str(directory), **SMALL)
    return directory, make_backbone(options)


def test_loads_as_any_hugging_face_directory(backbone):
    directory, record = backbone
    model = AutoModelForCausalLM.from_pretrained(directory)
    tokenizer = AutoTokenizer.from_pretrained(directory)
    assert type(model).__name__ == "LlamaForCausalLM"
    assert model.dtype == torch.float32
    assert len(tokenizer) == model.config.vocab_size == record["vocab_size"]
    assert model.config.bos_token_id == tokenizer.bos_token_id
    assert model.config.eos_token_id == tokenizer.eos_token_id
    assert model.config.pad_token_id == tokenizer.pad_token_id
    specials = {tokenizer.bos_token, tokenizer.eos_token, tokenizer.pad_token, tokenizer.unk_token}
    assert specials == {"<s>", "</s>", "<pad>", "<unk>"}


def test_tokenizer_keeps_any_text_and_adds_bos_once(backbone):
    tokenizer = AutoTokenizer.from_pretrained(backbone[0])
    text = "Zwölf  Bäume,\n\tund 東京 🎈 <tag>"
    ids = tokenizer(text)["input_ids"]
    assert ids[0] == tokenizer.bos_token_id and ids.count(tokenizer.bos_token_id) == 1
    assert tokenizer.unk_token_id not in ids
    assert tokenizer.decode(ids, skip_special_tokens=True) == text
    assert tokenizer(text, add_special_tokens=False)["input_ids"] == ids[1:]


def test_recorded_validation_loss_is_that_of_the_saved_model(backbone, pairs_file):
    """Oracle: transformers' own loss, one sequence at a time, from the files."""
    directory, record = backbone
    assert json.loads((directory / "training.json").read_text()) == record
    model = AutoModelForCausalLM.from_pretrained(directory).eval()
    tokenizer = AutoTokenizer.from_pretrained(directory)
    held_out = [json.loads(line) for line in pairs_file.read_text().splitlines()]
    held_out = [r for r in held_out if r["split"] == "validation"]
    total = tokens = tail = 0.0
    for row in held_out:
        first = tokenizer(row["instruction"])["input_ids"]
        second = [*tokenizer(row["output"])["input_ids"], tokenizer.eos_token_id]
        ids = torch.tensor([first + second])
        labels = ids.clone()
        with torch.no_grad():
            total += model(input_ids=ids, labels=labels).loss.item() * (ids.shape[1] - 1)
            labels[:, : len(first) + 1] = -100
            tail += model(input_ids=ids, labels=labels).loss.item() * (len(second) - 1)
        tokens += ids.shape[1] - 1
    assert record["validation_rows"] == len(held_out) == 20
    assert record["validation_nll_per_token"] == pytest.approx(total / tokens, rel=1e-5)
    assert record["validation_nll_per_response"] == pytest.approx(tail / 20, rel=1e-5)


def test_training_learns(backbone):
    """Thirty steps are enough to beat a uniform guess by far on text never trained on."""
    _, record = backbone
    assert record["validation_nll_per_token"] < math.log(record["vocab_size"]) - 1.5


def test_same_seed_same_bytes(backbone, pairs_file, tmp_path):
    def weights(directory):
        return (directory / "model.safetensors").read_bytes()

    options = {"input": str(pairs_file), **SMALL}
    make_backbone(BackboneOptions(output=str(tmp_path / "again"), **options))
    make_backbone(BackboneOptions(output=str(tmp_path / "other"), seed=1, **options))
    assert weights(tmp_path / "again") == weights(backbone[0])
    assert weights(tmp_path / "other") != weights(backbone[0])


def test_second_flavour(pairs_file, tmp_path):
    """Tied head, head_dim other than hidden / heads, grouped keys and values."""
    options = {**SMALL, "heads": 4, "kv_heads": 1, "head_dim": 12, "tie_embeddings": True}
    output = tmp_path / "flavour"
    make_backbone(
        BackboneOptions(input=str(pairs_file), output=str(output), **{**options, "steps": 3})
    )
    model = AutoModelForCausalLM.from_pretrained(output)
    assert model.lm_head.weight is model.model.embed_tokens.weight
    attention = model.model.layers[0].self_attn
    assert attention.q_proj.weight.shape == (48, 32)
    assert attention.k_proj.weight.shape == (12, 32)


def test_plain_text_lines(tmp_path):
    path = tmp_path / "lines.txt"
    path.write_text("\n".join(f"The number {i} comes after {i - 1}." for i in range(1, 101)))
    record = make_backbone(
        BackboneOptions(input=str(path), output=str(tmp_path / "out"), **{**SMALL, "steps": 2})
    )
    assert record["training_rows"] == 98 and record["validation_rows"] == 2
    tokens = record["validation_nll_per_response"] / record["validation_nll_per_token"]
    # Six words, a full stop and EOS: a plain line counts from its first token after BOS.
    assert tokens > 7.9


def test_padding_changes_no_loss(backbone):
    model = AutoModelForCausalLM.from_pretrained(backbone[0]).eval()
    rows = [TokenSequence([1, *range(10, 10 + n), 2], 0) for n in (3, 9, 5)]
    with torch.no_grad():
        together = token_nll(model, rows)
        for row, nll in zip(rows, together, strict=True):
            count = len(row.ids) - 1
            torch.testing.assert_close(nll[:count], token_nll(model, [row])[0])
            assert not nll[count:].any()


def test_validation_is_kept_apart():
    marked = [Text((str(i),), "validation" if i % 4 == 0 else "train") for i in range(20)]
    train, held_out = split_texts(marked, seed=0)
    assert held_out == [(str(i),) for i in range(0, 20, 4)]
    assert sorted(train + held_out) == sorted(text.parts for text in marked)
    unmarked = [Text((str(i),)) for i in range(200)]
    train, held_out = split_texts(unmarked, seed=0)
    assert len(held_out) == 4 and not set(train) & set(held_out)
    with pytest.raises(ValueError, match="nothing is left to train on"):
        split_texts([Text(("a",), "validation"), Text(("b",), "validation")], seed=0)


def test_validation_text_does_not_reach_the_tokenizer(tmp_path):
    path = tmp_path / "pairs.jsonl"
    rows = [{"text": "plain words here", "split": "train"}] * 9
    rows += [{"text": "xylophone " * 20, "split": "validation"}]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    train, _ = split_texts(read_texts(str(path))[0], seed=0)
    vocabulary = train_tokenizer(train, 300, 64).get_vocab()
    assert "xy" not in vocabulary and "Ġwords" in vocabulary


def test_each_epoch_shows_every_sequence_once():
    sequences = [TokenSequence(list(range(n)), 0) for n in range(2, 39)]
    stream = batches(sequences, batch_size=4, seed=0)
    for _ in range(2):
        epoch = [len(s.ids) for _ in range(10) for s in next(stream)]
        assert sorted(epoch) == list(range(2, 39))


def test_learning_rate_schedule():
    factors = [learning_rate_factor(step, 100) for step in range(100)]
    assert factors[0] == pytest.approx(0.1) and factors[9] == factors[10] == 1.0
    assert factors[55] == pytest.approx(0.55)
    assert 0.1 <= factors[-1] < 0.101


@pytest.mark.parametrize(
    "record, expected",
    [
        ({"instruction": "a", "output": "b"}, Text(("a", "b"))),
        ({"instruction": "a", "response": "b", "split": "train"}, Text(("a", "b"), "train")),
        ({"conversations": [{"from": "human", "value": "a"}, {"from": "gpt", "value": "b"}]},
         Text(("a", "b"))),
        # One part: trained once, as the decoder of a reconstruction sees it.
        ({"text": "one\u2028line"}, Text(("one\u2028line",))),
    ],
)  # fmt: skip
def test_reads_records(tmp_path, record, expected):
    (tmp_path / "x.jsonl").write_text(f"{json.dumps(record)}\n" * 2 + '{"instruction": "a"}\n[\n')
    texts, skipped = read_texts(str(tmp_path / "x.jsonl"))
    assert texts == [expected] * 2
    assert len(skipped) == 2 and set(skipped.values()) == {1}
    (tmp_path / "x.json").write_text(json.dumps([record] * 3))
    assert read_texts(str(tmp_path / "x.json")) == ([expected] * 3, {})


def test_too_little_text_is_named(tmp_path):
    (tmp_path / "x.txt").write_text("one line\n")
    with pytest.raises(ValueError, match="x.txt: 1 usable texts, at least 2"):
        read_texts(str(tmp_path / "x.txt"))
    (tmp_path / "x.jsonl").write_text('{"instruction": "a"}\n' * 5)
    with pytest.raises(ValueError, match="0 usable texts.*; 5 skipped: no key output"):
        read_texts(str(tmp_path / "x.jsonl"))


@pytest.mark.parametrize(
    "changes, message",
    [
        ({"heads": 5}, "hidden=32 must be a multiple of heads=5"),
        ({"kv_heads": 3}, "heads=2 must be a multiple of kv_heads=3"),
        ({"head_dim": 7}, "head_dim=7 must be even"),
        ({"vocab_size": 259}, "vocab_size=259 must be at least 260"),
        ({"steps": 0}, "steps=0 must be at least 1"),
    ],
)
def test_impossible_dimensions(pairs_file, tmp_path, changes, message):
    options = BackboneOptions(
        input=str(pairs_file), output=str(tmp_path / "out"), **{**SMALL, **changes}
    )
    with pytest.raises(ValueError, match=message):
        make_backbone(options)
    assert not (tmp_path / "out").exists()


def test_embeddings_of_padding_stay_zero(backbone):
    """Word dropout shows the pad token to the decoder: it must carry no word's meaning."""
    model = AutoModelForCausalLM.from_pretrained(backbone[0])
    assert not model.model.embed_tokens.weight[model.config.pad_token_id].any()
    assert model.model.embed_tokens.weight[model.config.bos_token_id].any()


def test_untrained_model_is_near_uniform(pairs_file):
    """The starting point of `test_training_learns`."""
    train, held_out = split_texts(read_texts(str(pairs_file))[0], seed=0)
    tokenizer = train_tokenizer(train, 400, 64)
    torch.manual_seed(0)
    model = build_model(BackboneOptions(**SMALL), tokenizer)
    rows = encode(tokenizer, held_out, 64)
    record = evaluate(model, rows, batch_size=8)
    assert record["validation_nll_per_token"] == pytest.approx(math.log(len(tokenizer)), abs=0.3)


def test_command_runs_and_its_errors_are_one_line(pairs_file, tmp_path, capsys):
    flags = [f"--{key.replace('_', '-')}={value}" for key, value in SMALL.items()]
    output = tmp_path / "out"
    arguments = ["--input", str(pairs_file), "--output", str(output), *flags, "--steps", "2"]
    assert tiny_backbone.main(arguments) == 0
    assert "step 2/2  loss" in capsys.readouterr().out
    assert (output / "config.json").exists()
    for wrong, message in (
        (["--output", "x"], "--input is missing"),
        (["--input", str(tmp_path / "none.txt"), "--output", "x"], "none.txt"),
        (["--input", str(pairs_file), "--output", "x", "--hiden", "3"], "--hiden"),
    ):
        assert tiny_backbone.main(wrong) == 2
        error = capsys.readouterr().err
        assert message in error and error.count("\n") == 1
