#!/usr/bin/env bash
# Installs what the tests need into .venv and runs them in two processes; arguments go to pytest:
# ./scripts/test.sh -k merge
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
./scripts/setup.sh dev
source .venv/bin/activate
export TORCH_EXTENSIONS_DIR="${TORCH_EXTENSIONS_DIR:-$PWD/.venv/torch_extensions}"
export OMP_NUM_THREADS="${OMP_NUM_THREADS:-1}"
export OMP_WAIT_POLICY="${OMP_WAIT_POLICY:-passive}" # threads that spin while they wait slow down busy cores
exec python -m pytest --numprocesses 2 --dist loadfile --no-loadscope-reorder "$@"
