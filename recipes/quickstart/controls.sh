#!/usr/bin/env bash
# What the paper never published, from the same SFT student: more SFT on the same labels, the
# first teacher for all steps, the second for all steps. recipes/quickstart/controls.sh [overrides]
source "$(dirname "${BASH_SOURCE[0]}")/stages.sh"

stage control_sft quickstart_control_sft "$@"
stage control_first quickstart_control_first "$@"
stage control_second quickstart_control_second "$@"
stage evaluate_controls quickstart_evaluate_controls "$@"
[ "${DRY_RUN:-0}" = 1 ] || python recipes/quickstart/summary.py --root "$root"
