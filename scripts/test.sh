#!/usr/bin/env bash
# All checks: ruff, mypy, and the tests in their processes, the page's where there is a Chromium.
#
#   bash scripts/test.sh [pytest arguments]      for example -k lora; they go to every run
#   bash scripts/test.sh --matrix [pytest arguments]
#   bash scripts/test.sh --newest [pytest arguments]
#
# --matrix runs the tests that need ComfyUI, and only those, on each version that the pack supports,
# in environments of their own. --newest runs all tests with the newest releases of torch,
# transformers, the page and the other packages that ComfyUI pins. PYTHON, COMFYUI_PATH and CHROMIUM are explained in setup.sh.
# shellcheck disable=SC2317,SC2329 # check calls functions by name
set -euo pipefail

# shellcheck source=scripts/setup.sh
source "$(dirname -- "${BASH_SOURCE[0]}")/setup.sh"

results=()
failed=0

# check NAME COMMAND...: runs it, and keeps whether it passed for the summary.
check() {
  local name=$1 status=0 start=$SECONDS
  shift
  printf '\n== %s\n' "$name"
  "$@" || status=$?
  if ((status)); then failed=1; fi
  results+=("$( ((status)) && echo FAILED || echo passed)  $name ($((SECONDS - start)) s)")
}

# run_pytest NAME ARGUMENTS...: its closing line is kept for the summary too.
run_pytest() {
  local name=$1 status=0 log=$LOCAL/pytest-$1.log
  shift
  "$VENV_PYTHON" -P -m pytest "$@" 2>&1 | tee "$log" || status=$?
  # 5: no test fits the arguments, which may all be meant for the other run.
  if ((status == 5 && given_arguments)); then status=0; fi
  closing+=("$name: $(tail -n 1 "$log")")
  return "$status"
}

# beside COMMAND...: runs checks in the background. What they print and found is shown by
# `join_beside`.
beside() {
  rm -f -- "$LOCAL/beside.results"
  (
    renice -n 10 -p "$BASHPID" >/dev/null
    results=() closing=() failed=0
    "$@"
    printf '%s\n' "${results[@]}" ${closing[@]+"${closing[@]}"} >"$LOCAL/beside.results"
    exit "$failed"
  ) >"$LOCAL/beside.log" 2>&1 &
  besides=$!
  trap 'kill "$besides" 2>/dev/null || true' EXIT
}

join_beside() {
  local status=0
  wait "$besides" || status=$?
  trap - EXIT
  cat -- "$LOCAL/beside.log"
  if ((status)); then failed=1; fi
  if [[ -f $LOCAL/beside.results ]]; then
    mapfile -t -O "${#results[@]}" results <"$LOCAL/beside.results"
  else
    results+=("FAILED  the checks beside tests/browser ended early")
  fi
}

# A file's tests stay in one process: they share models and pictures. The files that take longest
# come first, see `longest_first` in tests/support.
processes() {
  printf '%s\n' -n "$((cores < 4 ? cores : 4))" --dist loadfile --no-loadscope-reorder
}

# In processes of their own, where `nodes` is ComfyUI's module and not the pack's folder.
comfy_tests() {
  local workers
  mapfile -t workers < <(processes)
  PYTHONPATH=$COMFYUI_PATH run_pytest "$1" -c tests/comfy/pytest.ini "${workers[@]}" "${@:2}"
}

# The page itself, in a browser on a real server.
browser_tests() { run_pytest browser -c tests/browser/pytest.ini tests/browser "$@"; }

# Text without an encoding is read by the code page of a Windows' language; the rule is in preview.
lint() {
  "$VENV_PYTHON" -m ruff check --extend-exclude .local . &&
    "$VENV_PYTHON" -m ruff check --extend-exclude .local --preview --select PLW1514 .
}

# The pack as a package of one name, as ComfyUI imports it: nodes import from the folder above them.
check_types() {
  mkdir -p -- "$LOCAL/types"
  ln -sfn -- "$ROOT" "$LOCAL/types/krea2_kit"
  MYPYPATH=$LOCAL/types "$VENV_PYTHON" -m mypy -p krea2_kit.krea2_model -p krea2_kit.krea2_training -p krea2_kit.krea2_rendering -p krea2_kit.nodes
}

unit_tests() {
  local workers
  mapfile -t workers < <(processes)
  run_pytest unit "${workers[@]}" tests/unit "$@"
}

types_and_units() {
  check "mypy" check_types
  check "tests/unit" unit_tests "$@"
}

matrix=
if [[ ${1:-} == --newest ]]; then
  shift
  set_up test newest
elif [[ ${1:-} == --matrix ]]; then
  matrix=1
  shift
  # All of them first, so that trouble shows before the long runs.
  for version in "${COMFYUI_VERSIONS[@]}"; do set_up test "$version"; done
else
  set_up test
fi
cd -- "$ROOT"
unset PYTHONPATH PYTHONDONTWRITEBYTECODE
# Tests start dozens of processes; compiled modules spare each of them seconds.
export HF_HUB_OFFLINE=1 PYTHONPYCACHEPREFIX=$LOCAL/pycache
given_arguments=$#
closing=()
# Before OMP_NUM_THREADS is set, which nproc obeys.
cores=$(nproc 2>/dev/null || echo 2)

if [[ $matrix ]]; then
  for version in "${COMFYUI_VERSIONS[@]}"; do
    choose_version "$version"
    find_comfyui
    check "tests/comfy on ComfyUI $version" comfy_tests "comfy-$version" tests/comfy "$@"
  done
else
  check "ruff check" lint
  check "ruff format" "$VENV_PYTHON" -m ruff format --check --extend-exclude .local .
  export OMP_NUM_THREADS=${OMP_NUM_THREADS:-$((cores > 3 ? cores / 2 : 1))}
  # The browser's tests leave most of a core idle, but a page on a busy machine takes minutes to
  # open: what runs beside them yields to them.
  printf '\nmypy and tests/unit run beside tests/browser; their output follows it.\n'
  beside types_and_units "$@"
  if find_chromium; then
    check "tests/browser" browser_tests "$@"
  else
    results+=("NOT RUN tests/browser: there is no Chromium, and none could be installed")
  fi
  join_beside
  check "tests/comfy" comfy_tests comfy tests/comfy "$@"
fi

printf '\n== summary\n'
printf '%s\n' "${results[@]}" "${closing[@]}"
exit "$failed"
