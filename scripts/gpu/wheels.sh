#!/usr/bin/env bash
# Pack what a machine with torch and Triton, but without a network, lacks for the check:
#
#     scripts/gpu/wheels.sh [FOLDER]          # build/gpu-wheels, which git ignores
#
# PYTHON_VERSION (3.12) is that of the other machine, which is Linux on x86-64. The versions are those of
# constraints.txt. PYTHON is the interpreter that runs pip.
set -euo pipefail
cd "$(dirname "$0")/../.."
folder=${1:-build/gpu-wheels}
rm -rf "$folder"
mkdir -p "$folder"
wanted=()
for name in llguidance msgspec peft transformers; do
  wanted+=("$(grep "^$name==" constraints.txt)")
done
platforms=()
for libc in manylinux_2_39 manylinux_2_35 manylinux_2_34 manylinux_2_31 manylinux_2_28 manylinux_2_27 manylinux_2_24 \
  manylinux_2_17 manylinux2014; do
  platforms+=(--platform "${libc}_x86_64")
done
"${PYTHON:-python3}" -m pip download --quiet --no-deps --only-binary=:all: --implementation cp \
  --python-version "${PYTHON_VERSION:-3.12}" "${platforms[@]}" --dest "$folder" "${wanted[@]}"
du --human-readable --total "$folder"/*.whl
