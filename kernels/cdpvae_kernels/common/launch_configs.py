"""Block sizes and warps of every kernel: a fixed table per GPU architecture.

Nothing is tuned while a program runs: a tuner's choice varies from run to run and with it the
order of summation, so the same command would give other bits. `python -m cdpvae_kernels.tune`
measures on the user's own GPU once and writes a table that then counts for that GPU alone.

Looked up in this order: the user's table under the GPU's name, the shipped table under its
architecture (`sm_89`), the shipped `default`. A configuration names the kernel's constexpr block
sizes, `num_warps` and `num_stages`.
"""

from __future__ import annotations

import json
import os
from functools import cache
from pathlib import Path
from typing import Any

import torch

# Block sizes, `num_warps` and `num_stages` by name; tables hold them by GPU and by kernel.
LaunchConfig = dict[str, int]
Table = dict[str, dict[str, LaunchConfig]]

# The table of the package, and the variable that points to the user's own.
SHIPPED = Path(__file__).with_name("launch_configs.json")
USER_TABLE_VARIABLE = "CDPVAE_KERNELS_CONFIGS"


def user_table_path() -> Path:
    """Return where the tuner writes: $CDPVAE_KERNELS_CONFIGS, or a file in the user's cache."""
    if path := os.environ.get(USER_TABLE_VARIABLE):
        return Path(path)
    cache_home = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    return Path(cache_home) / "cdpvae_kernels" / "launch_configs.json"


def launch_config(kernel: str, device: torch.device) -> LaunchConfig:
    """Look up the configuration of `kernel` ("operation.kernel") on `device`.

    Raises ValueError when the user's table cannot be read, KeyError for an unknown kernel.
    """
    for table, name in _places(device):
        if kernel in table.get(name, {}):
            return table[name][kernel]
    raise KeyError(f"no launch configuration of {kernel!r} in {SHIPPED.name}")


def describe(device: torch.device) -> str:
    """Say which table counts on `device`, for the log: 'launch_configs.json: sm_90'."""
    table, name = next(place for place in _places(device) if place[1] in place[0])
    source = SHIPPED.name if table is read_table(SHIPPED) else str(user_table_path())
    return f"{source}: {name}"


def architecture(device: torch.device) -> str:
    """Return `sm_89` for a CUDA device of compute capability 8.9, the type of any other device."""
    if device.type != "cuda":
        return device.type
    major, minor = torch.cuda.get_device_capability(device)
    return f"sm_{major}{minor}"


@cache
def read_table(path: Path) -> Table:
    """Read a table file. Raises ValueError for a file that is no such table."""
    try:
        table = json.loads(path.read_text())
    except (OSError, UnicodeDecodeError, json.JSONDecodeError) as error:
        raise ValueError(f"launch configurations {path}: cannot be read: {error}") from None
    # A table that was written by hand may be anything: it is used only if all of it is right.
    configs = [c for entry in _values(table) for c in _values(entry)]
    if not configs or not all(isinstance(n, int) for c in configs for n in _values(c)):
        raise ValueError(
            f"launch configurations {path}: must be {{GPU: {{kernel: {{name: integer}}}}}}; "
            "write it with python -m cdpvae_kernels.tune"
        )
    return table


def _places(device: torch.device) -> list[tuple[Table, str]]:
    """List the tables and the names in them under which to look, in order."""
    shipped = read_table(SHIPPED)
    places = [(shipped, architecture(device)), (shipped, "default")]
    path = user_table_path()
    # The user's table is of one GPU by its name, so it counts for no other.
    if device.type == "cuda" and path.exists():
        places.insert(0, (read_table(path), torch.cuda.get_device_name(device)))
    return places


def _values(node: object) -> list[Any]:
    """List the values of a JSON object; what is no object has one value, which no check accepts."""
    return list(node.values()) if isinstance(node, dict) else [None]
