#!/bin/sh
# Installs what the tests need and runs the whole suite; arguments go to pytest.
set -eu
. ./common.sh
prepare requirements-test.txt
"$PYTHON" -m pytest "$@"
