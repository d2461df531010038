"""The wheel works where the repository is not: an installed cdpvae trains and evaluates.

The wheel is installed without its dependencies into an environment of its own, which finds those
of the running environment through a `.pth` file. A directory that a `.pth` file names is searched
for modules only, and its own `.pth` files are not read: an editable cdpvae there is not found.
"""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import sysconfig
import zipfile
from pathlib import Path

import pytest

from support.runs import REPOSITORY

pytestmark = pytest.mark.slow

SOURCES = ("setup.py", "pyproject.toml", "LICENSE", "cdpvae", "kernels", "ds_configs")
# Where each source folder lies in the wheel.
PLACES = {"cdpvae": "cdpvae", "kernels/cdpvae_kernels": "cdpvae_kernels"}
PLACES["ds_configs"] = "cdpvae/ds_configs"


@pytest.fixture(scope="module")
def wheel(tmp_path_factory) -> Path:
    """Built from a copy: setuptools leaves `build/` behind, and would take up an old one."""
    root = tmp_path_factory.mktemp("wheel")
    copy = root / "source"
    copy.mkdir()
    for name in SOURCES:
        source = REPOSITORY / name
        if source.is_dir():
            ignored = shutil.ignore_patterns("__pycache__", "*.egg-info")
            shutil.copytree(source, copy / name, ignore=ignored)
        else:
            shutil.copy(source, copy / name)
    flags = ["--no-deps", "--no-build-isolation", "--no-index", "--wheel-dir", str(root)]
    run([sys.executable, "-m", "pip", "wheel", str(copy), *flags], root)
    [built] = root.glob("*.whl")
    return built


@pytest.fixture(scope="module")
def bare(wheel, tmp_path_factory) -> Path:
    """The Python of an environment that has the wheel, and sees the dependencies."""
    root = tmp_path_factory.mktemp("bare")
    run([sys.executable, "-m", "venv", "--without-pip", str(root)], root)
    python = root / "bin" / "python"
    flags = ["--no-deps", "--no-index", str(wheel)]
    run([sys.executable, "-m", "pip", "--python", str(python), "install", *flags], root)
    folders = {sysconfig.get_path("purelib"), sysconfig.get_path("platlib")}
    folders |= {path for path in sys.path if path.endswith(("site-packages", "dist-packages"))}
    [site] = root.glob("lib/python*/site-packages")
    (site / "dependencies.pth").write_text("".join(f"{path}\n" for path in sorted(folders)))
    return python


def run(command: list[str], directory: Path) -> str:
    """Run in `directory`, with nothing that would lead back to the repository -> stdout."""
    environment = {
        **os.environ,
        "OMP_NUM_THREADS": "1",
        "DS_ACCELERATOR": "cpu",
        "TOKENIZERS_PARALLELISM": "false",
        "PATH": f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}",
    }
    rendezvous = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT")
    for name in ("PYTHONPATH", "PYTHONHOME", *rendezvous):
        environment.pop(name, None)
    done = subprocess.run(
        command, cwd=directory, env=environment, capture_output=True, text=True, timeout=600
    )
    assert done.returncode == 0, f"{command}\n{done.stdout[-2000:]}\n{done.stderr[-4000:]}"
    return done.stdout


def test_the_wheel_holds_every_file_of_the_packages(wheel):
    expected = set()
    for source, place in PLACES.items():
        for path in (REPOSITORY / source).rglob("*"):
            if path.is_file() and "__pycache__" not in path.parts:
                expected.add(f"{place}/{path.relative_to(REPOSITORY / source).as_posix()}")
    names = {name for name in zipfile.ZipFile(wheel).namelist() if ".dist-info/" not in name}
    assert names == expected
    assert {"cdpvae/py.typed", "cdpvae_kernels/py.typed"} <= names


def test_from_nothing_to_an_evaluated_run(bare, tmp_path):
    def command(module: str, *arguments: str) -> str:
        return run([str(bare), "-m", f"cdpvae.{module}", *arguments], tmp_path)

    # The package under test is the installed one, and its DeepSpeed files came with it.
    places = "import cdpvae, cdpvae_kernels; from cdpvae.training import engine; "
    places += "print(cdpvae.__file__, cdpvae_kernels.__file__, engine.DS_CONFIGS, sep='\\n')"
    found = run([str(bare), "-c", places], tmp_path).splitlines()[-3:]
    environment = bare.parents[1].resolve()
    assert all(Path(path).resolve().is_relative_to(environment) for path in found), found
    assert "--learning-rate" in command("train", "--help")

    # The quickstart's steps at the smallest sizes.
    command("sample_data", "--output", "data", "--pairs", "200", "--validation-pairs", "40")
    pairs = ("--input", "data/pairs.jsonl")
    small = ("--hidden", "32", "--layers", "1", "--heads", "2", "--vocab-size", "600")
    command("tiny_backbone", *pairs, "--output", "backbone", *small, "--steps", "5")
    # The pairs are near-duplicates of each other by construction.
    exact = ("--processed-dir", "processed", "--deduplication", "exact")
    command("preprocess", *pairs, "--tokenizer", "backbone", *exact)
    sizes = ("--latent-dim", "8", "--vae-hidden-dim", "16", "--num-soft-tokens", "4")
    sizes += ("--pooling-heads", "2", "--lora-r", "4", "--per-device-batch-size", "8")
    sizes += ("--gradient-accumulation-steps", "1", "--precision", "fp32", "--num-threads", "1")
    steps = ("--max-steps", "4", "--save-steps", "4", "--eval-steps", "4", "--eval-rows", "8")
    where = ("--backbone", "backbone", "--processed-dir", "processed", "--output-dir", "run")
    command("train", *where, *sizes, *steps, "--sample-rows", "1", "--sample-max-length", "8")
    assert len((tmp_path / "run" / "steps.jsonl").read_text().splitlines()) == 4

    rows = ("--num-samples", "4", "--num-rows", "16", "--max-length", "8")
    checkpoint = ("--checkpoint", "run/checkpoint-4", "--output", "reconstruction.json")
    command("evaluate_reconstruction", *checkpoint, *rows)
    result = json.loads((tmp_path / "reconstruction.json").read_text())
    assert result["likelihood"]["rows"] == 16 and len(result["texts"]) == 4
