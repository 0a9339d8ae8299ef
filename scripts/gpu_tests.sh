#!/usr/bin/env bash
# The tests on a machine that has a GPU, without a network: those in ComfyUI with its models on the
# card, in float32, and those of krea2_model, which takes a card where there is one.
#
#   bash scripts/gpu_tests.sh [comfy] [unit]
#
# Needs what gpu_check.sh does, and pytest with xdist. Tests that need a package which the machine
# lacks fail. Writes tests-comfy.log and tests-unit.log to $OUT, else .local. WORKERS (default: half
# of the cores for each of the two, which run at once) and SECONDS_EACH (default 110) bound it.
set -uo pipefail

# shellcheck source=scripts/gpu_environment.sh
source "$(dirname -- "${BASH_SOURCE[0]}")/gpu_environment.sh"
LOGS=${OUT:-$ROOT/.local}
WORKERS=${WORKERS:-$(($(nproc) / 2))}
export OMP_NUM_THREADS=1 PYTHONDONTWRITEBYTECODE=1
# Sums in float32 are compared with those of a CPU; TF32 keeps 10 bits of 23.
export KREA2_COMFY_FLAGS=${KREA2_COMFY_FLAGS:---force-fp32 --fp32-vae --fp32-text-enc} NVIDIA_TF32_OVERRIDE=0

comfy() {
  PYTHONPATH=$COMFYUI_PATH${PACKAGES:+:$PACKAGES}${PYTHONPATH:+:$PYTHONPATH} \
    pytest_for comfy -c tests/comfy/pytest.ini tests/comfy
}

unit() {
  PYTHONPATH=$ROOT${PACKAGES:+:$PACKAGES}${PYTHONPATH:+:$PYTHONPATH} pytest_for unit tests/unit
}

# A shell's background jobs ignore the signal that makes pytest end with its report.
RUN_PYTEST='import signal, sys, pytest
signal.signal(signal.SIGINT, signal.default_int_handler)
sys.exit(pytest.main(sys.argv[1:]))'

pytest_for() {
  local name=$1
  shift
  timeout --signal INT --kill-after 15 "${SECONDS_EACH:-110}" "$PYTHON" -P -c "$RUN_PYTEST" -q \
    --tb=short -p no:cacheprovider -n "$WORKERS" --dist loadfile --no-loadscope-reorder \
    --continue-on-collection-errors "$@" >"$LOGS/tests-$name.log" 2>&1
  local status=$?
  echo "$name: $(tail -n 1 "$LOGS/tests-$name.log")"
  return "$status"
}

cd -- "$ROOT" || exit 1
mkdir -p "$LOGS"
[[ $# -gt 0 ]] || set -- comfy unit
for part in "$@"; do
  [[ $part == comfy || $part == unit ]] ||
    { echo "There are no tests named $part; expected comfy or unit." >&2; exit 2; }
done
jobs=() status=0
for part in "$@"; do
  "$part" &
  jobs+=($!)
done
for job in "${jobs[@]}"; do wait "$job" || status=1; done
exit "$status"
