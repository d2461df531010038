"""A decoder that reads the instruction: against transformers over the whole sequence.

Tolerance in fp32: at most twice the error of transformers in fp32 against itself in fp64, the
largest over all tensors, relative to their norm. In fp64 both take norms and losses in fp32: 1e-6.
"""

from __future__ import annotations

import dataclasses

import pytest
import torch
from peft.tuners.lora import LoraLayer
from torch.nn import functional as F

from cdpvae.batch import PackedText, StepSchedule, VAEBatch
from cdpvae.config import NoLatentConfig
from cdpvae.evaluation.likelihood import backbone_nll, sequence_nll
from cdpvae.models.text_vae.decoder_text import DecoderText
from cdpvae.tasks.text_vae.module import loss_inputs
from cdpvae_kernels import linear_cross_entropy

READING = {"latent": NoLatentConfig(), "decoder_reads": "instruction"}
LABEL_OF_NOTHING = -100


def schedule(batch, **changes) -> StepSchedule:
    values = {"step": 0, "epoch": 0, "beta": 0.0, "weights": {}, "word_dropout": 0.0}
    return StepSchedule(**{**values, "target_divisor": float(len(batch.targets)), **changes})


def rows_of(batch) -> list[tuple[list[int], list[int]]]:
    pairs = zip(batch.instruction.rows(), batch.response.rows(), strict=True)
    return [(instruction.tolist(), response.tolist()) for instruction, response in pairs]


def oracle_nll(llama, instruction: list[int], response: list[int]) -> torch.Tensor:
    """The summed loss of transformers' own model over the concatenation."""
    ids = torch.tensor([instruction + response])
    labels = ids.clone()
    # The BOS of the response is given, like the instruction.
    labels[:, : len(instruction) + 1] = LABEL_OF_NOTHING
    targets = len(response) - 1
    return llama(input_ids=ids, labels=labels).loss * targets


def merged_oracle(model, make_llama, dtype=torch.float64):
    """Plain transformers with the same weights: W + scaling B A where there is LoRA."""
    llama, lora = make_llama().to(dtype), {}
    for name, module in model.backbone.llama.named_modules():
        if isinstance(module, LoraLayer):
            a, b = module.lora_A["default"].weight, module.lora_B["default"].weight
            scaling = module.scaling["default"]
            with torch.no_grad():
                llama.get_submodule(name).weight += (scaling * b.double() @ a.double()).to(dtype)
            lora[name] = (a, b, scaling)
    return llama, lora


def loss_of(model, batch, divisor: float) -> torch.Tensor:
    """The reconstruction loss of a forward pass, summed targets over the divisor."""
    output = model(batch, schedule(batch))
    inputs = loss_inputs(model, batch, output)
    return linear_cross_entropy(
        inputs.hidden,
        inputs.head_weight,
        inputs.targets,
        positions=inputs.positions,
        divisor=divisor,
    )


def oracle_of(model, make_llama, batch, dtype) -> list[torch.Tensor]:
    """NLL of every row and the gradients of all LoRA matrices by transformers, fp64."""
    llama, lora = merged_oracle(model, make_llama, dtype)
    # Every row by itself; the loss of the batch is a mean over all of its targets.
    nll = torch.stack([oracle_nll(llama, *row) for row in rows_of(batch)])
    (nll.sum() / len(batch.targets)).backward()
    found = [nll.detach()]
    for name, (a, b, scaling) in lora.items():
        # By the chain rule from the gradient of the merged weight.
        whole = llama.get_submodule(name).weight.grad.double()
        found += [scaling * b.detach().double().T @ whole, scaling * whole @ a.detach().double().T]
    return [tensor.double() for tensor in found]


