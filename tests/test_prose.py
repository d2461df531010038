"""How code is written down: comments at phases, sentences that need no decoding.

ruff holds the docstrings (D1, D205, D401 in pyproject.toml).
"""

from __future__ import annotations

import ast
import io
import tokenize
from pathlib import Path

import pytest

from support.runs import REPOSITORY

TREES = ("cdpvae", "kernels")
# A function body longer than this is read in phases, and says where they begin.
LONG_BODY = 25
MIN_COMMENT_SHARE = 0.04
# What had to be decoded when it was first read.
RIDDLES = (
    "What the tokenizer is called is none",
    "an unreadable file is one too",
    "another text is as good as one of them",
    '"""One more."""',
    '"""How bad it is."""',
    "What is computed only to be looked at",
    "It tells who steers the encoder",
    "What became of",
    "between the rooms of the house",
    "that travel",
)


def sources() -> list[Path]:
    return sorted(path for tree in TREES for path in (REPOSITORY / tree).rglob("*.py"))


def comment_lines(text: str) -> set[int]:
    """Lines that hold a comment and nothing else."""
    found = set()
    for token in tokenize.generate_tokens(io.StringIO(text).readline):
        if token.type == tokenize.COMMENT and token.line.lstrip().startswith("#"):
            found.add(token.start[0])
    return found


def bodies(tree: ast.Module):
    """Every function with the lines of its body, the docstring left out."""
    for node in ast.walk(tree):
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            statements = node.body
            if isinstance(statements[0], ast.Expr) and isinstance(
                statements[0].value, ast.Constant
            ):
                statements = statements[1:]
            if statements:
                yield node, statements[0].lineno, node.end_lineno


@pytest.mark.parametrize("path", sources(), ids=lambda p: str(p.relative_to(REPOSITORY)))
def test_a_long_function_says_where_its_phases_begin(path):
    """At least two comments, and one for every 20 lines: a long body has several phases."""
    text = path.read_text()
    comments = comment_lines(text)
    silent = [
        f"{node.name}:{node.lineno}, {last - first + 1} lines"
        for node, first, last in bodies(ast.parse(text))
        if last - first + 1 > LONG_BODY
        # A comment may stand right before the first statement.
        and len(comments & set(range(first - 3, last + 1))) < max(2, (last - first + 1) // 20)
    ]
    assert not silent


def test_comments_are_part_of_the_code():
    lines = comments = 0
    for path in sources():
        text = path.read_text()
        lines += text.count("\n")
        comments += len(comment_lines(text))
    assert comments / lines >= MIN_COMMENT_SHARE, f"{comments} of {lines} lines"


@pytest.mark.parametrize("riddle", RIDDLES)
def test_nothing_has_to_be_decoded(riddle):
    files = [*sources(), *REPOSITORY.glob("*.md"), *(REPOSITORY / "docs").glob("*.md")]
    log = REPOSITORY / "docs" / "LOG.md"
    assert [str(p) for p in files if p != log and riddle in p.read_text()] == []
