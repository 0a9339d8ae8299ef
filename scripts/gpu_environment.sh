# Sourced by scripts that run on a machine with a GPU and no network. Sets ROOT, PYTHON (default
# python3), COMFYUI_PATH, and PACKAGES, the folder of packages that the machine lacks (empty where
# COMFYUI_PATH was given). Unpacks .gpu (see gpu_pack.sh) to a folder, `unpacked`, that goes when the
# script ends. One that imports nothing of ComfyUI sets COMFYUI_OPTIONAL, and does without .gpu too.
# shellcheck shell=bash

ROOT=$(CDPATH='' cd -- "$(dirname -- "${BASH_SOURCE[0]}")/.." && pwd)
PYTHON=${PYTHON:-python3}
PACK=$ROOT/.gpu/pack.tar.xz
PACKAGES=

if [[ ! ${COMFYUI_PATH:-} && ( ! ${COMFYUI_OPTIONAL:-} || -f $PACK ) ]]; then
  [[ -f $PACK ]] || { echo "There is no $PACK. Make it with: bash scripts/gpu_pack.sh" >&2; exit 1; }
  unpacked=$(mktemp -d)
  trap 'rm -rf "$unpacked"' EXIT
  "$PYTHON" -c 'import sys, tarfile; tarfile.open(sys.argv[1]).extractall(sys.argv[2], filter="data")' \
    "$PACK" "$unpacked"
  # Several processes import it; the repository's own files are few.
  [[ ${COMFYUI_OPTIONAL:-} ]] || "$PYTHON" -m compileall -q -j 0 "$unpacked" >/dev/null || true
  COMFYUI_PATH=$unpacked/comfyui
  PACKAGES=$unpacked/packages
fi
export COMFYUI_PATH HF_HUB_OFFLINE=1 PYTHONUNBUFFERED=1
