#!/usr/bin/env bash
# Everything, from nothing to a distilled model and a table: recipes/quickstart/run.sh [overrides]
# The overrides go to every stage: seed=1, root=<directory>, logging=wandb, stage.max_steps=10.
source "$(dirname "${BASH_SOURCE[0]}")/stages.sh"

prepare
stage base quickstart_base "$@"
stage teacher_first quickstart_teacher_first "$@"
stage teacher_second quickstart_teacher_second "$@"
upcycle
stage sft quickstart_sft "$@"
stage opd quickstart_opd "$@"
stage evaluate quickstart_evaluate "$@"
[ "${DRY_RUN:-0}" = 1 ] || python recipes/quickstart/summary.py --root "$root"
