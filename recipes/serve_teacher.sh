#!/usr/bin/env bash
# Serve a teacher for `teacher=vllm_server`: recipes/serve_teacher.sh <model directory> [vLLM's options]
#
#   HOST     default 127.0.0.1; a server that others reach has no password
#   PORT     default 8000
#   DRY_RUN=1  print the command and do nothing
#
# As many as wanted, on as many machines; the run takes their addresses:
#   stage.cascade.second.teacher.servers.urls=[http://10.0.0.1:8000,http://10.0.0.2:8000]
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
model=${1:?usage: recipes/serve_teacher.sh <model directory> [options]}; shift
if [ -x .venv/bin/python ]; then PATH="$PWD/.venv/bin:$PATH"; fi

# Given ids need --enable-scale-out and any number of log-probabilities. generation_config.json has no
# say. Under one name, wherever the directory lies.
command=(python -m vllm.entrypoints.openai.api_server --model "$model" --served-model-name teacher
  --host "${HOST:-127.0.0.1}" --port "${PORT:-8000}" --generation-config vllm --max-logprobs -1
  --enable-scale-out --no-enable-chunked-prefill --no-enable-prefix-caching "$@")
if [ "${DRY_RUN:-0}" = 1 ]; then printf '%q ' "${command[@]}"; echo; exit; fi
exec "${command[@]}"
