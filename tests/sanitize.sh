#!/usr/bin/env bash
# The native CPU kernels' tests under AddressSanitizer and UndefinedBehaviorSanitizer (gcc).
#   tests/sanitize.sh [PYTHON]
set -euo pipefail
cd "$(dirname "$0")/.."
python=${1:-python3}
copy=$(mktemp -d)
trap 'rm -rf "$copy"' EXIT
cp -r saml_kernels tests pyproject.toml "$copy"
rm -f "$copy"/saml_kernels/backends/cpu/_native*
# -O1 keeps the checks; the flags that decide bits are those of setup.py.
gcc -shared -fPIC -g -O1 -std=gnu11 -ffp-contract=off -fno-omit-frame-pointer \
    -fsanitize=address,undefined -fno-sanitize-recover=undefined \
    saml_kernels/backends/cpu/native.c -lm -o "$copy/saml_kernels/backends/cpu/_native.so"
gcc -g -O1 -std=gnu11 -ffp-contract=off -fsanitize=address,undefined \
    -fno-sanitize-recover=undefined tests/native_check.c -lm -o "$copy/check"
"$copy/check"
cd "$copy"
# Python's own allocations are not ours to judge: leaks are not looked for.
export LD_PRELOAD="$(gcc -print-file-name=libasan.so) $(gcc -print-file-name=libubsan.so)"
export ASAN_OPTIONS=detect_leaks=0 PYTHONPATH="$copy"
"$python" - <<'CHECK'
import saml_kernels
from saml_kernels.backends.cpu.native import native_status
import os
assert saml_kernels.__file__.startswith(os.environ["PYTHONPATH"]), saml_kernels.__file__
print(native_status())
CHECK
"$python" -m pytest -q -p no:cacheprovider tests/kernels/backends/cpu
