import os
import subprocess
import sys

import pytest

from cdpvae.data import LlamaTokenizerWrapper

# Plain; white space, accents, another script, an emoji and code; a single letter.
TEXTS = ["The old sailor sold bread.", "  naïve 你好 🙂\r\n\tdef f(x): return x", "a"]


@pytest.mark.parametrize("text", TEXTS)
def test_frames_and_round_trips(wrapper, text):
    instruction, response = wrapper.encode_instruction(text), wrapper.encode_response(text)
    assert instruction[0] == response[0] == wrapper.bos_id
    assert response == [*instruction, wrapper.eos_id]
    assert wrapper.bos_id not in response[1:] and response.count(wrapper.eos_id) == 1
    assert wrapper.decode(response) == wrapper.decode(instruction) == text


def test_batches_equal_single_calls(wrapper):
    assert wrapper.encode_instructions(TEXTS) == [wrapper.encode_instruction(t) for t in TEXTS]
    assert wrapper.encode_responses(TEXTS) == [wrapper.encode_response(t) for t in TEXTS]


def test_truncation_keeps_eos_and_counts_special_tokens(wrapper):
    short = LlamaTokenizerWrapper(wrapper.tokenizer, 4, 5)
    full = wrapper.encode_response(TEXTS[1])
    assert short.encode_instruction(TEXTS[1]) == full[:4]
    assert short.encode_response(TEXTS[1]) == [*full[:4], wrapper.eos_id]
    assert short.encode_responses([TEXTS[1]], truncate=False) == [full]
    fitting = wrapper.decode(full[:4])
    assert short.encode_response(fitting) == [*full[:4], wrapper.eos_id]


def test_special_tokens_spelled_in_a_text_stay_text(wrapper):
    text = "say </s> and <s> twice"
    ids = wrapper.encode_response(text)
    assert not set(ids[1:-1]) & wrapper.special_ids
    assert wrapper.decode(ids) == text


def test_the_callers_tokenizer_is_not_changed(build_tokenizer):
    tokenizer = build_tokenizer(bos_token="<s>", eos_token="</s>")
    tokenizer.backend_tokenizer.enable_truncation(2)
    wrapper = LlamaTokenizerWrapper(tokenizer)
    assert wrapper.decode(wrapper.encode_response(TEXTS[1])) == TEXTS[1]
    assert tokenizer.backend_tokenizer.truncation["max_length"] == 2
    assert tokenizer.convert_tokens_to_ids("</s>") in tokenizer("say </s>")["input_ids"]


def test_pad_is_the_tokenizers_then_llamas_then_eos(build_tokenizer):
    roles = {"bos_token": "<s>", "eos_token": "</s>"}
    llama_pad = "<|finetune_right_pad_id|>"
    own = LlamaTokenizerWrapper(build_tokenizer((llama_pad,), **roles, pad_token="<pad>"))
    assert own.pad_id == own.tokenizer.convert_tokens_to_ids("<pad>")
    llama = LlamaTokenizerWrapper(build_tokenizer((llama_pad,), **roles))
    assert llama.pad_id == llama.tokenizer.convert_tokens_to_ids(llama_pad)
    neither = LlamaTokenizerWrapper(build_tokenizer(**roles))
    assert neither.pad_id == neither.eos_id


def test_special_tokens_are_all_known(build_tokenizer):
    wrapper = LlamaTokenizerWrapper(
        build_tokenizer(("<|reserved|>",), bos_token="<s>", eos_token="</s>", unk_token="<unk>")
    )
    ids = wrapper.tokenizer.convert_tokens_to_ids(["<s>", "</s>", "<unk>", "<|reserved|>"])
    tokens = wrapper.special_tokens()
    assert (tokens.bos, tokens.eos, tokens.unk) == tuple(ids[:3])
    assert tokens.special == tuple(sorted(ids)) and wrapper.special_ids == set(ids)
    assert wrapper.content([*ids, 300]) == [ids[2], ids[3], 300]
    assert wrapper.largest_id == len(wrapper) - 1


@pytest.mark.parametrize(
    ("roles", "message"),
    [({"eos_token": "</s>"}, "has no BOS token"), ({"bos_token": "<s>"}, "has no EOS token")],
)
def test_a_tokenizer_without_bos_or_eos_is_refused(build_tokenizer, roles, message):
    with pytest.raises(ValueError, match=message):
        LlamaTokenizerWrapper(build_tokenizer(**roles))


def test_limits_without_room_for_a_token_are_refused(wrapper):
    with pytest.raises(ValueError, match="max_response_tokens=2 at least 3"):
        LlamaTokenizerWrapper(wrapper.tokenizer, 512, 2)


def test_a_directory_without_a_tokenizer_is_one_clear_error(tmp_path):
    with pytest.raises(ValueError, match="cannot be loaded") as error:
        LlamaTokenizerWrapper.from_pretrained(str(tmp_path))
    assert "\n" not in str(error.value)


def test_fingerprint_survives_saving_and_another_process(wrapper, tokenizer_dir):
    code = (
        "import sys; from cdpvae.data.tokenizer import LlamaTokenizerWrapper as W; "
        "print(W.from_pretrained(sys.argv[1]).fingerprint())"
    )
    # String hashing differs between processes; here it certainly does.
    environment = {**os.environ, "PYTHONHASHSEED": "12345"}
    command = [sys.executable, "-c", code, str(tokenizer_dir)]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=True)
    assert done.stdout.strip() == wrapper.fingerprint()


def test_fingerprint_sees_special_ids_and_splitting(build_tokenizer, wrapper):
    with_pad = build_tokenizer(bos_token="<s>", eos_token="</s>")
    with_pad.pad_token = "a"
    assert LlamaTokenizerWrapper(with_pad).fingerprint() != wrapper.fingerprint()
    prefixed = build_tokenizer(bos_token="<s>", eos_token="</s>")
    prefixed.backend_tokenizer.pre_tokenizer.add_prefix_space = True
    other = LlamaTokenizerWrapper(prefixed)
    assert other.tokenizer.get_vocab() == wrapper.tokenizer.get_vocab()
    assert other.fingerprint() != wrapper.fingerprint()
