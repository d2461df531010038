"""Every rival of `benchmarks.kernels` computes what ours does, and one that cannot run says so."""

import csv
import importlib
import importlib.util

import pytest
import torch

from benchmarks import kernels
from benchmarks.rivals import OPERATIONS, figures
from benchmarks.rivals import bag_of_words as bow_rivals
from benchmarks.rivals import linear_cross_entropy as recon_rivals
from benchmarks.rivals import prefixed_embedding as embedding_rivals
from benchmarks.rivals import word_dropout as dropout_rivals
from benchmarks.rivals.contest import COMPILE, function_of
from benchmarks.rivals.operation import BOTH, FORWARD, even_offsets, rows_of
from cdpvae_kernels import philox

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
# Liger's kernels also run in Triton's interpreter (`conftest.py`), those of CCE do not.
PACKAGES = {"liger": "liger_kernel", "liger_8": "liger_kernel"}
PACKAGES |= dict.fromkeys(("cce", "cce_exact"), "cut_cross_entropy")
# fp32 on random data of these sizes: rounding of at most a few hundred terms.
CLOSE = {"rtol": 2e-5, "atol": 2e-6}


def variants(name, also=()):
    """The operation's variants as parameters, without what cannot run on this machine."""
    return pytest.mark.parametrize(
        "variant", [pytest.param(v, marks=_skips(v)) for v in (*OPERATIONS[name].variants, *also)]
    )


def _skips(variant):
    package = PACKAGES.get(variant)
    if package is None:
        return ()
    if importlib.util.find_spec(package) is None:
        return pytest.mark.skip(reason=f"{package} is not installed")
    needs_gpu = package == "cut_cross_entropy" and DEVICE.type != "cuda"
    return pytest.mark.skipif(needs_gpu, reason="its kernels need a GPU")


def result_of(name, variant, inputs):
    """(output, gradients of `wanted`) of a variant."""
    output = function_of(OPERATIONS[name], variant)(inputs)
    upstream = None if inputs.upstream is None else inputs.upstream.view_as(output)
    return output.detach(), torch.autograd.grad(output, inputs.wanted, upstream)


def check(name, variant, inputs, truth, gradients):
    output, found = result_of(name, variant, inputs)
    torch.testing.assert_close(output.double().view_as(truth), truth, **CLOSE)
    for got, expected in zip(found, gradients, strict=True):
        torch.testing.assert_close(got.double(), expected, **CLOSE)


# All positions valid, and most of them ignored.
@pytest.mark.parametrize("valid", [1.0, 0.4])
@variants("linear_cross_entropy", also=[COMPILE])
def test_reconstruction_loss_and_gradient(variant, valid):
    shape = {"rows": 20, "hidden": 32, "vocab": 300, "valid": valid}
    inputs = recon_rivals.inputs(shape, torch.float32, DEVICE, 0)
    hidden = inputs.hidden.detach().double().requires_grad_()
    logits = hidden @ inputs.weight.double().T
    kept = inputs.targets != recon_rivals.IGNORE
    assert kept.sum() == round(20 * valid)
    picked = logits.gather(1, inputs.targets.clamp(min=0)[:, None])[:, 0]
    truth = (logits.logsumexp(1) - picked)[kept].mean()
    gradients = torch.autograd.grad(truth, hidden)
    check("linear_cross_entropy", variant, inputs, truth.detach(), gradients)


def bow_inputs():
    """Repeats, an empty row, one token, the vocabulary's ends; rows of unequal length."""
    torch.manual_seed(0)
    rows = [[3, 3, 0, 40, 3], [], [5], [1, 2, 2]]
    ids = torch.tensor([token for row in rows for token in row], device=DEVICE)
    offsets = torch.tensor([0, 5, 5, 6, 9], dtype=torch.int32, device=DEVICE)
    head = [torch.randn(s, device=DEVICE).requires_grad_() for s in ((4, 8), (41, 8), (41,))]
    return bow_rivals.Inputs(*head, ids, offsets, rows_of(ids, offsets, bow_rivals.IGNORE)), rows


