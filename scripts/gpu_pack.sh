#!/usr/bin/env bash
# Fills the ignored folder .gpu, with which scripts/gpu_check.sh runs on a machine that has a GPU,
# Python 3.12 with torch, and no network.
#
#   bash scripts/gpu_pack.sh
#
# COMFYUI_PATH and PYTHON are explained in setup.sh. Fails where .gpu and the repository together
# are over 64 MiB, which is what travels.
set -euo pipefail

# shellcheck source=scripts/setup.sh
source "$(dirname -- "${BASH_SOURCE[0]}")/setup.sh"

LIMIT=$((64 * 1024 * 1024))
PACKAGES=(comfy-kitchen==0.2.26 comfy-aimdo==0.4.11 torchsde==0.2.6 trampoline==0.1.2
  diffusers==0.42.1 gguf==0.19.0 kornia==0.9.0 kornia-rs==0.2.0)
WHEELS=$LOCAL/gpu-wheels
PACK=$ROOT/.gpu/pack.tar.xz

download() {
  # For that machine, whatever this one is.
  "$VENV_PYTHON" -m pip download --no-deps --only-binary=:all: --python-version 3.12 \
    --implementation cp --platform manylinux_2_28_x86_64 --platform manylinux_2_24_x86_64 \
    --platform manylinux_2_17_x86_64 --platform manylinux2014_x86_64 \
    --dest "$WHEELS.part" "${PACKAGES[@]}"
}

mkdir -p "$LOCAL"
python=$(choose_python)
make_venv "$python"
find_comfyui
rm -rf "$WHEELS.part"
step "Getting ${PACKAGES[*]}" download
rm -rf "$WHEELS"
mv "$WHEELS.part" "$WHEELS"
"$VENV_PYTHON" "$ROOT/scripts/gpu_pack.py" "$COMFYUI_PATH" "$WHEELS" "$PACK.part"
mv "$PACK.part" "$PACK"

pack=$(stat -c %s "$PACK")
# What git would copy: tracked files, and those it does not ignore.
repository=$(cd -- "$ROOT" && git ls-files -z --cached --others --exclude-standard |
  du --files0-from=- --apparent-size --bytes --total 2>/dev/null | tail -n 1 | cut -f 1)
awk -v p="$pack" -v r="$repository" -v l="$LIMIT" 'BEGIN {
  printf ".gpu %.1f MiB, the repository %.1f MiB, of %.0f MiB\n", p / 2^20, r / 2^20, l / 2^20
  exit p + r > l }' || fail "Together they are over the limit; leave something out."
