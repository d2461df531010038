"""Packed attention: every backend against the softmax written out, and which backend is taken.

Kernels that need a GPU are held by stand-ins of their exact signature (`support/attention.py`);
`test_on_a_gpu` runs the real ones where there is a GPU.
"""

from __future__ import annotations

import inspect
import sys
from types import SimpleNamespace

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

from cdpvae.models.text_vae import AttentionPooling, Backbone, attention_backends
from cdpvae.models.text_vae.attention import packed_attention
from cdpvae.models.text_vae.attention_backends import (
    Unavailable,
    choose_backend,
    flash_attn_kernel,
    varlen_kernel,
)
from cdpvae.models.text_vae.packing import Packing
from support.attention import (
    backends,
    flash_attn_2_0,
    packed_backend,
    varlen_attn_2_13,
)

BACKENDS = backends()
EXACT = {"rtol": 1e-12, "atol": 1e-12}  # fp64: only the order of sums differs
HEAD_DIM = 8
# Not F**-0.5, so that a scale which is dropped or applied twice shows.
SCALING = 0.3
LAYER = SimpleNamespace(layer_idx=1)
LENGTHS = {
    "ragged with one-token rows": [5, 1, 9, 1, 3],
    "one token each": [1, 1, 1],
    "equal rows": [4, 4, 4],
    "one row": [6],
}
# Query heads to key heads: as many; grouped; all share one.
HEADS = {"4:4": (4, 4), "4:2": (4, 2), "4:1": (4, 1)}


def packing_of(lengths: list[int], prefix_len: int = 0) -> Packing:
    cu_seqlens = torch.tensor([0, *lengths]).cumsum(0).int()
    return Packing.of(cu_seqlens, sum(lengths), max(lengths), prefix_len)


class Inputs:
    """Random query, key, value and a prefix for two layers, as transformers hands them over."""

    def __init__(self, lengths, heads=(4, 2), prefix_len=0, dtype=torch.float64, device="cpu"):
        generator = torch.Generator().manual_seed(0)
        tokens, (query_heads, key_heads) = sum(lengths), heads

        def random(*shape):
            values = torch.randn(shape, generator=generator, dtype=torch.float64)
            return values.to(device, dtype).requires_grad_()

        # The strides of a projection's output: heads are a view of the last dimension.
        self.query = random(1, tokens, query_heads, HEAD_DIM)
        self.key = random(1, tokens, key_heads, HEAD_DIM)
        self.value = random(1, tokens, key_heads, HEAD_DIM)
        prefix = (len(lengths), key_heads, prefix_len, HEAD_DIM)
        self.prefixes = [(random(*prefix), random(*prefix)) for _ in range(2)]
        self.prefixes = self.prefixes if prefix_len else None
        self.lengths = lengths

    def leaves(self):
        """Everything that must get a gradient; the prefix of layer 1 is the one that is read."""
        return [self.query, self.key, self.value, *(self.prefixes[1] if self.prefixes else ())]


def run(inputs: Inputs, packing: Packing, backend):
    """-> (T, H, F) through the function that transformers calls, as layer 1."""
    q, k, v = (x.transpose(1, 2) for x in (inputs.query, inputs.key, inputs.value))

    kwargs = {"packing": packing, "backend": backend, "prefixes": inputs.prefixes}
    out, weights = packed_attention(LAYER, q, k, v, None, SCALING, **kwargs)
    assert weights is None and out.shape == inputs.query.shape
    return out[0]


