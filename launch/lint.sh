#!/usr/bin/env bash
# Look for mistakes without running anything: ruff's rules, its format, and the types by mypy.
#
#   ./launch/lint.sh
#
# launch/test.sh runs it first; .pre-commit-config.yaml runs it before a commit.
set -euo pipefail
cd "$(dirname "$0")/.."

# The environment that launch/test.sh made, where there is one.
PATH="$PWD/.venv/bin:$PATH"
command -v ruff >/dev/null || {
    echo "error: ruff is not installed; ./launch/test.sh makes an environment with it" >&2
    exit 2
}
ruff check .
ruff format --check .
# Half a minute the first time, seconds afterwards: .mypy_cache/ keeps what did not change.
python -m mypy
