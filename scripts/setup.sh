#!/usr/bin/env bash
# Makes .venv and installs this program into it with the tested versions: ./scripts/setup.sh [EXTRA]
# EXTRA is one of the extras in pyproject.toml, such as dev or quickstart. Running it again is quick.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
extra="${1:-deepspeed}"
stamp=".venv/.installed-$extra"
if [ -e "$stamp" ] && [ "$stamp" -nt pyproject.toml ] && [ "$stamp" -nt constraints.txt ]; then
  exit 0
fi
[ -x .venv/bin/python ] || "${PYTHON:-python3}" -m venv .venv
# torch first and by its exact version: other packages ask for any torch, and would fetch the newest.
.venv/bin/python -m pip install --quiet --disable-pip-version-check --constraint constraints.txt "torch==2.13.0"
.venv/bin/python -m pip install --quiet --disable-pip-version-check --constraint constraints.txt --editable ".[$extra]"
touch "$stamp"