@pytest.mark.parametrize("perturbed", [False, True], ids=["LoRA at init", "perturbed LoRA"])
def test_loss_and_gradients_are_those_of_transformers(make_model, make_llama, batch, perturbed):
    model = make_model(**READING).float()
    for name, parameter in model.named_parameters():
        if "lora_B" in name and not perturbed:
            torch.nn.init.zeros_(parameter)
    exact, same = (oracle_of(model, make_llama, batch, t) for t in (torch.float64, torch.float32))
    # All rows packed.
    with torch.no_grad():
        nll = sequence_nll(model, torch.zeros(4, 0), batch.response, batch.instruction)
    loss = loss_of(model, batch, float(len(batch.targets)))
    loss.backward()
    assert loss.item() == pytest.approx(float(exact[0].sum()) / len(batch.targets), rel=1e-5)
    found = [nll.double()]
    for module in model.backbone.llama.modules():
        if isinstance(module, LoraLayer):
            weights = module.lora_A["default"].weight, module.lora_B["default"].weight
            found += [weight.grad.double() for weight in weights]
    assert len(found) == len(exact) == 1 + 2 * 21

    def error(tensors) -> float:
        gaps = [float((x - y).norm()) for x, y in zip(tensors, exact, strict=True)]
        sizes = [float(y.norm()) for y in exact]
        return max(gap / size for gap, size in zip(gaps, sizes, strict=True) if size)

    assert error(found) <= 2 * error(same) < 1e-3
    # LoRA starts at B = 0, where A has no gradient.
    for ours, theirs in zip(found, exact, strict=True):
        assert bool(ours.any()) == bool(theirs.any())


def test_without_it_nothing_of_the_instruction_is_read(make_model, make_llama, batch):
    """The first baseline: plain transformers over `[BOS] response [EOS]`, whatever is given."""
    model = make_model(latent=NoLatentConfig())
    llama, _ = merged_oracle(model, make_llama)
    z = torch.zeros(4, 0)
    with torch.no_grad():
        expected = torch.stack([oracle_nll(llama, [], response) for _, response in rows_of(batch)])
        for instruction in (None, batch.instruction):
            nll = sequence_nll(model, z, batch.response, instruction)
            torch.testing.assert_close(nll, expected.to(nll), rtol=1e-6, atol=1e-6)


