"""The house: who may import whom, how long a file may be."""

from __future__ import annotations

import ast
from pathlib import Path

import pytest

from support.runs import REPOSITORY

FOUNDATION = {"cdpvae_kernels", "config", "batch", "files"}
MAY_IMPORT = {
    "config": set(),
    "batch": set(),
    "files": set(),
    "command_line": {"config"},
    "metrics": set(),
    "profiling": FOUNDATION,
    "loss": FOUNDATION,
    "collapse": {"metrics", *FOUNDATION},
    "data": FOUNDATION,
    "preprocessing": {"data", *FOUNDATION},
    "models": {"loss", *FOUNDATION},
    "evaluation": {"models", "loss", "metrics", "data", *FOUNDATION},
    "training": {"tasks", "models", "loss", "collapse", "data", *FOUNDATION},
    # Of training it takes the learning rate's schedule alone.
    "sample": {"preprocessing", "evaluation", "training", *FOUNDATION},
    "tasks": {
        "training",
        "evaluation",
        "models",
        "loss",
        "collapse",
        "metrics",
        "profiling",
        "preprocessing",
        "data",
        *FOUNDATION,
    },
}
ENTRY_POINTS = {
    "train",
    "preprocess",
    "evaluate_reconstruction",
    "check_latents",
    "generate",
    "sample_data",
    "sample_report",
    "tiny_backbone",
}


def sources() -> list[Path]:
    return sorted((REPOSITORY / "cdpvae").rglob("*.py"))


def room_of(path: Path) -> str:
    parts = path.relative_to(REPOSITORY / "cdpvae").with_suffix("").parts
    return parts[0]


def rooms_imported(path: Path) -> set[str]:
    """Rooms of ours that a file imports anywhere, also inside functions."""
    rooms = set()
    for node in ast.walk(ast.parse(path.read_text())):
        names = []
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: relative import"
            module = node.module or ""
            names = [module]
            if module == "cdpvae":
                names = [f"cdpvae.{alias.name}" for alias in node.names]
        for name in names:
            top, _, rest = name.partition(".")
            if top == "cdpvae" and rest:
                rooms.add(rest.split(".")[0])
            elif top == "cdpvae_kernels":
                rooms.add(top)
    return rooms - {room_of(path)}


@pytest.mark.parametrize("path", sources(), ids=lambda p: str(p.relative_to(REPOSITORY)))
def test_imports_go_down(path):
    room = room_of(path)
    if room == "__init__" or room in ENTRY_POINTS:
        assert not rooms_imported(path) & ENTRY_POINTS
        return
    assert room in MAY_IMPORT, f"{room} has no floor yet: give it one here"
    assert rooms_imported(path) <= MAY_IMPORT[room]


def test_kernels_stand_alone():
    for path in sorted((REPOSITORY / "kernels").rglob("*.py")):
        for node in ast.walk(ast.parse(path.read_text())):
            module = getattr(node, "module", None) or ""
            assert not module.startswith("cdpvae."), path
            for alias in getattr(node, "names", []) if isinstance(node, ast.Import) else []:
                assert alias.name.split(".")[0] != "cdpvae", path


def test_no_module_named_kernels():
    """A top-level package `kernels` would shadow the library transformers loads kernels with."""
    assert not (REPOSITORY / "kernels" / "__init__.py").exists()


def test_no_file_outgrows_its_room():
    files = [*sources(), *(REPOSITORY / "kernels").rglob("*.py"), *REPOSITORY.glob("tests/**/*.py")]
    long = {str(p): n for p in files if (n := len(p.read_text().splitlines())) > 600}
    assert not long
