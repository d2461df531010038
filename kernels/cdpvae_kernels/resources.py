"""Registers, spills and shared memory of every kernel, compiled without a GPU.

    python -m cdpvae_kernels.resources [--arch sm_89 sm_90] [--csv FILE] [--check]

Each kernel is compiled with each configuration that `launch_configs.json` ships for the
architecture, for the shapes of an 8B Llama, and the tools that come with Triton read the machine
code. Spills are counted as stores to local memory (STL). `--check` fails where a hot kernel spills,
a block wants more shared memory than the architecture has, or NaN would become a number. Of a
Triton before 3.7 a few spills are accepted: it has five such kernels, of at most eight stores.
"""

from __future__ import annotations

import argparse
import csv
import re
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from dataclasses import asdict, dataclass, fields
from pathlib import Path

from cdpvae_kernels.common.launch_configs import SHIPPED, read_table
from cdpvae_kernels.common.tuning import Specialization, tuning_modules

# Bytes one block may use (CUDA programming guide, compute capabilities).
SHARED_MEMORY_LIMIT = {"sm_80": 166912, "sm_86": 101376, "sm_89": 101376, "sm_90": 232448}
# The L40S, and the H100 and H200.
DEFAULT_ARCHITECTURES = ("sm_89", "sm_90")
WARP_SIZE = 32
# A handful of stores beside a block's thousands of loads is no time that could be measured.
SPILLS_OF_OLDER_TRITON = 8


@dataclass(frozen=True)
class Usage:
    """What one compiled kernel uses.

    arch: "sm_89" for compute capability 8.9.
    kernel: its name, which tells the operation, the kernel and the variant.
    config: the block sizes, warps and stages that it was compiled with.
    registers: per thread.
    spills: stores to local memory in the machine code.
    shared: bytes of shared memory per block.
    hot: spills are not accepted.
    drops_nan: the instruction that keeps NaN what it is is missing.
    """

    arch: str
    kernel: str
    config: str
    registers: int
    spills: int
    shared: int
    hot: bool
    drops_nan: bool = False

    def problem(self, accepted_spills: int = 0) -> str | None:
        """Say why this kernel is not acceptable; returns None where it is.

        accepted_spills: of a hot kernel.
        """
        if self.hot and self.spills > accepted_spills:
            return f"{self.arch} {self.kernel} ({self.config}): {self.spills} spills"
        if self.drops_nan:
            return f"{self.arch} {self.kernel} ({self.config}): NaN becomes a number"
        limit = SHARED_MEMORY_LIMIT[self.arch]
        if self.shared > limit:
            return f"{self.arch} {self.kernel} ({self.config}): {self.shared} bytes > {limit}"
        return None


def measure(arch: str) -> list[Usage]:
    """Compile every specialization for `arch`. Raises ValueError for an unknown architecture.

    Must run without TRITON_INTERPRET: interpreted kernels are no kernels to compile.
    """
    if arch not in SHARED_MEMORY_LIMIT:
        raise ValueError(f"arch={arch!r}; known are {', '.join(SHARED_MEMORY_LIMIT)}")
    return [_compile(name, spec, arch) for name, spec in specializations().items()]


def specializations() -> dict[str, Specialization]:
    """Collect every operation's, by a name that tells operation, kernel and variant."""
    found: dict[str, Specialization] = {}
    for module in tuning_modules():
        found |= module.specializations()
    return found


def accepted_spills(version: str) -> int:
    """Return how many spills of a hot kernel this version of Triton is let through with."""
    major, minor = (int(part) for part in version.split(".")[:2])
    return SPILLS_OF_OLDER_TRITON if (major, minor) < (3, 7) else 0


def _compile(name: str, spec: Specialization, arch: str) -> Usage:
    """Compile one specialization with the shipped configuration and read its machine code."""
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    # Block sizes are constexprs of the kernel; warps and stages are options of the compiler, the
    # number of programs is the size of the grid.
    table = read_table(SHIPPED)
    config = table.get(arch, table["default"])[spec.config]
    names = spec.kernel.arg_names
    blocks = {key: value for key, value in config.items() if key in names}

    # The same description of the arguments that a launch would make from their values.
    source = ASTSource(
        spec.kernel,
        signature={n: spec.signature.get(n, "constexpr") for n in names},
        constexprs={(names.index(n),): v for n, v in {**spec.constants, **blocks}.items()},
        attrs={(names.index(n),): [["tt.divisibility", 16]] for n in spec.aligned},
    )
    options = {key: config[key] for key in ("num_warps", "num_stages")} | spec.options
    target = GPUTarget("cuda", int(arch.removeprefix("sm_")), WARP_SIZE)

    # Compiled for the architecture by name: no GPU needs to be there.
    compiled = triton.compile(source, target=target, options=options)
    registers, spills = _read_machine_code(compiled.asm["cubin"])
    shown = " ".join(f"{key}={value}" for key, value in config.items())
    drops_nan = spec.keeps_nan is not None and spec.keeps_nan not in compiled.asm["ptx"]
    shared = compiled.metadata.shared
    return Usage(arch, name, shown, registers, spills, shared, spec.hot, drops_nan)


def _read_machine_code(cubin: bytes) -> tuple[int, int]:
    """Return the registers per thread, and the number of stores to local memory."""
    from triton import knobs

    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "kernel.cubin"
        path.write_bytes(cubin)
        usage = _run(knobs.nvidia.cuobjdump.path, "--dump-resource-usage", str(path))
        code = _run(knobs.nvidia.nvdisasm.path, "-c", str(path))
    registers = re.search(r"REG:(\d+)", usage)
    assert registers is not None, f"cuobjdump names no registers: {usage}"
    return int(registers[1]), len(re.findall(r"\bSTL\b", code))


def _run(*command: str) -> str:
    return subprocess.run(command, check=True, capture_output=True, text=True).stdout


def table(usages: Sequence[Usage]) -> str:
    """Lay the usages out as lines for a terminal."""
    head = tuple(f.name for f in fields(Usage))
    cells = [head, *(tuple(str(v) for v in asdict(u).values()) for u in usages)]
    widths = [max(len(row[i]) for row in cells) for i in range(len(head))]
    return "\n".join(
        "  ".join(c.ljust(w) for c, w in zip(row, widths, strict=True)).rstrip() for row in cells
    )


def main(argv: Sequence[str] | None = None) -> int:
    """Measure, print and, if asked, write and check; returns the exit status."""
    # Compile everything that the command line names.
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--arch", nargs="+", default=DEFAULT_ARCHITECTURES)
    parser.add_argument("--csv", type=Path, help="write the table to this file as well")
    parser.add_argument("--check", action="store_true", help="exit 1 where a limit is passed")
    options = parser.parse_args(argv)
    try:
        usages = [usage for arch in options.arch for usage in measure(arch)]
    except ValueError as error:
        parser.error(str(error))

    # Show the figures and keep them where asked.
    print(table(usages))
    if options.csv:
        with options.csv.open("w", newline="") as file:
            writer = csv.DictWriter(file, [f.name for f in fields(Usage)], lineterminator="\n")
            writer.writeheader()
            writer.writerows(asdict(usage) for usage in usages)

    # Limits decide the exit status only where asked.
    import triton

    accepted = accepted_spills(triton.__version__)
    problems = [problem for usage in usages if (problem := usage.problem(accepted))]
    for problem in problems if options.check else ():
        print(f"error: {problem}", file=sys.stderr)
    return 1 if options.check and problems else 0


if __name__ == "__main__":
    sys.exit(main())
