#!/usr/bin/env bash
# The NEON kernels: cross-compiled for aarch64, run under an emulator against plain loops.
# Needs aarch64-linux-gnu-gcc and qemu-aarch64 (Debian: gcc-aarch64-linux-gnu qemu-user); on an
# aarch64 machine neither.
#   tests/emulate.sh [WHEEL]: the library inside an aarch64 wheel, in place of one built here
set -euo pipefail
wheel=${1:+$(realpath "$1")}
cd "$(dirname "$0")"
flags=(-O3 -std=gnu11 -ffp-contract=off -Wall -Wextra)
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
if [ "$(uname -m)" = aarch64 ]; then
    compiler=${CC:-gcc} run=()
else
    compiler=aarch64-linux-gnu-gcc run=(qemu-aarch64 -L /usr/aarch64-linux-gnu)
fi
for tool in "$compiler" "${run[0]:-true}"; do
    if ! command -v "$tool" >/dev/null; then
        echo "skipped: $tool is not installed (apt install gcc-aarch64-linux-gnu qemu-user)"
        exit 0
    fi
done
"$compiler" "${flags[@]}" native_check.c -o "$folder/check" -lm -ldl
if [ -n "$wheel" ]; then
    python3 -m zipfile -e "$wheel" "$folder/wheel"
    "${run[@]}" "$folder/check" "$folder/wheel/saml_kernels/backends/cpu/_native.so"
else
    "${run[@]}" "$folder/check"
fi