def written_out(inputs: Inputs) -> torch.Tensor:
    """Row by row: softmax over the prefix and the row's own tokens up to itself."""
    out = []
    rows = zip(*(x[0].split(inputs.lengths) for x in inputs.leaves()[:3]), strict=True)
    for row, (q, k, v) in enumerate(rows):
        before = 0
        if inputs.prefixes:
            prefix_k, prefix_v = (x[row].transpose(0, 1) for x in inputs.prefixes[1])
            before = len(prefix_k)
            k, v = torch.cat((prefix_k, k)), torch.cat((prefix_v, v))
        for t, query in enumerate(q):
            seen = before + t + 1
            group = q.shape[1] // k.shape[1]
            heads = [
                (SCALING * k[:seen, h // group] @ query[h]).softmax(0) @ v[:seen, h // group]
                for h in range(q.shape[1])
            ]
            out.append(torch.stack(heads))
    return torch.stack(out)


@pytest.mark.parametrize("checkpointing", [False, True], ids=["kept", "recomputed"])
@pytest.mark.parametrize("prefix_len", [0, 3], ids=["no prefix", "prefix"])
@pytest.mark.parametrize("heads", HEADS.values(), ids=HEADS)
@pytest.mark.parametrize("lengths", LENGTHS.values(), ids=LENGTHS)
@pytest.mark.parametrize("backend", BACKENDS.values(), ids=BACKENDS)
def test_values_and_gradients(backend, lengths, heads, prefix_len, checkpointing):
    inputs = Inputs(lengths, heads, prefix_len)
    packing = packing_of(lengths, prefix_len)
    if checkpointing:
        out = checkpoint(run, inputs, packing, backend, use_reentrant=False)
    else:
        out = run(inputs, packing, backend)
    expected = written_out(inputs)
    torch.testing.assert_close(out, expected, **EXACT)
    weights = torch.randn(out.shape, dtype=out.dtype)
    ours = torch.autograd.grad((out * weights).sum(), inputs.leaves())
    theirs = torch.autograd.grad((expected * weights).sum(), inputs.leaves())
    for a, b in zip(ours, theirs, strict=True):
        torch.testing.assert_close(a, b, **EXACT)


@pytest.mark.parametrize("prefix_len", [0, 3], ids=["no prefix", "prefix"])
@pytest.mark.parametrize("backend", BACKENDS.values(), ids=BACKENDS)
def test_other_segments_keep_every_bit(backend, prefix_len):
    lengths, changed = [5, 1, 9, 3], 2
    inputs, packing = Inputs(lengths, prefix_len=prefix_len), packing_of(lengths, prefix_len)
    before = run(inputs, packing, backend).split(lengths)
    with torch.no_grad():
        for packed in inputs.leaves()[:3]:
            packed[0].split(lengths)[changed].mul_(1e3)
        for prefix in inputs.leaves()[3:]:
            prefix[changed] += 7
    after = run(inputs, packing, backend).split(lengths)
    for row in range(len(lengths)):
        assert torch.equal(before[row], after[row]) == (row != changed)


@pytest.mark.parametrize("backend", BACKENDS.values(), ids=BACKENDS)
def test_prefix_in_another_dtype(backend):
    """The heads may be fp32 over a bf16 backbone; the prefix's gradient stays in its dtype."""
    inputs = Inputs([3, 2], prefix_len=2, dtype=torch.bfloat16)
    inputs.prefixes = [
        tuple(x.detach().float().requires_grad_() for x in prefix) for prefix in inputs.prefixes
    ]
    out = run(inputs, packing_of([3, 2], 2), backend)
    assert out.dtype == torch.bfloat16
    out.float().sum().backward()
    gradients = [x.grad for x in inputs.prefixes[1]]
    assert all(g.dtype == torch.float32 and g.abs().sum() > 0 for g in gradients)


# What a pass costs


def test_packed_backends_never_build_the_padded_layout():
    packing, inputs = packing_of([3, 1, 2], 2), Inputs([3, 1, 2], prefix_len=2)
    run(inputs, packing, BACKENDS["flash_attn"])
    assert packing._slot is None and packing._mask is None
    run(inputs, packing, BACKENDS["sdpa"])
    slot, mask = packing._slot, packing._mask
    run(inputs, packing, BACKENDS["sdpa"])
    assert packing.slot is slot and packing.mask is mask, "one set serves all layers"


def test_rows_of_one_length_are_padded_without_a_copy():
    packing, x = packing_of([3, 3]), torch.randn(6, 2)
    padded = packing.pad(x)
    assert padded.data_ptr() == x.data_ptr() == packing.unpad(padded).data_ptr()
    assert torch.equal(padded[1], x[3:])


def test_nothing_waits_for_the_device():
    """A fake tensor has no values: whatever would read one back raises here."""
    with FakeTensorMode():
        cu_seqlens = torch.empty(4, dtype=torch.int32)
        with pytest.raises(Exception, match=r"repeat_interleave|dynamic|unbacked"):
            torch.repeat_interleave(cu_seqlens.diff())
        with pytest.raises(Exception, match=r"item|_local_scalar_dense"):
            cu_seqlens[-1].item()
        packing = Packing.of(cu_seqlens, 9, 5, 2)
        inputs = Inputs.__new__(Inputs)
        inputs.query, inputs.key = torch.empty(1, 9, 4, 8), torch.empty(1, 9, 2, 8)
        inputs.value = torch.empty(1, 9, 2, 8)
        inputs.prefixes = [(torch.empty(3, 2, 2, 8), torch.empty(3, 2, 2, 8))] * 2
        run(inputs, packing, BACKENDS["sdpa"])
        joined = packed_backend("joined", lambda q, *_: q)
        run(inputs, packing, joined)
        AttentionPooling(16, 2)(torch.empty(9, 16), packing)
        assert packing.position_ids.shape == (1, 9)


@pytest.mark.parametrize("prefix_len", [0, 2], ids=["no prefix", "prefix"])
@pytest.mark.parametrize("name", ["sdpa", "packed"])
def test_compiles_into_one_graph(name, prefix_len):
    """A break or a branch on data would make `fullgraph` raise."""

    def kernel(q, k, v, cu_seqlens, cu_seqlens_k, max_len, max_len_k, scaling):
        ends, ends_k = cu_seqlens[1:], cu_seqlens_k[1:]
        t, s = torch.arange(len(q)), torch.arange(len(k))
        row, row_k = (torch.bucketize(x, e, right=True) for x, e in ((t, ends), (s, ends_k)))
        until_end, until_end_k = ends[row] - t, ends_k[row_k] - s
        sees = (row[:, None] == row_k) & (until_end_k >= until_end[:, None])
        q, k, v = (x.transpose(0, 1) for x in (q, k, v))
        return F.scaled_dot_product_attention(
            q, k, v, sees, scale=scaling, enable_gqa=True
        ).transpose(0, 1)

    backend = BACKENDS["sdpa"] if name == "sdpa" else packed_backend("packed", kernel)
    lengths = [4, 1, 6]
    inputs = Inputs(lengths, prefix_len=prefix_len)
    compiled = torch.compile(run, backend="aot_eager", fullgraph=True)
    out = compiled(inputs, packing_of(lengths, prefix_len), backend)
    torch.testing.assert_close(out, written_out(inputs), **EXACT)
    out.sum().backward()
    assert all(x.grad is not None for x in inputs.leaves())


# Signatures


def test_flash_attn_too_old_to_align_at_the_last_key():
    with pytest.raises(Unavailable, match="too old.*deterministic, window_size"):
        flash_attn_kernel(flash_attn_2_0)


def test_varlen_without_causal_order():
    with pytest.raises(Unavailable, match="neither window_size nor is_causal"):
        varlen_kernel(lambda query, key, value, cu_seq_q, cu_seq_k, max_q, max_k: None)


def test_the_installed_varlen_attn_takes_our_call():
    """torch's own function on fake tensors: arguments bind, its backward gives every gradient."""
    varlen = pytest.importorskip("torch.nn.attention.varlen")
    with FakeTensorMode():
        q = torch.empty(9, 4, 8, dtype=torch.bfloat16, requires_grad=True)
        k, v = (torch.empty(15, 2, 8, dtype=torch.bfloat16, requires_grad=True) for _ in range(2))
        cu_seqlens = torch.empty(4, dtype=torch.int32)
        out = varlen_kernel(varlen.varlen_attn)(q, k, v, cu_seqlens, cu_seqlens, 5, 7, SCALING)
        out.sum().backward()
        assert out.shape == q.shape and q.grad.shape == q.shape
        assert k.grad.shape == k.shape and v.grad.shape == v.shape


def test_the_newest_stand_in_is_the_installed_signature():
    varlen = pytest.importorskip("torch.nn.attention.varlen")
    installed = inspect.signature(varlen.varlen_attn).parameters
    if "num_splits" not in installed:
        pytest.skip("an older torch, whose stand-in was written from its source")
    ours = inspect.signature(varlen_attn_2_13).parameters
    assert [(p.name, p.kind, p.default) for p in ours.values()] == [
        (p.name, p.kind, p.default) for p in list(installed.values())[: len(ours)]
    ]


# The choice

CPU, CUDA = torch.device("cpu"), torch.device("cuda", 0)
FULL_PRECISION = "flash-attn is not installed; varlen needs bf16 or fp16, not float32"


@pytest.fixture
def l40s(monkeypatch):
    """A machine that says it has a GPU of compute capability 8.9, and no flash-attn."""
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device=None: (8, 9))
    monkeypatch.setattr(torch.backends.cuda, "is_flash_attention_available", lambda: True)
    hide_flash_attn(monkeypatch)


def hide_flash_attn(monkeypatch):
    found = attention_backends.importlib.util.find_spec
    monkeypatch.setattr(
        attention_backends.importlib.util,
        "find_spec",
        lambda name: None if name == "flash_attn" else found(name),
    )


def install_flash_attn(monkeypatch, directory, interface: str):
    """A package of that name on the path, for this test only."""
    monkeypatch.undo()
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device=None: (8, 9))
    monkeypatch.setattr(torch.backends.cuda, "is_flash_attention_available", lambda: True)
    package = directory / "flash_attn"
    package.mkdir()
    (package / "__init__.py").write_text("")
    (package / "flash_attn_interface.py").write_text(interface)
    monkeypatch.syspath_prepend(directory)
    for name in ("flash_attn", "flash_attn.flash_attn_interface"):
        monkeypatch.setitem(sys.modules, name, None)  # so that it is restored afterwards
        del sys.modules[name]


