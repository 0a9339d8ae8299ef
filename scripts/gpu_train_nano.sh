#!/usr/bin/env bash
# Trains krea2-nano at 256 px on this GPU: one run of at most 9 minutes, from nothing to weights,
# exams and sample sheets, without a network. Needs Python with the requirements of this package
# (requirements.txt) and nothing else: the tokenizer is that of COMFYUI_PATH, of the ComfyUI in .gpu
# (see gpu_pack.sh), or the one in krea2_model/nano, which makes the same tokens of all captions.
#
#   bash scripts/gpu_train_nano.sh [--minutes 8] [--toy] [--output DIR]
#
# Writes eight files to the output, by default $OUT, else .local/nano256: six of weights (38 MB),
# report.json and sheets.png. Each is there as soon as it can be used, Raw and Turbo from their first
# 45 seconds on, so that a run that is stopped leaves the newest.
set -euo pipefail

# ComfyUI's own modules are not imported, so its folder is not on the path.
COMFYUI_OPTIONAL=1
# shellcheck source=scripts/gpu_environment.sh
source "$(dirname -- "${BASH_SOURCE[0]}")/gpu_environment.sh"
OUTPUT=${OUT:-$ROOT/.local/nano256}
work=$(mktemp -d)
trap 'rm -rf "$work" ${unpacked:+"$unpacked"}' EXIT
export XDG_CACHE_HOME=$work/cache
# One thread for each worker that draws; the training itself is on the GPU.
export OMP_NUM_THREADS=${OMP_NUM_THREADS:-2} PYTORCH_CUDA_ALLOC_CONF=expandable_segments:True

# The run keeps to its minutes; this is for the case that it cannot.
status=0
timeout --signal INT --kill-after 15 "${GPU_TRAIN_SECONDS:-520}" \
  "$PYTHON" "$ROOT/scripts/train_nano_256.py" --output "$OUTPUT" --folder "$work/states" "$@" ||
  status=$?
for option in "$@"; do
  [[ ${previous:-} == --output ]] && OUTPUT=$option
  previous=$option
done
# What was being written when the time was over.
find "$OUTPUT" -maxdepth 1 -name '*.partial*' -delete
ls -l "$OUTPUT"
exit "$status"
