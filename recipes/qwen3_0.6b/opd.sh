#!/usr/bin/env bash
# recipes/qwen3_0.6b/opd.sh [overrides]; see README.md.
set -euo pipefail
source "$(dirname "${BASH_SOURCE[0]}")/../launch.sh"
launch qwen3_0_6b_opd "$@"
