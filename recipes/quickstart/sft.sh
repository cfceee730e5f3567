#!/usr/bin/env bash
# The student's fine-tuning alone, and what it starts from: recipes/quickstart/sft.sh [overrides]
source "$(dirname "${BASH_SOURCE[0]}")/stages.sh"

prepare
NPROC=1 stage base quickstart_base "$@"
upcycle
stage sft quickstart_sft "$@"