def test_stated_on_a_cpu(monkeypatch):
    hide_flash_attn(monkeypatch)
    backend = choose_backend("auto", CPU, torch.float32, 64)
    assert str(backend) == "sdpa (flash-attn is not installed; varlen needs CUDA)"
    assert str(choose_backend("sdpa", CPU, torch.float32, 64)) == "sdpa"


@pytest.mark.parametrize(
    ("dtype", "head_dim", "stated"),
    [
        pytest.param(
            torch.bfloat16,
            128,
            "varlen (untested on hardware; flash-attn is not installed)",
            id="Llama-3.1-8B in bf16",
        ),
        pytest.param(torch.float32, 128, f"sdpa ({FULL_PRECISION})", id="fp32"),
        pytest.param(
            torch.bfloat16,
            20,
            "sdpa (flash-attn is not installed; varlen needs a head dimension that 8 divides, at "
            "most 256, not 20)",
            id="odd head dimension",
        ),
    ],
)
def test_stated_on_a_gpu(l40s, dtype, head_dim, stated):
    assert str(choose_backend("auto", CUDA, dtype, head_dim)) == stated


def test_stated_on_an_old_gpu(l40s, monkeypatch):
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device=None: (7, 5))
    with pytest.raises(ValueError, match=r"needs compute capability 8\.0 \(Ampere\), not 7\.5"):
        choose_backend("varlen", CUDA, torch.float16, 64)


