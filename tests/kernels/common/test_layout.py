"""The package can be read and run file by file."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

import cdpvae_kernels
from cdpvae_kernels.common.tuning import tuning_modules

PACKAGE = Path(cdpvae_kernels.__file__).parent
OPERATIONS = [
    "bag_of_words",
    "linear_cross_entropy",
    "philox",
    "prefixed_embedding",
    "word_dropout",
]


def test_no_file_shadows_a_library_when_a_file_beside_it_runs_as_a_script():
    """A script's own folder comes first on the path: a `triton.py` there would be imported."""
    # The standard library's names too: an `operator.py` would be imported by all of them.
    names = {path.stem for path in PACKAGE.rglob("*.py")} - {"__init__"}
    assert not names & {"torch", "triton", *sys.stdlib_module_names}


@pytest.mark.parametrize("operation", ["philox", "linear_cross_entropy"])
def test_a_file_with_kernels_runs_as_a_script(operation):
    # Another process: in this one Triton is imported already.
    path = PACKAGE / operation / "triton_launch.py"
    environment = {**os.environ, "PYTHONPATH": str(PACKAGE.parent)}
    subprocess.run([sys.executable, str(path)], env=environment, check=True)


@pytest.mark.launch
def test_the_kernels_are_tested_where_there_is_torch_alone():
    """Collected by a process that cannot find what else cdpvae needs."""
    missing = ("pydantic", "transformers", "peft", "tyro", "deepspeed", "datasets")
    hide = (
        "import importlib.machinery as m, importlib.util as u, sys\n"
        f"missing = {missing}\n"
        "find = m.PathFinder.find_spec\n"
        "m.PathFinder.find_spec = classmethod(lambda c, name, *a: "
        "None if name.split('.')[0] in missing else find(name, *a))\n"
        "import pytest\n"
        "sys.exit(pytest.main(['--collect-only', '-q', 'tests/kernels']))\n"
    )
    root = Path(__file__).parents[3]
    done = subprocess.run([sys.executable, "-c", hide], cwd=root, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout[-2000:]


def test_every_operation_has_its_tuning_tables():
    assert [module.__name__.split(".")[1] for module in tuning_modules()] == OPERATIONS
