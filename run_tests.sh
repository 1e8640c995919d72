#!/bin/sh
# Installs what the tests need and runs the whole suite, two files at a time; arguments go to pytest (-n 0: one at a time).
set -eu
here=$(dirname "$0")
[ -f "$here/common.sh" ] || here=. # sbatch runs a copy of this script from a folder of its own
[ -f "$here/common.sh" ] || { echo "start the script in the folder that holds common.sh" >&2; exit 2; }
. "$here/common.sh"
prepare requirements-test.txt
cd "$here" || exit 2
export OMP_NUM_THREADS="${OMP_NUM_THREADS:-1}"
exec "$PYTHON" -m pytest -n 2 --dist loadfile "$@"
