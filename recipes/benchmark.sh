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

overrides=()
for override in "$@"; do
  case $override in
    # Quoted, as Hydra takes a comma for a choice of several runs.
    suite=* | benchmark=*) overrides+=("stage.suite='${override#*=}'") ;;
    own.prompt=*) overrides+=("stage.own.prompt='${override#*=}'") ;;
    plan=* | plan_gpu=* | plan_gpus=* | data_dir=* | data_dirs.*=* | languages=* | responses_per_prompt=* | \
      max_prompt_length=* | max_response_length=* | max_items=* | greedy=* | own.*=* | identify_languages=*) overrides+=("stage.$override") ;;
    *) overrides+=("$override") ;;
  esac
done
launch benchmark "${overrides[@]}"
