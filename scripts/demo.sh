#!/usr/bin/env bash
# A picture from a prompt, by the example workflow in a headless ComfyUI:
#
#   bash scripts/demo.sh "a red circle left of a blue square" [--models FOLDER] [--output P.png] ...
#
# Needs Linux or macOS and Python 3.11 or later. Everything it makes is under .local/; --help tells
# the options. PYTHON and COMFYUI_PATH are explained in setup.sh.
set -euo pipefail

# shellcheck source=scripts/setup.sh
source "$(dirname -- "${BASH_SOURCE[0]}")/setup.sh"

has_accelerator() {
  "$VENV_PYTHON" -c 'import sys, torch; sys.exit(not torch.accelerator.is_available())' 2>/dev/null
}

python=$(choose_python)
for argument in "$@"; do
  if [[ $argument == -h || $argument == --help ]]; then
    exec "$python" "$ROOT/scripts/demo.py" --help
  fi
done
# A mistyped option should show now, not after the set-up.
"$python" "$ROOT/scripts/demo.py" --check "$@"

set_up run
device=()
has_accelerator || device=(--cpu)
# exec: signals go straight to the process that has to stop the server.
exec "$VENV_PYTHON" "$ROOT/scripts/demo.py" ${device[@]+"${device[@]}"} "$@"
