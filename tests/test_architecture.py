"""Who may import whom, how long a file may be, how many files a folder may hold.

docs/architecture.md says why.
"""

from __future__ import annotations

import ast
import graphlib
import re
import sys
from collections import Counter
from pathlib import Path

import pytest

from support.runs import REPOSITORY

PACKAGE = REPOSITORY / "cdpvae"
# Packages by floor, the lowest first: a package imports from lower floors only.
FLOORS = (
    {"cdpvae_kernels", "config", "batch", "files"},
    {"command_line", "latents", "data", "profiling"},
    {"metrics", "loss", "preprocessing", "training"},
    {"collapse", "models", "sample"},
    {"evaluation"},
    {"tasks", "experiments"},
    {"compatibility"},
)
FOUNDATION = FLOORS[0]
MAY_IMPORT = {
    "config": set(),
    "batch": set(),
    "files": set(),
    "command_line": {"config"},
    "latents": FOUNDATION,
    "data": FOUNDATION,
    "profiling": FOUNDATION,
    "metrics": {"latents", *FOUNDATION},
    "loss": {"latents", *FOUNDATION},
    "preprocessing": {"data", *FOUNDATION},
    "training": {"data", *FOUNDATION},
    "collapse": {"metrics", "latents", *FOUNDATION},
    "models": {"latents", "loss", *FOUNDATION},
    "sample": {"preprocessing", "training", *FOUNDATION},
    "evaluation": {
        "models",
        "metrics",
        "latents",
        "data",
        "preprocessing",
        "sample",
        *FOUNDATION,
    },
    "experiments": {"evaluation", "training", *FOUNDATION},
    "tasks": set().union(*FLOORS[:5]) - {"command_line"},
    "compatibility": set().union(*FLOORS[:5]) - {"command_line"},
}
COMMANDS = {
    "train",
    "preprocess",
    "evaluate",
    "evaluate_reconstruction",
    "check_latents",
    "encode",
    "decode",
    "generate",
    "sample_data",
    "sample_report",
    "sweep",
    "tiny_backbone",
}
MAX_LIBRARY_LINES, MAX_TEST_LINES, MAX_COMMAND_LINES = 400, 600, 60
MAX_FILES = 16


def sources() -> list[Path]:
    return sorted(PACKAGE.rglob("*.py"))


def package_of(path: Path) -> str:
    return path.relative_to(PACKAGE).with_suffix("").parts[0]


def packages_imported(path: Path) -> set[str]:
    """Packages of ours that a file imports anywhere, also inside functions."""
    packages = set()
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
                packages.add(rest.split(".")[0])
            elif top == "cdpvae_kernels":
                packages.add(top)
    return packages - {package_of(path)}


@pytest.mark.parametrize("path", sources(), ids=lambda p: str(p.relative_to(REPOSITORY)))
def test_imports_go_down(path):
    package = package_of(path)
    if package == "__init__" or package in COMMANDS:
        assert not packages_imported(path) & COMMANDS
        return
    assert package in MAY_IMPORT, f"{package} has no floor yet: give it one here"
    assert packages_imported(path) <= MAY_IMPORT[package]


def test_what_may_be_imported_is_on_a_lower_floor():
    floor_of = {package: number for number, floor in enumerate(FLOORS) for package in floor}
    assert floor_of.keys() == {*MAY_IMPORT, "cdpvae_kernels"}
    for package, allowed in MAY_IMPORT.items():
        for other in allowed:
            assert floor_of[other] < floor_of[package], f"{package} may not import {other}"


def modules_imported(path: Path) -> set[str]:
    """Modules of ours that a file imports anywhere, for types too."""
    found = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module:
            names = {f"{node.module}.{alias.name}" for alias in node.names}
            inside = {name for name in names if name in MODULES}
            found |= inside | ({node.module} if inside != names else set())
    return found & MODULES.keys()


