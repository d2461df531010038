import pytest

from cdpvae.compatibility.texts import InstructionDataset
from cdpvae.data import LlamaTokenizerWrapper
from cdpvae.data.example import Example


def test_instruction_dataset_tokenises_and_truncates(wrapper):
    short = LlamaTokenizerWrapper(wrapper.tokenizer, 6, 7)
    pairs = [("Write a story.", "The old sailor sold bread."), Example("Say a.", "a")]
    dataset = InstructionDataset(pairs, short)
    assert len(dataset) == 2
    assert dataset[0] == {
        "instruction_ids": short.encode_instruction("Write a story."),
        "response_ids": short.encode_response("The old sailor sold bread."),
    }
    assert dataset[-1]["response_ids"] == short.encode_response("a")
    assert dataset.response_lengths.tolist() == [7, 3]
    assert [row["response_ids"].tolist() for row in dataset.rows([1, 0])] == [
        dataset[1]["response_ids"],
        dataset[0]["response_ids"],
    ]
    with pytest.raises(IndexError):
        dataset[2]


def test_reconstruction_reads_what_it_writes(wrapper):
    row = InstructionDataset([("ask", "reply")], wrapper, target="reconstruction")[0]
    assert row["instruction_ids"] == wrapper.encode_instruction("reply")
    assert row["response_ids"] == wrapper.encode_response("reply")
    with pytest.raises(ValueError, match="target='both' must be response or reconstruction"):
        InstructionDataset([("ask", "reply")], wrapper, target="both")
