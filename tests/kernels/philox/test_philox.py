"""Philox against the published vectors, against Python integers, and against its own claims."""

import math
import random

import pytest
import torch

from cdpvae_kernels import Stream, philox
from cdpvae_kernels.philox import reference

# Random123, tests/kat_vectors, lines "philox4x32 10": counters, key, result.
KNOWN_ANSWERS = [
    ((0, 0, 0, 0), (0, 0), (0x6627E8D5, 0xE169C58D, 0xBC57AC4C, 0x9B00DBD8)),
    (
        (0xFFFFFFFF,) * 4,
        (0xFFFFFFFF,) * 2,
        (0x408F276D, 0x41C83B0E, 0xA20BC7C6, 0x6D5451FD),
    ),
    (
        (0x243F6A88, 0x85A308D3, 0x13198A2E, 0x03707344),
        (0xA4093822, 0x299F31D0),
        (0xD16CFE09, 0x94FDCCEB, 0x5001E420, 0x24126EA1),
    ),
]


def python_philox(counters, key):
    """The paper's round function on Python integers, which never overflow."""
    # Kept apart from the library: its constants are written out.
    c0, c1, c2, c3 = counters
    k0, k1 = key
    for _ in range(10):
        p0, p1 = 0xD2511F53 * c0, 0xCD9E8D57 * c2
        c0, c1, c2, c3 = (
            (p1 >> 32) ^ c1 ^ k0,
            p1 % 2**32,
            (p0 >> 32) ^ c3 ^ k1,
            p0 % 2**32,
        )
        k0, k1 = (k0 + 0x9E3779B9) % 2**32, (k1 + 0xBB67AE85) % 2**32
    return c0, c1, c2, c3


def as_tensors(words):
    return tuple(torch.tensor([word]) for word in words)


@pytest.mark.parametrize("counters, key, expected", KNOWN_ANSWERS)
def test_known_answer_vectors(counters, key, expected):
    result = philox.philox4x32(key, as_tensors(counters))
    assert tuple(int(word) for word in result) == expected
    assert python_philox(counters, key) == expected


def test_equals_python_integers_on_random_counters():
    draw = random.Random(0)
    for _ in range(50):
        counters = tuple(draw.getrandbits(32) for _ in range(4))
        key = tuple(draw.getrandbits(32) for _ in range(2))
        result = philox.philox4x32(key, as_tensors(counters))
        assert tuple(int(word) for word in result) == python_philox(counters, key)


# The corners of every field, and one ordinary value.
@pytest.mark.parametrize("seed", [0, 17, 2**64 - 1])
@pytest.mark.parametrize("sample", [0, 12345, 2**32, 2**63 - 1])
@pytest.mark.parametrize("epoch", [0, 2**24 - 1])
@pytest.mark.parametrize("position", [0, 2**32 - 1])
def test_bits_place_each_field_in_its_counter(seed, sample, epoch, position):
    counters = (position, sample % 2**32, sample >> 32, epoch | Stream.PRIOR << 24)
    expected = python_philox(counters, (seed % 2**32, seed >> 32))[0]
    assert int(philox.bits(seed, Stream.PRIOR, sample, epoch, position)) == expected
    as_tensor = philox.bits(
        seed, Stream.PRIOR, torch.tensor([sample]), torch.tensor(epoch), torch.tensor([[position]])
    )
    assert as_tensor.shape == (1, 1) and as_tensor.dtype == torch.int64
    assert int(as_tensor) == expected


def test_stream_values_are_fixed():
    assert {stream.name: int(stream) for stream in Stream} == {
        "NOISE": 0,
        "WORD_DROPOUT": 1,
        "AUGMENT_SPAN": 2,
        "AUGMENT_WORD": 3,
        "AUGMENT_SHUFFLE": 4,
        "PRIOR": 5,
        "SAMPLING": 6,
        "STEP": 7,
    }


@pytest.mark.parametrize("draw", [philox.bits, philox.uniform, philox.normal])
def test_a_draw_does_not_depend_on_shape_or_layout(draw):
    # 7 x 37: not a multiple of any vector width, so a vectorised tail would show.
    sample = torch.arange(7)[:, None] + 2**40
    position = torch.arange(37)[None, :]
    together = draw(3, Stream.NOISE, sample, 5, position)
    assert together.shape == (7, 37)
    alone = torch.stack(
        [torch.stack([draw(3, Stream.NOISE, 2**40 + s, 5, p) for p in range(37)]) for s in range(7)]
    )
    assert torch.equal(together, alone)
    assert torch.equal(together, draw(3, Stream.NOISE, sample.T, 5, position.T).T)
    strided = torch.arange(74)[::2] // 2
    assert torch.equal(together, draw(3, Stream.NOISE, sample, 5, strided[None, :]))
    # Flat, with nothing left to broadcast.
    flat = draw(3, Stream.NOISE, sample.expand(7, 37).flatten(), 5, position.repeat(1, 7)[0])
    assert torch.equal(together.flatten(), flat)


