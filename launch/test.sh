#!/usr/bin/env bash
# Install what the tests need and run them.
#
#   ./launch/test.sh            the quick suite: about 10 minutes on 2 quiet CPU cores
#   ./launch/test.sh --all      everything: full matrices and golden runs too, about two hours
#   ./launch/test.sh PYTEST-ARGUMENTS...
set -euo pipefail
cd "$(dirname "$0")/.."
. launch/common.sh

which="not slow and"
if [ "${1:-}" = --all ]; then
    which=""
    shift
fi
make_environment test
./launch/lint.sh
for argument in "$@"; do
    [ "$argument" != -m ] || exec python -m pytest "$@"
done

# First the tests that stay in one process, with a worker on each core. Then, one after another,
# those that start several processes: trainings at the same time slow each other down.
cores=$(python -c 'import os; print(min(8, len(os.sched_getaffinity(0))))')
alone=0 together=0
OMP_NUM_THREADS=1 python -m pytest -n "$cores" --dist loadfile -m "$which not launch" "$@" || alone=$?
python -m pytest -m "$which launch" "$@" || together=$?
# 5 is pytest's "nothing selected", which is in order for one of the two.
for status in $alone $together; do
    case $status in 0 | 5) ;; *) exit "$status" ;; esac
done
exit $((alone == 5 && together == 5 ? 5 : 0))
