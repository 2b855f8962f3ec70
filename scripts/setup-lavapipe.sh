#!/usr/bin/env bash
# Installs Mesa's Vulkan driver for the CPU (lavapipe) on Debian and Ubuntu, for the wgpu runtime.
# Idempotent: does nothing if a lavapipe driver is registered. Works as root or through sudo.
set -euo pipefail

registered() {
  compgen -G '/usr/share/vulkan/icd.d/lvp_icd*.json' >/dev/null ||
    compgen -G '/etc/vulkan/icd.d/lvp_icd*.json' >/dev/null
}
loader() { ldconfig -p | grep -q 'libvulkan\.so\.1'; }

if registered && loader; then
  echo 'lavapipe is already there'
  exit 0
fi
as_root=()
if [[ $(id -u) -ne 0 ]]; then
  command -v sudo >/dev/null || { echo 'needs root or sudo' >&2; exit 1; }
  as_root=(sudo)
fi
"${as_root[@]}" apt-get update -qq
"${as_root[@]}" env DEBIAN_FRONTEND=noninteractive \
  apt-get install -y -qq --no-install-recommends mesa-vulkan-drivers libvulkan1
registered || { echo 'mesa-vulkan-drivers brought no lavapipe driver' >&2; exit 1; }
