"""The training-step benchmark: its variants compute the same, and it notices when they do not."""

from __future__ import annotations

import csv
import json
import math
import statistics

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from benchmarks import train_step
from benchmarks.steps.naive import NaiveStep
from benchmarks.steps.ours import OurStep
from benchmarks.steps.stock import StockStep
from benchmarks.support import step_memory
from benchmarks.support.lengths import Row, StepBatch, open_corpus, step_batches
from benchmarks.support.phases import PhaseClock
from benchmarks.support.step_checks import compare
from benchmarks.support.step_options import StepOptions, build, measured_batches, open_setup
from benchmarks.support.timing import Failure
from cdpvae.config import DataConfig

CPU = torch.device("cpu")
VOCAB = 4096


@pytest.fixture(scope="module", autouse=True)
def one_thread():
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def options(**changes) -> StepOptions:
    made = StepOptions(micro_batch=3, steps=2, device="cpu", **changes)
    made.check()
    return made


@pytest.fixture(scope="module")
def grouped_backbone(tmp_path_factory) -> str:
    """A Llama with fewer key than query heads and tied embeddings, as a directory."""
    torch.manual_seed(1)
    config = LlamaConfig(
        vocab_size=VOCAB,
        hidden_size=48,
        intermediate_size=96,
        num_hidden_layers=2,
        num_attention_heads=6,
        num_key_value_heads=2,
        head_dim=8,
        tie_word_embeddings=True,
    )
    directory = tmp_path_factory.mktemp("backbone")
    LlamaForCausalLM(config).save_pretrained(directory)
    return str(directory)


# With activation checkpointing, since it changes who sees a gradient; grouped heads and tied
# embeddings, since weights are handed over by name.
@pytest.mark.parametrize(
    ("layout", "checkpointing", "grouped"),
    [
        pytest.param("flattened", False, False, id="flattened"),
        pytest.param("padded", True, False, id="padded-checkpointed"),
        pytest.param("flattened", True, True, id="grouped-tied-checkpointed"),
    ],
)
def test_all_steps_have_the_same_loss_and_gradients(
    layout, checkpointing, grouped, grouped_backbone, capsys
):
    backbone = grouped_backbone if grouped else None
    asked = options(checkpointing=checkpointing, backbone=backbone, stock_layout=layout)
    setup, corpus = open_setup(asked)
    steps = {name: build(name, setup, asked) for name in asked.only}
    # Rows of very unequal length, so that what padding leaks would show.
    rows = sorted(corpus.rows, key=lambda row: len(row.response))
    found = compare(steps, [rows[0], rows[-1], rows[100]], "fp32")
    assert {type(step) for step in steps.values()} == {OurStep, NaiveStep, StockStep}
    assert found["ours"].loss > math.log(VOCAB)
    assert found["ours"].lora_grad > 0.01 and found["ours"].heads_grad > 0.01
    assert capsys.readouterr().out.count("gradient norms") == 3


def _zero_a_view(step):
    collate = step.collate
    step.collate = lambda rows, with_view, draws: collate(rows, with_view, _with_one_view(draws))


def _with_one_view(draws):
    return type(draws)(draws.noise_BZ, draws.response_inputs, [draws.views[0]] * len(draws.views))


def _lora_in_the_encoder(step):
    encode = step.model.llama.get_base_model().model

    def hidden_states(ids, mask):
        with torch.no_grad():
            return encode(input_ids=ids, attention_mask=mask).last_hidden_state

    step.model.hidden_states = hidden_states


def _padding_as_target(step):
    reconstruction = step.reconstruction
    step.reconstruction = lambda logits, labels: reconstruction(logits, labels.clamp(min=0))


@pytest.mark.parametrize("mistake", [_zero_a_view, _lora_in_the_encoder, _padding_as_target])
def test_a_step_that_computes_something_else_is_refused(mistake, capsys):
    asked = options()
    setup, corpus = open_setup(asked)
    steps = {name: build(name, setup, asked) for name in ("ours", "naive")}
    mistake(steps["naive"])
    with pytest.raises(SystemExit) as stop:
        compare(steps, corpus.rows[:3], "fp32")
    assert stop.value.code == 1
    assert "naive computes something else" in capsys.readouterr().out


