"""A fair small backbone: words as tokens, dropout, and the best of several epochs."""

import json

import pytest
import torch
from transformers import AutoModelForCausalLM

from cdpvae.data import LlamaTokenizerWrapper
from cdpvae.sample import language_model
from cdpvae.sample.backbone import BackboneOptions, build_model, make_backbone
from cdpvae.sample.language_model import evaluate, fit, residual_dropout, token_nll
from cdpvae.sample.tokenizer import TokenSequence, encode, train_tokenizer

TINY = {"hidden": 32, "layers": 1, "heads": 2, "tokenizer": "word", "batch_size": 8}
TEXTS = [(f"the {noun} of {name} has <unk> N",) for noun in "abcdefgh" for name in "pqrst"]


def tiny(**changes):
    tokenizer = train_tokenizer(TEXTS, 64, 64, "word")
    torch.manual_seed(0)
    options = BackboneOptions(**{**TINY, **changes})
    return build_model(options, tokenizer), encode(tokenizer, TEXTS, 64), options


def test_a_word_tokenizer_has_a_token_for_each_word():
    """`<unk>` of the corpus is a word like any other; what is not known has another token."""
    tokenizer = train_tokenizer(TEXTS, 64, 64, "word")
    ids = LlamaTokenizerWrapper(tokenizer).encode_response("the a of p has <unk> N")
    assert len(ids) == 9 and tokenizer.unk_token_id not in ids
    assert LlamaTokenizerWrapper(tokenizer).decode(ids) == "the a of p has <unk> N"
    strange = LlamaTokenizerWrapper(tokenizer).encode_response("the zebra of p")
    assert strange.count(tokenizer.unk_token_id) == 1 and len(strange) == 6


def test_the_most_frequent_words_are_kept():
    """4 special tokens, then the five words of every text."""
    vocabulary = set(train_tokenizer(TEXTS, 9, 64, "word").get_vocab())
    assert {"the", "of", "has", "<unk>", "N"} <= vocabulary and len(vocabulary) == 9
    with pytest.raises(ValueError, match="vocab_size=4 must be above 4"):
        train_tokenizer(TEXTS, 4, 64, "word")
    with pytest.raises(ValueError, match="tokenizer='char' must be one of bpe, word"):
        train_tokenizer(TEXTS, 64, 64, "char")


def test_dropout_acts_in_training_alone_and_leaves_no_trace():
    model, rows, _ = tiny()
    plain = token_nll(model.train(), rows)
    with residual_dropout(model, 0.5):
        dropped = [token_nll(model, rows) for _ in range(2)]
        assert not torch.allclose(dropped[0], plain) and not torch.allclose(*dropped)
        model.eval()
        assert torch.equal(token_nll(model, rows), plain)
    assert torch.equal(token_nll(model.train(), rows), plain)


def test_the_best_epoch_is_kept(monkeypatch):
    """Validations of 5, 3, 4, 4: the second is best, and two without gain end the training."""
    model, rows, options = tiny(epochs=9, patience=2)
    seen = []

    def scripted(model, held_out, batch_size):
        seen.append({name: value.clone() for name, value in model.state_dict().items()})
        return {"validation_nll_per_response": [5.0, 3.0, 4.0, 4.0, 1.0][len(seen) - 1]}

    monkeypatch.setattr(language_model, "evaluate", scripted)
    record = fit(model, rows, rows, options.fit_options())
    assert record["validation_curve"] == [5.0, 3.0, 4.0, 4.0]
    assert record["best_epoch"] == 2 and record["steps_taken"] == 4 * 5
    for name, value in model.state_dict().items():
        assert torch.equal(value, seen[1][name]), name
    assert any(not torch.equal(seen[1][name], seen[3][name]) for name in seen[1])


def test_a_validation_file_holds_out_its_texts_and_nothing_else(tmp_path):
    (tmp_path / "train.txt").write_text("\n".join(text for (text,) in TEXTS))
    (tmp_path / "valid.txt").write_text("\n".join(f"{text} today" for (text,) in TEXTS[:7]))
    options = BackboneOptions(
        input=str(tmp_path / "train.txt"),
        validation_input=str(tmp_path / "valid.txt"),
        output=str(tmp_path / "out"),
        epochs=2,
        dropout=0.1,
        **TINY,
    )
    record = make_backbone(options)
    assert record["training_rows"] == len(TEXTS) and record["validation_rows"] == 7
    assert len(record["validation_curve"]) == 2
    # The curve's best is what was saved, by the same measure and on the same texts.
    best = min(record["validation_curve"])
    assert record["validation_nll_per_response"] == pytest.approx(best, rel=1e-6)
    tokenizer = json.loads((tmp_path / "out" / "tokenizer.json").read_text())
    assert "today" not in tokenizer["model"]["vocab"]
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "out").eval()
    unknown = tokenizer["model"]["vocab"]["<|unknown|>"]
    again = evaluate(model, [TokenSequence([1, 5, unknown, 2], 0)], 1)
    assert again["validation_nll_per_token"] > 0


@pytest.mark.parametrize(
    "changes, message",
    [
        ({"dropout": 1.0}, r"dropout=1.0 must lie in \[0, 1\)"),
        ({"epochs": 0}, "epochs=0 must be at least 1"),
        ({"patience": 0}, "patience=0 must be at least 1"),
    ],
)
def test_impossible_training(changes, message):
    with pytest.raises(ValueError, match=message):
        BackboneOptions(input="x", output="y", **{**TINY, **changes}).check()
