#!/usr/bin/env bash
# Install what the tests need and run them.
#
#   ./launch/test.sh            the quick suite: at most 20 minutes on 2 CPU cores
#   ./launch/test.sh --all      everything: full matrices and golden runs too, about two hours
#   ./launch/test.sh PYTEST-ARGUMENTS...
set -euo pipefail
cd "$(dirname "$0")/.."
. launch/common.sh

selection=(-m "not slow")
if [ "${1:-}" = --all ]; then
    selection=()
    shift
fi
make_environment test
ruff check .
exec python -m pytest "${selection[@]}" "$@"