MODULES = {
    ".".join(path.relative_to(REPOSITORY).with_suffix("").parts).removesuffix(".__init__"): path
    for path in sources()
}


def test_no_files_import_each_other_in_a_circle():
    graph = {name: modules_imported(path) for name, path in MODULES.items()}
    try:
        list(graphlib.TopologicalSorter(graph).static_order())
    except graphlib.CycleError as error:
        pytest.fail(" -> ".join(error.args[1]))


def test_the_training_loop_imports_no_model():
    imported = set().union(*(packages_imported(p) for p in (PACKAGE / "training").glob("*.py")))
    assert not imported & {"models", "loss", "latents", "collapse", "tasks", "evaluation"}


def test_the_latent_stays_inside_its_family():
    """`logvar` and the question whether there is a latent belong to latents/ and the settings."""
    for path in sources():
        if package_of(path) in {"latents", "config", "compatibility"}:
            continue
        text = path.read_text()
        assert "logvar" not in text, path
        assert "no_latent" not in text and 'kind == "none"' not in text, path


# Distributions whose import name is another.
DISTRIBUTIONS = {"fasttext": "fasttext-predict", "rouge_score": "rouge-score"}
# Imported where they are installed: extras, and what runs on a GPU.
OPTIONAL = {"flash_attn", "ray", "triton"}


def test_every_import_is_required():
    """An installed package brings all that it imports."""
    setup = ast.parse((REPOSITORY / "setup.py").read_text())
    keywords = [node for node in ast.walk(setup) if isinstance(node, ast.keyword)]
    (required,) = [word.value for word in keywords if word.arg == "install_requires"]
    names = {re.split(r"[<>=!~ ]", ast.literal_eval(item))[0] for item in required.elts}
    imported = set()
    for path in [*sources(), *(REPOSITORY / "kernels").rglob("*.py")]:
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.Import):
                imported |= {alias.name.split(".")[0] for alias in node.names}
            elif isinstance(node, ast.ImportFrom) and node.module:
                imported.add(node.module.split(".")[0])
    ours = {"cdpvae", "cdpvae_kernels"} | set(sys.stdlib_module_names) | OPTIONAL
    missing = {
        name
        for name in imported - ours
        if not {DISTRIBUTIONS.get(name, name), name.replace("_", "-")} & names
    }
    assert not missing


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


def test_files_stay_short():
    library = [*sources(), *(REPOSITORY / "kernels").rglob("*.py")]
    tests = REPOSITORY.glob("tests/**/*.py")
    commands = [PACKAGE / f"{name}.py" for name in COMMANDS]
    for files, limit in (
        (library, MAX_LIBRARY_LINES),
        (tests, MAX_TEST_LINES),
        (commands, MAX_COMMAND_LINES),
    ):
        long = {str(p): n for p in files if (n := len(p.read_text().splitlines())) > limit}
        assert not long, f"over {limit} lines"


def test_folders_stay_small():
    entry_points = {PACKAGE / f"{name}.py" for name in COMMANDS}
    trees = (PACKAGE, REPOSITORY / "kernels", REPOSITORY / "tests", REPOSITORY / "benchmarks")
    files = [p for tree in trees for p in tree.rglob("*.py") if p not in entry_points]
    crowded = {str(k): n for k, n in Counter(p.parent for p in files).items() if n > MAX_FILES}
    assert not crowded


def test_what_a_gpu_needs_compiles_nothing():
    """flash-attn is an sdist: pip compiles CUDA code for long; varlen takes its place."""
    tree = ast.parse((REPOSITORY / "setup.py").read_text())
    extras = next(
        ast.literal_eval(keyword.value)
        for node in ast.walk(tree)
        if isinstance(node, ast.Call)
        for keyword in node.keywords
        if keyword.arg == "extras_require"
    )
    assert extras["flash-attn"] == ["flash-attn"]
    others = [name for name in extras if name != "flash-attn"]
    assert not [name for name in others if any("flash" in package for package in extras[name])]
