#!/usr/bin/env bash
# Installs a C++ compiler with its sanitizers on Debian and Ubuntu, for the emulator of CUDA kernels.
# Idempotent: does nothing if CXX, or c++, g++ or clang++, compiles C++20 with them. Works as root or through sudo.
set -euo pipefail

works() {
  local folder
  folder=$(mktemp -d)
  echo 'int main() {}' >"$folder/a.cpp"
  "$1" -std=c++20 -fsanitize=address,undefined "$folder/a.cpp" -o "$folder/a" 2>/dev/null && "$folder/a"
  local code=$?
  rm -r "$folder"
  return "$code"
}

for compiler in ${CXX:+"$CXX"} c++ g++ clang++; do
  if works "$compiler"; then
    echo "a C++ compiler is already there: $compiler"
    exit 0
  fi
done
as_root=()
if [[ $(id -u) -ne 0 ]]; then
  command -v sudo >/dev/null || { echo 'needs root or sudo' >&2; exit 1; }
  as_root=(sudo)
fi
"${as_root[@]}" apt-get update -qq
"${as_root[@]}" env DEBIAN_FRONTEND=noninteractive apt-get install -y -qq --no-install-recommends g++
works g++ || { echo 'g++ does not compile C++20 with -fsanitize=address,undefined' >&2; exit 1; }