@pytest.mark.parametrize("field", ["seed", "stream", "sample_index", "epoch", "position"])
def test_every_field_changes_the_draw(field):
    names = {"seed": 1, "stream": 1, "sample_index": 1, "epoch": 1, "position": 1}
    position = torch.arange(64)
    base = philox.bits(1, 1, 1, 1, position + 1)
    # The same draw but for one field.
    names[field] = 2
    other = philox.bits(
        names["seed"],
        names["stream"],
        names["sample_index"],
        names["epoch"],
        position + names["position"],
    )
    assert not torch.equal(base, other)


def test_uniform_is_the_upper_24_bits():
    position = torch.arange(1000)
    value = philox.uniform(9, Stream.SAMPLING, 4, 0, position)
    assert value.dtype == torch.float32
    word = philox.bits(9, Stream.SAMPLING, 4, 0, position)
    assert [float(v) for v in value] == [(int(w) >> 8) / 2**24 for w in word]


def test_uniform_moments():
    value = philox.uniform(1, Stream.NOISE, 0, 0, torch.arange(100_000)).double()
    # Five standard errors of the mean and of the second moment.
    assert abs(value.mean() - 1 / 2) < 5 * math.sqrt(1 / 12 / 1e5)
    assert abs((value**2).mean() - 1 / 3) < 5 * math.sqrt(4 / 45 / 1e5)
    assert value.min() >= 0 and value.max() < 1


def test_normal_equals_box_muller_in_double_precision():
    counters = torch.arange(2000)
    value = philox.normal(2, Stream.NOISE, 11, 3, counters)
    assert value.dtype == torch.float32
    for position, drawn in enumerate(value.tolist()):
        a, b, _, _ = python_philox((position, 11, 0, 3), (2, 0))
        radius = math.sqrt(-2 * math.log(((a >> 8) + 1) / 2**24))
        exact = radius * math.cos(2 * math.pi * (b >> 8) / 2**24)
        # Rounded once to fp32 (2^-24); near a zero of the cosine the error of 2 pi in fp64 shows.
        assert abs(drawn - exact) <= 2**-24 * abs(exact) + 1e-14


def test_normal_moments():
    value = philox.normal(1, Stream.PRIOR, torch.arange(1000)[:, None], 0, torch.arange(100))
    value = value.double().flatten()
    n = value.numel()
    # Five standard errors; the k-th even moments of a normal are 1, 3 and 15.
    assert abs(value.mean()) < 5 * math.sqrt(1 / n)
    assert abs((value**2).mean() - 1) < 5 * math.sqrt(2 / n)
    assert abs((value**3).mean()) < 5 * math.sqrt(15 / n)
    assert abs((value**4).mean() - 3) < 5 * math.sqrt(96 / n)
    assert torch.isfinite(value).all()


def test_normal_at_the_corners_of_its_words():
    log = reference.log_of_24_bits(torch.tensor([1, 2**23, 2**24 - 1, 2**24]))
    expected = [math.log(k / 2**24) for k in (1, 2**23, 2**24 - 1, 2**24)]
    assert log.tolist() == pytest.approx(expected, rel=1e-15, abs=0)
    # Eighths of a turn: every quarter and the middle of every quarter.
    turns = torch.arange(0, 2**24, 2**21)
    cosine = reference.cos_of_24_bits(turns)
    root = math.sqrt(0.5)
    expected = [1, root, 0, -root, -1, -root, 0, root]
    assert cosine.tolist() == pytest.approx(expected, rel=1e-15, abs=0)


@pytest.mark.parametrize(
    "arguments, message",
    [
        ((-1, 0, 0, 0, 0), r"seed=-1"),
        ((2**64, 0, 0, 0, 0), r"seed="),
        ((0, 256, 0, 0, 0), r"stream=256"),
        ((0, 0, 2**63, 0, 0), r"sample_index="),
        ((0, 0, 0, 2**24, 0), r"epoch=16777216"),
        ((0, 0, 0, 0, 2**32), r"position="),
        ((0, 0, 0, True, 0), r"epoch=True"),
        ((0, 0, torch.tensor([-3]), 0, 0), r"sample_index holds -3"),
        ((0, 0, 0, 0, torch.tensor([2**32])), r"position holds 4294967296"),
        ((0, 0, 0, 0, torch.tensor([0.5])), r"position has dtype torch.float32"),
    ],
)
def test_values_outside_their_field_are_refused(arguments, message):
    with pytest.raises(ValueError, match=message):
        philox.uniform(*arguments)


def test_an_unknown_implementation_is_refused():
    with pytest.raises(ValueError, match=r"impl='cuda': philox.bits has .*'reference', 'triton'"):
        philox.bits(0, 0, 0, 0, 0, impl="cuda")