def test_the_backbone_itself_can_read_the_instruction_too(make_model, make_llama, batch):
    model, llama = make_model(**READING), make_llama()
    with torch.no_grad():
        expected = torch.stack([oracle_nll(llama, *row) for row in rows_of(batch)])
    nll = backbone_nll(model, batch.response, batch.instruction)
    torch.testing.assert_close(nll, expected.to(nll), rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("settings", [{}, {"deep_prefix": True}], ids=["prompts", "deep prefix"])
def test_with_a_latent_a_packed_row_is_the_row_by_itself(make_model, batch, settings):
    """Prompts, instruction, response: by itself each row is embedded end to end."""
    model = make_model(decoder_reads="instruction", **settings)
    z = torch.randn(4, 6, generator=torch.Generator().manual_seed(3), dtype=torch.float64)
    with torch.no_grad():
        decoded = model.decode(z, batch.response.ids, batch.response, batch.instruction)
        packed = decoded.hidden[decoded.positions].split(batch.response.lengths.tolist())
        for row, (instruction, response) in enumerate(rows_of(batch)):
            alone = model.decode(
                z[row : row + 1],
                torch.tensor(response),
                PackedText.from_lists([response]),
                PackedText.from_lists([instruction]),
            )
            torch.testing.assert_close(packed[row], alone.hidden[alone.positions])
            # A decoder that reads nothing, given the concatenation as its response.
            plain = make_model(**settings)
            plain.load_state_dict(model.state_dict())
            both = PackedText.from_lists([instruction + response])
            other = plain.decode(z[row : row + 1], both.ids, both)
            torch.testing.assert_close(packed[row], other.hidden[other.positions][-len(response) :])


def test_positions_are_those_of_the_response_alone(batch):
    read = DecoderText.of(batch.response.ids, batch.response, batch.instruction)
    expected = [instruction + response for instruction, response in rows_of(batch)]
    assert [ids.tolist() for ids in read.text.rows()] == expected
    assert torch.equal(read.text.ids[read.positions], batch.response.ids)
    assert read.text.max_len == max(map(len, expected))
    three = PackedText.from_lists([[1]] * 3)
    with pytest.raises(ValueError, match="3 instructions but 4 responses"):
        DecoderText.of(batch.response.ids, batch.response, three)


def test_word_dropout_leaves_the_instruction_alone(make_model, batch, monkeypatch):
    model = make_model(**READING).train()
    seen = []
    of = DecoderText.of.__func__
    monkeypatch.setattr(
        DecoderText, "of", classmethod(lambda cls, *a: seen.append(of(cls, *a)) or seen[-1])
    )
    model(batch, schedule(batch, word_dropout=0.9), seed=0)
    (read,) = seen
    dropped = read.text.ids[read.positions]
    assert (dropped == model.tokens.pad).sum() > 5
    instruction = torch.ones_like(read.text.ids, dtype=torch.bool)
    instruction[read.positions] = False
    assert torch.equal(read.text.ids[instruction], batch.instruction.ids)
    # What is dropped of the response is what a decoder without the instruction drops.
    plain = make_model(latent=NoLatentConfig()).train()
    expected = plain._drop_words(batch, schedule(batch, word_dropout=0.9), 0)
    assert torch.equal(dropped, expected)


@pytest.mark.parametrize("settings", [READING, {"decoder_reads": "instruction"}])
def test_two_micro_batches_are_one(make_model, batch, settings):
    def part(rows: slice) -> VAEBatch:
        chosen = rows_of(batch)[rows]
        texts = (PackedText.from_lists(list(side)) for side in zip(*chosen, strict=True))
        return VAEBatch.build(*texts, batch.sample_index[rows])

    model, divisor, gradients = make_model(**settings), float(len(batch.targets)), []
    for parts in ([batch], [part(slice(0, 1)), part(slice(1, 4))]):
        model.zero_grad()
        for one in parts:
            loss_of(model, one, divisor).backward()
        gradients.append([p.grad.clone() for p in model.parameters() if p.grad is not None])
    for one, two in zip(*gradients, strict=True):
        torch.testing.assert_close(one, two, rtol=1e-6, atol=1e-7)


def test_a_missing_instruction_is_one_line(make_model, batch):
    model = make_model(**READING)
    for call in (
        lambda: model.decode(None, batch.response.ids, batch.response),
        lambda: model.generate(None),
        lambda: model.sample(2),
    ):
        with pytest.raises(ValueError, match=r"its decoder needs the instruction of every row$"):
            call()


@pytest.mark.parametrize("settings", [READING, {"decoder_reads": "instruction"}])
def test_written_texts_are_the_argmax_of_one_full_pass(make_model, batch, settings):
    """Instructions of unequal length are read together, and every text is its row's own."""
    model = make_model(**settings)
    z = None
    if model.projector is not None:
        z = torch.randn(4, 6, generator=torch.Generator().manual_seed(1))
    ids = model.generate(z, max_length=9, temperature=0, instruction=batch.instruction)
    assert ids.shape[1] <= 9
    rows = [[model.tokens.bos, *row] for row in ids.tolist()]
    text = PackedText.from_lists(rows)
    with torch.no_grad():
        latents = None if z is None else z.double()
        decoded = model.decode(latents, text.ids, text, batch.instruction)
        logits = F.linear(decoded.hidden[decoded.positions], model.backbone.head_weight)
    chosen = logits.argmax(-1).view(4, -1)[:, :-1]
    for row in range(4):
        for step, token in enumerate(ids[row].tolist()):
            assert int(chosen[row, step]) == token
            if token == model.tokens.eos:
                break
        # The row by itself.
        instruction = PackedText.from_lists([batch.instruction.rows()[row].tolist()])
        alone = model.generate(
            None if z is None else z[row : row + 1],
            max_length=9,
            temperature=0,
            instruction=instruction,
        )
        assert torch.equal(ids[row, : alone.shape[1]], alone[0])
        assert (ids[row, alone.shape[1] :] == model.tokens.pad).all()


def test_rows_end_and_begin_at_different_steps(make_model, monkeypatch):
    """Row 0 has one token to read, row 1 three; what is chosen for row 1 meanwhile is not used."""
    model = make_model(**READING)
    script = iter([[9, 50], [2, 51], [8, 7], [8, 6], [8, 2], [8, 8]])
    monkeypatch.setattr(
        "cdpvae.models.text_vae.generation.choose_token", lambda *_: torch.tensor(next(script))
    )
    instruction = PackedText.from_lists([[1], [1, 30, 31]])
    ids = model.generate(None, max_length=50, instruction=instruction)
    assert ids.tolist() == [[9, 2, 3], [7, 6, 2]]
    # At most so many tokens of every row, counted from its own beginning.
    script = iter([[9, 50], [9, 51], [8, 7], [8, 6], [8, 5]])
    ids = model.generate(None, max_length=2, instruction=instruction)
    assert ids.tolist() == [[9, 9], [7, 6]]


def test_augmented_views_are_not_read(make_model, batch):
    model = make_model(decoder_reads="instruction")
    view = PackedText.from_lists([[1, 9]] * 4)
    changed = dataclasses.replace(batch, augmented=view)
    assert torch.equal(model(batch).decoded.hidden, model(changed).decoded.hidden)
