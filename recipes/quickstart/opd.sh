#!/usr/bin/env bash
# The distillation alone; needs what run.sh makes before it: recipes/quickstart/opd.sh [overrides]
source "$(dirname "${BASH_SOURCE[0]}")/stages.sh"

stage opd quickstart_opd "$@"
