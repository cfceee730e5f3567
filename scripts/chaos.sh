#!/usr/bin/env bash
# Let many faults strike a run, and compare what it learns with a run that nothing disturbs:
#
#   scripts/chaos.sh [--steps 200] [--faults 14] [--save-every 5] [--seed 0] [--directory DIR]
#
# 200 updates of distillation on 2 ranks of this machine's CPU, without vLLM. Prints a table of the
# faults with the updates that each cost, how far the weights are from the calm run's, and the goodput.
# Ends with a status other than 0 where more is lost than may be. --directory keeps the runs.
set -euo pipefail
root=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
cd "$root"
if [ -x .venv/bin/python ]; then PATH="$root/.venv/bin:$PATH"; fi
export OMP_NUM_THREADS=1 # one thread a rank: more than cores makes every step slower
exec python -m tests.helpers.chaos "$@"
