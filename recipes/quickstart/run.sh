#!/usr/bin/env bash
# Everything, from nothing to a distilled model and a table: recipes/quickstart/run.sh [overrides]
# The overrides go to every stage: seed=1, root=<directory>, logging=wandb, stage.max_steps=10.
source "$(dirname "${BASH_SOURCE[0]}")/stages.sh"

prepare
# One process each: so small a dense model takes as long with two, which wait for each other.
NPROC=1 beside teacher_second quickstart_teacher_second "$@"
NPROC=1 stage base quickstart_base "$@"
NPROC=1 stage teacher_first quickstart_teacher_first "$@"
joined
upcycle
stage sft quickstart_sft "$@"
stage opd quickstart_opd "$@"
stage evaluate quickstart_evaluate "$@"
[ "${DRY_RUN:-0}" = 1 ] || python recipes/quickstart/summary.py --root "$root"
