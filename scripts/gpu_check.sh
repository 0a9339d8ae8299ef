#!/usr/bin/env bash
# Is the pack correct on this GPU, managed as it should be, and how fast? One run of at most 8
# minutes, without a network; needs Python 3.12 with torch, and .gpu (see gpu_pack.sh).
#
#   bash scripts/gpu_check.sh [--tiny] [--only SECTION ...] [--out DIR]
#
# Writes results.json and GPU.md to DIR: by default $OUT, else benchmarks/gpu. --tiny runs every
# line at small sizes on a CPU. COMFYUI_PATH names a ComfyUI that is to be used instead of the one
# in .gpu, with the packages that PYTHON (default python3) has.
set -euo pipefail

ROOT=$(CDPATH='' cd -- "$(dirname -- "${BASH_SOURCE[0]}")/.." && pwd)
PYTHON=${PYTHON:-python3}
PACK=$ROOT/.gpu/pack.tar.xz

if [[ ! ${COMFYUI_PATH:-} ]]; then
  [[ -f $PACK ]] || { echo "There is no $PACK. Make it with: bash scripts/gpu_pack.sh" >&2; exit 1; }
  unpacked=$(mktemp -d)
  trap 'rm -rf "$unpacked"' EXIT
  "$PYTHON" -c 'import sys, tarfile; tarfile.open(sys.argv[1]).extractall(sys.argv[2], filter="data")' \
    "$PACK" "$unpacked"
  # Several processes import it; the repository's own files are few.
  "$PYTHON" -m compileall -q -j 0 "$unpacked" >/dev/null || true
  COMFYUI_PATH=$unpacked/comfyui
  packages=$unpacked/packages
fi

# ComfyUI first, so that `nodes` is its own, and the repository last.
export PYTHONPATH=$COMFYUI_PATH${packages:+:$packages}${PYTHONPATH:+:$PYTHONPATH}:$ROOT
export COMFYUI_PATH HF_HUB_OFFLINE=1 PYTHONUNBUFFERED=1
# The runner keeps to its deadline; this is for the case that it cannot.
timeout --kill-after 10 "${GPU_CHECK_SECONDS:-475}" "$PYTHON" -P -m benchmarks.gpu "$@"
