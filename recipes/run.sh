#!/usr/bin/env bash
# Any experiment on all GPUs that this machine has, also one of your own:
#   recipes/run.sh <experiment> [--config-dir DIR] [overrides]
# Paths are looked for from where it is called; NPROC=2 launches two processes, see launch.sh.
set -euo pipefail
here=$PWD
source "$(dirname "${BASH_SOURCE[0]}")/launch.sh"
cd "$here"
if [ $# -eq 0 ]; then
  echo "usage: recipes/run.sh <experiment> [--config-dir DIR] [overrides]" >&2
  exit 2
fi
launch "$@"