@variants("bow_bce")
def test_bow_bce_loss_and_gradients(variant):
    inputs, rows = bow_inputs()
    head = [t.detach().double().requires_grad_() for t in inputs.wanted]
    p = torch.sigmoid(head[0] @ head[1].T + head[2])
    present = torch.zeros_like(p)
    for row, tokens in enumerate(rows):
        present[row, tokens] = 1.0
    truth = -(present * p.log() + (1 - present) * (1 - p).log()).mean()
    check("bow_bce", variant, inputs, truth.detach(), torch.autograd.grad(truth, head))


@variants("bow_categorical")
def test_bow_categorical_loss_and_gradients(variant):
    inputs, rows = bow_inputs()
    head = [t.detach().double().requires_grad_() for t in inputs.wanted]
    log_p = torch.softmax(head[0] @ head[1].T + head[2], dim=1).log()
    per_row = [-log_p[row, tokens].mean() for row, tokens in enumerate(rows) if tokens]
    truth = sum(per_row) / len(rows)
    check("bow_categorical", variant, inputs, truth.detach(), torch.autograd.grad(truth, head))


@variants("word_dropout")
def test_word_dropout_follows_its_law(variant):
    shape = {"tokens": 40_000, "batch": 40}
    inputs = dropout_rivals.inputs(shape, torch.float32, DEVICE, 0)
    torch.manual_seed(0)
    ids = OPERATIONS["word_dropout"].variants[variant](inputs).flatten()
    dropped = ids != inputs.ids
    assert (ids[dropped] == dropout_rivals.FILL_ID).all()
    assert not dropped[inputs.cu_seqlens[:-1].long()].any()
    # Five standard deviations of the mean of 39,960 draws.
    share = dropped.sum().item() / (40_000 - 40)
    assert abs(share - dropout_rivals.RATE) < 5 * (0.4 * 0.6 / 39_960) ** 0.5


def test_our_word_dropout_is_the_counter_based_mask():
    inputs = dropout_rivals.inputs({"tokens": 64, "batch": 4}, torch.float32, DEVICE, 0)
    positions = torch.arange(16, device=DEVICE)
    words = philox.bits(7, philox.Stream.WORD_DROPOUT, inputs.sample_index[:, None], 0, positions)
    expected = inputs.padded_ids.masked_fill(
        (words < int(dropout_rivals.RATE * 2**32)) & (positions > 0), dropout_rivals.FILL_ID
    )
    assert torch.equal(dropout_rivals.ours(inputs), expected.flatten())


@variants("prefixed_embedding")
def test_prefixed_embedding_output_and_gradient(variant):
    shape = {"tokens": 12, "batch": 3, "prompts": 2, "hidden": 5, "vocab": 9}
    inputs = embedding_rivals.inputs(shape, torch.float32, DEVICE, 0)
    rows = []
    for sequence in range(3):
        rows += [row.tolist() for row in inputs.prompts[sequence]]
        rows += [inputs.embedding[i].tolist() for i in inputs.ids[4 * sequence :][:4]]
    output = torch.tensor(rows, dtype=torch.float64, device=DEVICE)
    gradient = torch.cat([inputs.upstream[6 * s : 6 * s + 2] for s in range(3)]).double()
    check("prefixed_embedding", variant, inputs, output, [gradient.view(3, 2, 5)])


