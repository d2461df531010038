"""Baselines of two kinds: each is compared with what it may be compared with, and named."""

from __future__ import annotations

import pytest
import torch

from cdpvae.config import NoLatentConfig
from cdpvae.evaluation import encoded as encoded_rows
from cdpvae.evaluation.baselines import Baselines
from cdpvae.evaluation.encoded import EncodedRows, encode_rows
from cdpvae.evaluation.groups import likelihood as group
from cdpvae.evaluation.groups.use import measure_use
from cdpvae.evaluation.likelihood import Likelihood, backbone_nll, evaluate_likelihood, sequence_nll
from cdpvae.evaluation.verdicts import Likelihoods
from support.opened import ROWS, given_run, random_batches

SEED = 5
PLAIN, READING = "NLL of the decoder without z", "NLL when the decoder reads the instruction"
READS = {"decoder_reads": "instruction"}


def silent(line: str) -> None:
    pass


@pytest.fixture
def runs(make_model):
    """A run with a latent and both baselines, whose LoRAs differ, on the same rows."""
    batches = random_batches()
    runs = [
        given_run(make_model(**settings), batches)
        for settings in ({}, {"latent": NoLatentConfig()}, {"latent": NoLatentConfig(), **READS})
    ]
    for number, run in enumerate(runs):
        torch.manual_seed(number)
        for name, parameter in run.model.named_parameters():
            if "lora_B" in name:
                torch.nn.init.normal_(parameter, std=0.02)
    return runs


def measure(opened, *baselines):
    return group.measure_likelihood(
        opened,
        ROWS,
        baselines=Baselines.of(baselines),
        seed=SEED,
        iw_rows=4,
        iw_samples=2,
        progress=silent,
    )


def rows_nll(run) -> torch.Tensor:
    with torch.no_grad():
        return torch.cat(
            [
                sequence_nll(run.model, torch.zeros(4, 0), b.response, b.instruction).double()
                for b in run.batches
            ]
        )


def names(figures) -> list[str]:
    return [figure.name for figure in figures.figures]


def force_worth(monkeypatch, nats: float) -> None:
    """Let every decoder that reads the instruction be better by so many nats in every row."""
    own = EncodedRows.nll

    def nll(rows, z):
        return own(rows, z) - nats * rows.model.config.reads_instruction

    monkeypatch.setattr(EncodedRows, "nll", nll)


def test_both_kinds_stand_beside_a_run_that_reads_nothing(runs, monkeypatch):
    opened, plain, reading = runs
    before = measure(opened, plain)
    force_worth(monkeypatch, 500.0)
    figures = measure(opened, reading, plain)
    # What z has to beat is what it was: a baseline that reads the instruction is none without z.
    for figure in before.figures:
        assert figures[figure.name] == figure
    assert figures[PLAIN].value == pytest.approx(float(rows_nll(plain).mean()))
    read = rows_nll(reading) - 500
    assert figures[READING].value == pytest.approx(float(read.mean()))
    itself = torch.cat([backbone_nll(opened.model, b.response).double() for b in opened.batches])
    without = min((itself, rows_nll(plain)), key=lambda nll: float(nll.mean()))
    worth = without - read
    figure = figures[group.WORTH]
    assert figure.value == pytest.approx(float(worth.mean()))
    # Paired by row, and the same shuffle as in the group `use`.
    assert figure.standard_error == pytest.approx(float(worth.std() / 12**0.5))
    used = measure_use(opened, ROWS, seed=SEED, dimension_rows=1, progress=silent)
    share = used["cost of z shuffled"].value / float(worth.mean())
    assert figures[f"cost of z shuffled as a share of {group.WORTH}"].value == pytest.approx(share)


def test_a_baseline_that_reads_alone_is_not_taken_for_one_without_z(runs, monkeypatch):
    opened, _, reading = runs
    force_worth(monkeypatch, 500.0)
    figures, alone = measure(opened, reading), measure(opened)
    name = "-ELBO minus NLL without z"
    assert figures[name] == alone[name] and "the backbone itself" in figures[name].note
    assert group.WORTH not in names(figures) and PLAIN not in names(figures)
    assert any("needs a second baseline, --latent none" in note for note in figures.notes)
    assert any(note.startswith("no baseline: train one") for note in figures.notes)


def test_a_worth_below_zero_has_no_share(runs, monkeypatch):
    force_worth(monkeypatch, -500.0)
    figures = measure(*runs)
    assert figures[group.WORTH].value < 0
    assert not [name for name in names(figures) if "share of what" in name]