def test_a_step_moves_the_same_weights_in_all_variants():
    """And only those: the backbone is shared and must stay as it is."""
    asked = options()
    setup, corpus = open_setup(asked)
    base = {name: value.clone() for name, value in setup.base.items()}
    moved = {}
    for name in asked.only:
        step = build(name, setup, asked)
        before = {key: value.detach().clone() for key, value in step.trainable().items()}
        step.start()
        for batch in measured_batches(corpus, asked):
            step.step(batch)
        changed = [key for key, value in step.trainable().items() if not value.equal(before[key])]
        moved[name] = sum(before[key].numel() for key in changed)
        assert all(value.grad is None for value in step.trainable().values())
    assert moved["ours"] == moved["naive"] == moved["stock"] > 0
    for name, value in setup.base.items():
        assert value.equal(base[name]), name


def test_step_batches_use_every_row_and_compute_the_view_in_half_of_the_steps():
    corpus = open_corpus(None, None, None, VOCAB, DataConfig())
    bounds = DataConfig()
    assert all(
        bounds.min_response_tokens <= len(row.response) <= bounds.max_response_tokens
        for row in corpus.rows
    )
    endless = step_batches(corpus, micro_batch=5, accum=2, seed=0)
    epoch = [next(endless) for _ in range(len(corpus.rows) // 10)]
    used = [row.index for batch in epoch for row in batch.rows]
    assert len(used) == len(set(used)) == len(corpus.rows) // 10 * 10
    assert [batch.with_view for batch in epoch[:4]] == [True, False, True, False]
    assert epoch[0].target_tokens == sum(len(row.response) - 1 for row in epoch[0].rows)


def test_text_gives_its_own_lengths(tmp_path):
    file = tmp_path / "pairs.jsonl"
    pairs = [(" word" * 40, " other" * 60), ("short", "short")]
    lines = [json.dumps({"instruction": i, "output": o}) for i, o in pairs]
    file.write_text("\n".join(lines))
    with pytest.raises(ValueError, match="--mean-response 350: it has no effect"):
        open_corpus(str(file), None, None, VOCAB, DataConfig(), 350)
    corpus = open_corpus(str(file), None, None, VOCAB, DataConfig(min_instruction_tokens=20))
    (row,) = corpus.rows
    assert isinstance(row, Row) and 40 <= len(row.instruction) and 60 <= len(row.response)
    assert corpus.max_id < VOCAB and "pairs.jsonl" in corpus.source


class _Nested:
    def outer(self):
        self.inner()

    def inner(self):
        torch.ones(400, 400) @ torch.ones(400, 400)


def test_phases_count_inner_calls_once_and_leave_no_trace():
    nested, clock = _Nested(), PhaseClock(CPU)
    with clock.watching([(nested, "outer", "outer"), (nested, "inner", "inner")]):
        for _ in range(20):
            nested.outer()
    assert clock.seconds["inner"] > clock.seconds["outer"] > 0
    assert not vars(nested)
    nested.outer()
    assert clock.seconds.keys() == {"outer", "inner"}


def test_a_run_writes_a_row_per_variant(tmp_path, capsys, monkeypatch):
    """Memory comes from child processes; one that dies is a row that says so."""
    peaks = {
        "ours": {"loaded": 100 << 20, "warm": 110 << 20, "peak": 150 << 20},
        "naive": Failure("out of memory (the process was killed)", out_of_memory=True),
        "stock": {"loaded": 100 << 20, "warm": 110 << 20, "peak": 190 << 20},
    }
    monkeypatch.setattr(train_step, "peak_memory", lambda name, _: peaks[name])
    arguments = ["--device", "cpu", "--micro-batch", "2", "--steps", "2", "--rounds", "1"]
    train_step.benchmark([*arguments, "--warmup", "0", "--results", str(tmp_path)])
    with (tmp_path / "train_step.csv").open(newline="") as file:
        table = {row["variant"]: row for row in csv.DictReader(file)}
    assert list(table) == ["ours", "naive", "stock"]
    assert table["ours"]["peak_less_loaded_mib"] == "50.0"
    assert table["naive"]["status"].startswith("out of memory")
    for row in table.values():
        assert float(row["step_s_p50"]) > 0 and float(row["encoder_ms"]) > 0
        assert row["commit"] and row["versions"].startswith("torch")
        assert "--micro-batch 2" in row["command"]
    assert (tmp_path / "train_step.png").stat().st_size > 1000
    assert "ours against stock" in capsys.readouterr().out


def test_a_variant_out_of_memory_is_a_row_and_not_the_end(monkeypatch):
    def without_naive(name, setup, asked):
        if name == "naive":
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 30.00 GiB.")
        step = build(name, setup, asked)
        if name == "stock":
            monkeypatch.setattr(step, "update", lambda: torch.empty(2**60))
        return step

    monkeypatch.setattr(train_step, "build", without_naive)
    table = train_step.measure(options(memory=False, rounds=1, warmup=0))
    ours, naive, stock = table
    assert ours["status"] == "ok" and ours["tokens_per_second"] > 0
    for row in (naive, stock):
        assert row["status"].startswith("out of memory") and "tokens_per_second" not in row


@pytest.mark.parametrize(
    ("ours_peak", "answer"), [pytest.param(90, "yes", id="fits"), pytest.param(110, "no", id="not")]
)
def test_double_asks_for_twice_the_micro_batch(monkeypatch, ours_peak, answer):
    asked = []

    def peak(name, of):
        asked.append((name, of.micro_batch))
        return {"loaded": 0, "warm": 0, "peak": {"ours": ours_peak, "naive": 100}[name]}

    monkeypatch.setattr(step_memory, "peak_memory", peak)
    table = step_memory.ask_double(options())
    assert asked == [("naive", 3), ("ours", 6)]
    assert all(row["question"].endswith(answer) for row in table)


def test_largest_stops_at_the_limit(monkeypatch):
    def peak(name, of):
        return {"loaded": 0, "warm": 0, "peak": of.micro_batch * 2**30}

    monkeypatch.setattr(step_memory, "peak_memory", peak)
    table = step_memory.ask_largest(options(largest=13.0, only=("ours",)))
    assert [row["micro_batch"] for row in table] == [12]


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        pytest.param({"steps": 3}, "steps=3", id="odd steps"),
        pytest.param({"only": ("naive",)}, "'ours'", id="without ours"),
        pytest.param({"only": ("ours", "theirs")}, "theirs", id="unknown variant"),
    ],
)
def test_options_that_cannot_be_are_refused(changes, message):
    with pytest.raises(ValueError, match=message):
        StepOptions(**changes).check()


def test_an_8b_model_gets_long_rows():
    """68 tokens a response would measure launches; the lengths are as unequal as before."""
    made = StepOptions(shape="8b", device="cpu")
    made.check()
    assert made.mean_response == 350
    short, long = (
        [len(row.response) for row in open_corpus(None, None, None, VOCAB, DataConfig(), mean).rows]
        for mean in (None, made.mean_response)
    )
    assert sum(long) / len(long) == pytest.approx(350, rel=0.02)
    spread = [statistics.stdev(n) / statistics.mean(n) for n in (short, long)]
    assert spread[1] == pytest.approx(spread[0], rel=0.05)
    # Rows of one's own, and the tiny model, keep their lengths.
    for other in (StepOptions(shape="8b", lengths="x.txt"), StepOptions()):
        other.device = "cpu"
        other.check()
        assert other.mean_response is None
    work = [StepBatch([[Row([1] * 5, [1] * 9, 0)], [Row([1] * 7, [1] * 3, 1)]], with_view=False)]
    assert train_step.tokens_per_row(work) == "6 + 6 tokens a row"
