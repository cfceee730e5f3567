#!/usr/bin/env bash
# Everything: recipes/marco_mini/run.sh model.path=<base>|dense=<dense Qwen3>|scale=tiny [overrides];
# see recipes/mission.sh.
set -euo pipefail
source "$(dirname "${BASH_SOURCE[0]}")/../mission.sh"
mission marco_mini 256 768 "$@"
