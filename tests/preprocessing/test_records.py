"""What is shown of a record, and the text by which records are compared."""

from __future__ import annotations

import subprocess
import sys

import pytest

from cdpvae.preprocessing.records import EXCERPT_CHARACTERS, compared_text, excerpt


def test_both_sides_are_compared():
    assert compared_text("ask", "reply") == "ask\nreply"


@pytest.mark.parametrize(
    ("content", "shown"),
    [
        ("a line\nand another ü", "a line\nand another ü"),
        (b"bytes \xc3\xbc \xff", "bytes ü \\xff"),
        ({"n": 1, "text": "ü"}, '{"n": 1, "text": "ü"}'),
        (["a", None], '["a", null]'),
        ("a\0b\x1b\u202e", "a\\x00b\\x1b\\x202e"),  # nothing reaches the terminal
        ("half \ud800", "half \\ud800"),
        ("", ""),
    ],
)
def test_an_excerpt_can_always_be_shown(content, shown):
    assert excerpt(content) == shown
    excerpt(content).encode()


@pytest.mark.parametrize("content", ["x" * 10_000, b"x" * 10_000])
def test_an_excerpt_is_short(content):
    assert excerpt(content) == "x" * EXCERPT_CHARACTERS


def test_deduplication_needs_neither_torch_nor_transformers():
    """Who wants signatures alone must not wait for them."""
    code = (
        "import sys\n"
        "import cdpvae.preprocessing.dedup.minhash, cdpvae.preprocessing.dedup.clusters\n"
        "heavy = {'torch', 'transformers', 'datasets'} & set(sys.modules)\n"
        "assert not heavy, heavy\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
