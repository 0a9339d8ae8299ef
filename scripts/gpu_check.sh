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

# shellcheck source=scripts/gpu_environment.sh
source "$(dirname -- "${BASH_SOURCE[0]}")/gpu_environment.sh"

# ComfyUI first, so that `nodes` is its own, and the repository last.
export PYTHONPATH=$COMFYUI_PATH${PACKAGES:+:$PACKAGES}${PYTHONPATH:+:$PYTHONPATH}:$ROOT
# The runner keeps to its deadline; this is for the case that it cannot.
timeout --kill-after 10 "${GPU_CHECK_SECONDS:-475}" "$PYTHON" -P -m benchmarks.gpu "$@"
