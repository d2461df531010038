"""Which table counts, and what a broken one says."""

import json

import pytest
import torch

from cdpvae_kernels.common import launch_configs
from cdpvae_kernels.common.launch_configs import SHIPPED, describe, launch_config, read_table

GPU = torch.device("cuda", 0)
ROWS = "linear_cross_entropy.rows"


@pytest.fixture
def gpu(monkeypatch, tmp_path):
    """A GPU called 'Some GPU' of compute capability 8.9; the user's table is in tmp_path."""
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (8, 9))
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "Some GPU")
    path = tmp_path / "mine.json"
    monkeypatch.setenv(launch_configs.USER_TABLE_VARIABLE, str(path))
    # Tables are read once and kept, so before and after each test they are dropped.
    read_table.cache_clear()
    yield path
    read_table.cache_clear()


def test_the_architecture_decides_where_nothing_was_tuned(gpu):
    assert launch_config(ROWS, GPU) == json.loads(SHIPPED.read_text())["sm_89"][ROWS]
    assert describe(GPU) == "launch_configs.json: sm_89"


def test_an_architecture_without_entries_takes_the_default(gpu, monkeypatch):
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (12, 0))
    assert launch_config(ROWS, GPU) == json.loads(SHIPPED.read_text())["default"][ROWS]


def test_the_users_table_counts_first_and_only_for_its_gpu(gpu, monkeypatch):
    tuned = {"BLOCK_V": 512, "num_warps": 2, "num_stages": 1}
    gpu.write_text(json.dumps({"Some GPU": {ROWS: tuned}}))
    assert launch_config(ROWS, GPU) == tuned
    assert describe(GPU) == f"{gpu}: Some GPU"
    # What the table lacks comes from the shipped one.
    shipped = json.loads(SHIPPED.read_text())["sm_89"]
    finish = "linear_cross_entropy.finish"
    assert launch_config(finish, GPU) == shipped[finish]
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "Another GPU")
    assert launch_config(ROWS, GPU) == shipped[ROWS]


@pytest.mark.parametrize("text", ["{", "[1]", '{"Some GPU": {"kernel": {"BLOCK_V": "64"}}}', "{}"])
def test_a_broken_table_is_one_line(gpu, text):
    gpu.write_text(text)
    with pytest.raises(ValueError, match=r"launch configurations .*mine\.json: "):
        launch_config(ROWS, GPU)


def test_every_table_names_the_same_kernels():
    names = [set(entry) for entry in json.loads(SHIPPED.read_text()).values()]
    assert all(entry == names[0] for entry in names)


def test_an_unknown_kernel_is_our_bug():
    with pytest.raises(KeyError, match="no launch configuration of 'nothing'"):
        launch_config("nothing", torch.device("cpu"))