@pytest.mark.skipif(DEVICE.type == "cuda", reason="with a GPU they run")
def test_a_rival_that_cannot_run_is_a_row_that_says_why(tmp_path, capsys, monkeypatch):
    op = OPERATIONS["linear_cross_entropy"]

    def missing(inputs):
        importlib.import_module("a_package_that_nobody_has")

    monkeypatch.setitem(op.variants, "cce", missing)
    tiny = {"rows": 8, "hidden": 4, "vocab": 16, "valid": 0.5}
    monkeypatch.setitem(op.shapes, ("cpu", "small"), (tiny,))
    arguments = "--ops linear_cross_entropy --variants ours eager cce --shapes small --rounds 2"
    output = ["--output", str(tmp_path), "--no-memory", "--device", "cpu"]
    kernels.main([*arguments.split(), *output])
    with (tmp_path / "kernels.csv").open() as file:
        rows = [row for row in csv.DictReader(file) if row["pass"] == BOTH]
    by_name = {row["variant"]: row for row in rows}
    assert set(by_name) == {"ours", "eager", "cce", "two_gemms"}
    assert "a_package_that_nobody_has" in by_name["cce"]["status"]
    assert by_name["cce"]["p50_ms"] == ""
    assert by_name["ours"]["value"] == by_name["eager"]["value"]
    # 4 of 8 rows are valid: two products of 2 * 4 * 4 * 16 operations.
    seconds = float(by_name["eager"]["p50_ms"]) * 1e-3
    assert float(by_name["eager"]["tflops"]) * 1e12 * seconds == pytest.approx(1024)
    assert "a_package_that_nobody_has" in capsys.readouterr().out
    assert (tmp_path / "kernels_cpu.png").read_bytes().startswith(b"\x89PNG")


def test_ours_that_does_not_run_is_an_error(tmp_path, monkeypatch):
    op = OPERATIONS["word_dropout"]

    def broken(inputs):
        raise RuntimeError("no such kernel")

    monkeypatch.setitem(op.variants, "ours", broken)
    arguments = "--ops word_dropout --variants ours eager --shapes small --rounds 1 --no-memory"
    with pytest.raises(ValueError, match="no such kernel"):
        kernels.main([*arguments.split(), "--output", str(tmp_path)])


def test_unknown_names_are_refused(tmp_path):
    with pytest.raises(ValueError, match="--variants ligre: choose from"):
        kernels.main(["--variants", "ligre", "--output", str(tmp_path)])


def test_memory_of_a_variant_is_that_of_its_buffers():
    """In a child, as on the command line: the copy in `eager` of 64 x 4 MB and no more."""
    from benchmarks.support import memory

    shape = {"tokens": 4096, "batch": 8, "prompts": 32, "hidden": 1024, "vocab": 64}
    job = {"op": "prefixed_embedding", "variant": "description", "pass": FORWARD}
    job |= {"shape": shape, "dtype": "fp32"}
    extra = memory.in_child(kernels.MODULE, job, 1)["extra"]
    # Embeddings of 16.8 MB, then the output of 17.8 MB beside them.
    assert 33e6 < extra < 40e6


def row(run, variant, **cells):
    """A row of reconstruction on the CPU at the shape the figures are about."""
    shape = {"rows": "2048", "hidden": "512", "vocab": "128256", "valid": "1.0"}
    identity = {"run": run, "op": "linear_cross_entropy", "variant": variant, "pass": BOTH}
    kind = {"device_type": "cpu", "status": "ok", "device_ms": "", "extra_mb": ""}
    return identity | kind | shape | cells


def test_figures_come_from_the_newest_run_that_measured_both():
    rows = [
        row("1", "ours", p50_ms="100"),
        row("1", "two_gemms", p50_ms="50"),
        row("2", "ours", p50_ms="110", extra_mb="9"),
        row("2", "two_gemms", p50_ms="100"),
        row("2", "eager", p50_ms="150", extra_mb="100"),
        row("3", "ours", p50_ms="1"),
    ]
    lines = figures.report(rows).splitlines()
    found = {line[27:64].strip(): line[64:].split() for line in lines if line.startswith("cpu")}
    assert found["time / two products"] == ["<=", "1.2", "1.1", "reached", "2"]
    assert found["eager / ours, time"] == [">=", "1.7", "1.36", "NOT", "REACHED", "2"]
    assert found["extra memory / eager's"] == ["<=", "0.1", "0.09", "reached", "2"]
    assert found["torch's chunked / ours, time"] == [">=", "4", "-", "not", "measured"]


def test_sequences_that_do_not_divide_are_refused():
    with pytest.raises(ValueError, match="10 tokens in 3 sequences"):
        even_offsets(3, 10, DEVICE)
