#!/usr/bin/env bash
# The model card's benchmarks of one model, into output_dir:
#   recipes/benchmark.sh model.path=PATH suite=card|english|multilingual|cultural|card_lite|fixture|<task,...>
#     [output_dir=D] [plan=true] [data_dir=D] [languages=[de,fr]] [greedy=true] [key=value ...]
# or rows of your own:
#   recipes/benchmark.sh model.path=PATH benchmark=own own.path=my.jsonl own.question=question own.answer=answer
#     own.verifier=number|choice|exact|regex|math|json_schema|python:module.function [responses_per_prompt=8]
# plan=true says what would be asked and how long it takes, and ends; a killed run goes on when it is
# launched again. Fields of the stage may be written without `stage.`.
set -euo pipefail
source "$(dirname "${BASH_SOURCE[0]}")/launch.sh"
# What is refused is refused in half a second, before torchrun imports torch.
[ "${DRY_RUN:-0}" = 1 ] || python -m marco_train.commands.benchmark --check "$@" >/dev/null || exit 2
launch_module marco_train.commands.benchmark "$@"
