#!/usr/bin/env bash
# Installs the parts of CUDA that compile kernels without a GPU (550 MB of wheels) into a Python virtual environment:
# .venv-cuda in the project's root, or the one that LATENTC_CUDA_VENV names.
# Idempotent: does nothing if exactly these versions are there.
set -euo pipefail

root=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
venv=${LATENTC_CUDA_VENV:-$root/.venv-cuda}
wheels=(
  nvidia-cuda-nvrtc==13.0.88
  nvidia-cuda-runtime==13.0.96
  nvidia-cuda-crt==13.0.88
  nvidia-cuda-cccl==13.0.85
  nvidia-cuda-nvcc==13.0.88
  # There are none of 13.0; these read the cubins of 13.0.
  nvidia-cuda-cuobjdump==13.2.78
  nvidia-cuda-nvdisasm==13.2.78
)
stamp=$venv/.wheels
wanted=$(printf '%s\n' "${wheels[@]}")
if [[ -f $stamp && $(<"$stamp") == "$wanted" ]]; then
  echo "already there: $venv"
  exit 0
fi
[[ -x $venv/bin/pip ]] || python3 -m venv "$venv"
"$venv/bin/pip" install --quiet --disable-pip-version-check "${wheels[@]}"
printf '%s\n' "$wanted" >"$stamp"
folder=$("$venv/bin/python" -c 'import nvidia, os; print(os.path.join(list(nvidia.__path__)[0], "cu13"))')
"$folder/bin/ptxas" --version | tail -1