def test_flash_attn_is_taken_where_it_imports(tmp_path, monkeypatch):
    install_flash_attn(
        monkeypatch, tmp_path, "from support.attention import flash_attn_varlen_func\n"
    )
    backend = choose_backend("auto", CUDA, torch.bfloat16, 128)
    assert str(backend) == "flash_attn (untested on hardware)"
    inputs = Inputs([3, 1, 4], prefix_len=2)
    out = run(inputs, packing_of([3, 1, 4], 2), backend)
    torch.testing.assert_close(out, written_out(inputs), **EXACT)


def test_a_flash_attn_that_does_not_import_is_not_taken(tmp_path, monkeypatch):
    install_flash_attn(monkeypatch, tmp_path, "raise ImportError('undefined symbol: _ZN3c10')\n")
    backend = choose_backend("auto", CUDA, torch.bfloat16, 128)
    assert backend.name == "varlen"
    assert "flash-attn does not import: undefined symbol: _ZN3c10" in backend.note


@pytest.mark.parametrize("wanted", ["flash_attn", "varlen"])
def test_an_explicit_choice_that_cannot_run_stops_before_weights(
    wanted, tmp_path, monkeypatch, make_llama, make_model
):
    """The directory holds a config.json and no weights: reading them would be another error."""
    make_llama().config.save_pretrained(tmp_path)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    hide_flash_attn(monkeypatch)
    config = make_model(attention=wanted).config.model_copy(update={"backbone": str(tmp_path)})
    with pytest.raises(ValueError) as error:
        Backbone.load(config)
    reason = {"flash_attn": "flash-attn is not installed", "varlen": "varlen needs CUDA"}[wanted]
    assert str(error.value) == (
        f"model.attention='{wanted}' cannot run here: {reason}; set it to 'auto' or 'sdpa'"
    )


