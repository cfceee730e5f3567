#!/usr/bin/env bash
# recipes/qwen3_30b_a3b/sft.sh [overrides]; see README.md.
set -euo pipefail
source "$(dirname "${BASH_SOURCE[0]}")/../launch.sh"
launch qwen3_30b_a3b_sft "$@"
