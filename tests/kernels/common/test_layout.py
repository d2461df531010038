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


def test_every_operation_has_its_tuning_tables():
    assert [module.__name__.split(".")[1] for module in tuning_modules()] == OPERATIONS
