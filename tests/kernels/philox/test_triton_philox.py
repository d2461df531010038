"""The Triton draws have the bits of the reference: in the interpreter, and in what the GPU runs."""

import math
import os
import re
import struct
import subprocess
import sys

import pytest
import torch
import triton
import triton.language as tl
from torch._subclasses.fake_tensor import FakeTensorMode

from cdpvae_kernels import Stream, philox
from cdpvae_kernels.philox import reference, triton_kernels, triton_launch
from support.triton import DEVICE, poisoned  # noqa: F401

pytestmark = pytest.mark.usefixtures("poisoned")

# The corners of the 64-bit and of the 32-bit field.
SAMPLES = torch.tensor([0, 12345, 2**32, 2**40 + 7, 2**63 - 1])[:, None].to(DEVICE)
POSITIONS = torch.tensor([0, 1, 2**31, 2**32 - 1])[None, :].to(DEVICE)


# Zero, small, above 32 bits, the sign bit of the signed pattern, all bits.
@pytest.mark.parametrize("seed", [0, 1, 2**33 + 5, 2**63, 2**64 - 1])
@pytest.mark.parametrize("epoch", [0, 2**24 - 1])
def test_bits_at_the_corners_of_every_field(seed, epoch):
    # 255: the highest stream puts a 1 in the sign bit of its counter.
    for stream in (Stream.PRIOR, 255):
        arguments = (seed, stream, SAMPLES, epoch, POSITIONS)
        got = philox.bits(*arguments, impl="triton")
        assert got.dtype == torch.int64 and got.shape == (5, 4)
        assert torch.equal(got, philox.bits(*arguments, impl="reference"))


@pytest.mark.parametrize("draw", [philox.uniform, philox.normal])
def test_uniform_and_normal_have_the_bits_of_the_reference(draw):
    sample = torch.arange(40, device=DEVICE)[:, None] + 2**40
    arguments = (3, Stream.NOISE, sample, 5, torch.arange(64, device=DEVICE)[None, :])
    got = draw(*arguments, impl="triton")
    assert got.dtype == torch.float32 and torch.isfinite(got).all()
    assert torch.equal(got, draw(*arguments, impl="reference"))


def test_any_argument_may_be_a_number_a_tensor_or_strided():
    position = torch.arange(74, device=DEVICE)[::2]
    epoch = torch.arange(37, device=DEVICE, dtype=torch.int32)
    for arguments in (
        (1, 2, 3, 4, position),
        (1, 2, position, epoch, 9),
        (1, 2, 3, epoch[:, None], position[None, :]),
        (1, 2, torch.tensor([3], device=DEVICE), 4, position),
    ):
        got = philox.normal(*arguments, impl="triton")
        assert torch.equal(got, philox.normal(*arguments, impl="reference"))


def test_one_draw_and_none():
    value = torch.tensor(5, device=DEVICE)
    assert philox.bits(1, 2, 3, 4, value, impl="triton").shape == ()
    nothing = torch.zeros(0, 3, dtype=torch.int64, device=DEVICE)
    assert philox.normal(1, 2, nothing, 4, 5, impl="triton").shape == (0, 3)


@triton.jit
def series_kernel(numerator_ptr, turn_ptr, log_ptr, cos_ptr, BLOCK: tl.constexpr):
    index = tl.arange(0, BLOCK)
    tl.store(log_ptr + index, triton_kernels.log_of_24_bits(tl.load(numerator_ptr + index)))
    tl.store(cos_ptr + index, triton_kernels.cos_of_24_bits(tl.load(turn_ptr + index)))


def test_the_series_at_their_branches():
    """11863283 / 2^24 lies between sqrt(1/2) rounded to fp32 and sqrt(1/2)."""
    # Each side of the branch, and the ends of the range.
    half = 11863283
    numerators = [1, 2, 3, half - 1, half, half + 1, 2**23 - 1, 2**23, 2**24 - 1, 2**24]
    turns = [n * 2**21 + step for n in range(8) for step in (-1, 0, 1)][1:]
    size = 32
    numerator = torch.tensor(numerators + [7] * (size - len(numerators)), device=DEVICE)
    turn = torch.tensor(turns + [5] * (size - len(turns)), device=DEVICE)
    log, cos = (torch.empty(size, dtype=torch.float64, device=DEVICE) for _ in "lc")
    series_kernel[(1,)](numerator, turn, log, cos, BLOCK=size, **triton_launch.LAUNCH_OPTIONS)
    assert torch.equal(log, reference.log_of_24_bits(numerator))
    assert torch.equal(cos, reference.cos_of_24_bits(turn))


PRINT_PTX = """
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
from cdpvae_kernels.philox import tuning

spec = tuning.specializations()["philox.draw normal"]
names = spec.kernel.arg_names
source = ASTSource(
    spec.kernel,
    signature={n: spec.signature.get(n, "constexpr") for n in names},
    constexprs={(names.index(n),): v for n, v in {**spec.constants, "BLOCK": 256}.items()},
)
print(triton.compile(source, target=GPUTarget("cuda", 90, 32), options=spec.options).asm["ptx"])
"""


def test_the_compiled_normal_rounds_as_the_definition_does():
    """No fused multiply-add, correctly rounded quotients and roots, every constant whole."""
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    ptx = subprocess.run(
        [sys.executable, "-c", PRINT_PTX],
        env=environment,
        check=True,
        capture_output=True,
        text=True,
    ).stdout
    # What the GPU computes with: every operation correctly rounded, none fused.
    operations = set(re.findall(r"\b(?:add|sub|mul|div|sqrt|fma)[.\w]*\.f64\b", ptx))
    assert operations == {f"{name}.rn.f64" for name in ("add", "sub", "mul", "div", "sqrt")}
    # And the constants: each as the reference has it, to the last bit.
    words = re.findall(r"\b0d([0-9A-F]{16})\b", ptx)
    constants = {abs(struct.unpack(">d", bytes.fromhex(word))[0]) for word in words}
    wanted = {reference.ANGLE_OF_TURN, math.log(2.0), math.sqrt(0.5)}
    for series in (reference.LOG_SERIES, reference.COSINE_SERIES, reference.SINE_SERIES):
        wanted |= {abs(value) for value in series}
    assert constants - {0.0, 1.0, 2.0} == wanted - {1.0}


def test_the_operator_propagates_shapes():
    with FakeTensorMode():
        sample = torch.empty(8, 1, dtype=torch.int64)
        scalar, position = torch.empty((), dtype=torch.int64), torch.empty(64, dtype=torch.int64)
        operator = torch.ops.cdpvae_kernels.philox
        for normal, dtype in ((False, torch.int64), (True, torch.float32)):
            draw = operator(sample, scalar, position, -1, 0, normal)
            assert draw.shape == (8, 64) and draw.dtype == dtype


def test_the_operator_is_what_it_declares():
    """Nothing aliased, nothing written to, real shapes and dtypes those of the fake."""
    epoch = torch.zeros((), dtype=torch.int64, device=DEVICE)
    arguments = (SAMPLES, epoch, POSITIONS, -1, 0, True)
    operator = torch.ops.cdpvae_kernels.philox.default
    torch.library.opcheck(operator, arguments, test_utils=("test_schema", "test_faketensor"))