def test_what_z_has_to_beat_reads_what_the_run_reads(runs, make_model):
    """Beside z this run's decoder reads the instruction: so must the decoder without z."""
    opened = given_run(make_model(**READS), runs[0].batches)
    _, plain, reading = runs
    figures = measure(opened, plain, reading)
    itself = torch.cat(
        [backbone_nll(opened.model, b.response, b.instruction).double() for b in opened.batches]
    )
    without = min(float(itself.mean()), float(rows_nll(reading).mean()))
    gap = figures["-ELBO"].value - without
    assert figures["-ELBO minus NLL without z"].value == pytest.approx(gap)
    assert "reads the instruction" in figures["-ELBO minus NLL without z"].note
    # Only the plain one is given: it is shown, and not what z is compared with.
    figures = measure(opened, plain)
    gap = figures["-ELBO"].value - float(itself.mean())
    assert figures["-ELBO minus NLL without z"].value == pytest.approx(gap)
    assert figures[PLAIN].value == pytest.approx(float(rows_nll(plain).mean()))
    assert any("--decoder-reads instruction to judge" in note for note in figures.notes)


def test_importance_weights_of_a_decoder_that_reads(make_model, monkeypatch):
    """Copies of a row repeat its instruction; the memory is bounded by what they hold."""
    opened = given_run(make_model(**READS), random_batches())
    encoded = encode_rows(opened, ROWS, seed=SEED, progress=silent)
    z = torch.randn(5, 6, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    for row in (0, 5, 11):
        response, instruction = (
            torch.tensor(side[row]) for side in (encoded.responses, encoded.instructions)
        )
        batch = opened.batches[row // 4]
        assert torch.equal(batch.response.rows()[row % 4], response)
        assert torch.equal(batch.instruction.rows()[row % 4], instruction)
        every = torch.stack([encoded.select(torch.tensor([row])).nll(one[None])[0] for one in z])
        torch.testing.assert_close(encoded.nll_of_draws(row, z), every)
        widths, decode = [], opened.model.decode
        monkeypatch.setattr(encoded_rows, "POSITIONS_AT_ONCE", 50)

        def narrow(z, ids, response, instruction, widths=widths, decode=decode):
            widths.append(len(ids) + len(instruction.ids) + 4 * len(z))
            return decode(z, ids, response, instruction)

        with monkeypatch.context() as patched:
            patched.setattr(opened.model, "decode", narrow)
            torch.testing.assert_close(encoded.nll_of_draws(row, z), every)
        assert max(widths) <= 50 and len(widths) > 1
        monkeypatch.setattr(encoded_rows, "POSITIONS_AT_ONCE", 8192)


def test_two_of_a_kind_and_one_with_a_latent_are_refused(runs):
    opened, plain, reading = runs
    with pytest.raises(ValueError, match="trained with a latent"):
        Baselines.of([opened])
    with pytest.raises(ValueError, match="both have decoder_reads='instruction'"):
        Baselines.of([plain, reading, reading])
    found = Baselines.of([reading, plain])
    assert (found.nothing, found.instruction) == (plain, reading)


def likelihood(nll: float, **costs) -> Likelihood:
    return Likelihood(4, 9.0, nll, nll, 0.0, nll, costs)


def test_lines_of_the_narrow_commands():
    model = likelihood(9.0, shuffled=2.0, prior=1.0, zero=1.0)
    plain, reading = likelihood(12.0), likelihood(7.0)
    both = Likelihoods(model, plain, reading).lines()
    assert "  the same decoder without z: NLL 12.00" in both
    assert "  a decoder without z that reads the instruction: NLL 7.00" in both
    assert both[-1] == "  the instruction is worth 5.00; another row's z costs 40% of that"
    # Alone it is not called the same decoder.
    alone = "\n".join(Likelihoods(model, None, reading).lines())
    assert "no --baseline given" in alone and "the same decoder" not in alone
    swapped = Likelihoods(model, plain, reading, "instruction").lines()
    assert "  the same decoder without z: NLL 7.00" in swapped
    assert swapped[-1] == "  the instruction is worth 5.00"
    content = Likelihoods(model, plain, None).to_json()
    assert content["baseline"]["nll_q"] == 12.0 and content["instruction_baseline"] is None


def test_training_and_evaluation_have_one_likelihood(runs):
    _, _, reading = runs
    result = evaluate_likelihood(reading.model, reading.batches, seed=SEED)
    assert result.nll_q == pytest.approx(float(rows_nll(reading).mean())) and not result.costs