def test_the_choice_follows_the_weights(make_model, monkeypatch):
    asked = []

    def choose(wanted, device, dtype, head_dim):
        asked.append((wanted, device, dtype, head_dim))
        return BACKENDS["sdpa"]

    monkeypatch.setattr("cdpvae.models.text_vae.backbone.choose_backend", choose)
    backbone = make_model("wide heads").backbone
    assert backbone.attention is backbone.attention is BACKENDS["sdpa"]
    backbone.to(torch.bfloat16)
    assert backbone.attention is BACKENDS["sdpa"]
    assert asked == [("auto", CPU, torch.float64, 24), ("auto", CPU, torch.bfloat16, 24)]


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@pytest.mark.parametrize("prefix_len", [0, 32], ids=["no prefix", "prefix"])
@pytest.mark.parametrize("heads", HEADS.values(), ids=HEADS)
@pytest.mark.parametrize("wanted", ["flash_attn", "varlen", "sdpa"])
def test_on_a_gpu(wanted, heads, prefix_len):
    """The real kernels in bf16, without a wait for the device.

    Error against fp64 at most twice that of plain torch in bf16, plus one rounding of bf16.
    """
    dtype, lengths = torch.bfloat16, [33, 1, 70, 5]
    try:
        backend = choose_backend(wanted, torch.device("cuda", 0), dtype, HEAD_DIM)
    except ValueError as error:
        pytest.skip(str(error))

    # The same inputs on the GPU in bf16, and on the CPU in fp64 and in bf16.
    inputs = Inputs(lengths, heads, prefix_len, dtype, "cuda")
    exact, plain = (Inputs(lengths, heads, prefix_len, d) for d in (torch.float64, dtype))
    with torch.no_grad():
        for leaf, rounded in zip(exact.leaves(), inputs.leaves(), strict=True):
            leaf.copy_(rounded)
    cu_seqlens = packing_of(lengths).cu_seqlens.cuda()
    weights = torch.randn(sum(lengths), heads[0], HEAD_DIM, dtype=dtype)
    weights_on_gpu = weights.cuda()

    # Run the backend; a wait for the device is an error.
    torch.cuda.set_sync_debug_mode("error")
    try:
        packing = Packing.of(cu_seqlens, sum(lengths), max(lengths), prefix_len)
        out = run(inputs, packing, backend)
        ours = [out, *torch.autograd.grad((out * weights_on_gpu).sum(), inputs.leaves())]
    finally:
        torch.cuda.set_sync_debug_mode("default")

    # Compare the output and every gradient.
    results = []
    for reference in (exact, plain):
        out = written_out(reference)
        loss = (out * weights.to(out.dtype)).sum()
        results.append([out, *torch.autograd.grad(loss, reference.leaves())])
    for mine, truth, stock in zip(ours, *results, strict=True):
        allowed = 2 * (stock.double() - truth).abs().max() + 2**-8 * truth.abs().max()
        assert (mine.cpu().double() - truth).abs().max() <= allowed
