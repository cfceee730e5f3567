#!/usr/bin/env bash
# Serve a teacher for `teacher=vllm_server`: recipes/serve_teacher.sh <model directory> [vLLM's options]
#
#   HOST           default 127.0.0.1; another needs VLLM_API_KEY
#   VLLM_API_KEY   which requests have to bring; the run finds it under the same name
#   PORT           default 8000
#   MAX_MODEL_LEN  longest prompt with its response and one token; default 10242, or what the model
#                  takes where that is less. vLLM sizes its memory by it
#   API_SERVERS    processes that read requests and write answers; default 4 with GPUs, 1 without
#   VLLM_BATCH_INVARIANT=1  on GPUs: a score does not depend on those beside it, which costs time; for runs
#                  with deterministic=true. Not on a CPU, where it holds anyway
#   DRY_RUN=1      print the command and do nothing
#
# As many as wanted, on as many machines; the run takes their addresses:
#   stage.cascade.second.teacher.servers.urls=[http://10.0.0.1:8000,http://10.0.0.2:8000]
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
model=${1:?usage: recipes/serve_teacher.sh <model directory> [options]}; shift
if [ -x .venv/bin/python ]; then PATH="$PWD/.venv/bin:$PATH"; fi

window() { # what the model's config.json says of its longest sequence, if it is at hand
  grep -o '"max_position_embeddings": *[0-9]*' "$model/config.json" 2>/dev/null | grep -o '[0-9]*$' | head -n 1
}
longest=${MAX_MODEL_LEN:-}
if [ -z "$longest" ]; then
  longest=$(window || true)
  [ "${longest:-0}" -gt 0 ] && [ "$longest" -lt 10242 ] || longest=10242
fi
gpus=$({ nvidia-smi --list-gpus 2>/dev/null || true; } | wc -l)
api_servers=${API_SERVERS:-$((gpus > 0 ? 4 : 1))}
server=(python -m vllm.entrypoints.openai.api_server --model "$model")
if [ "$api_servers" -gt 1 ]; then # which that module does not start
  server=(vllm serve "$model" --api-server-count "$api_servers")
fi

key=()
if [ -n "${VLLM_API_KEY:-}" ]; then
  key=(--middleware marco_train.inference.key.RequireKey)
elif [[ ! "${HOST:-127.0.0.1}" =~ ^(127\..*|localhost|::1)$ || " $* " == *" --host"[\ =]* ]]; then
  echo "serve_teacher: HOST=${HOST:-of --host} is reached by others: set VLLM_API_KEY, which they have to know" >&2
  exit 2
fi

# Given ids need --enable-scale-out and any number of log-probabilities. generation_config.json has no
# say. Under one name, wherever the directory lies. A long prompt is read in parts beside others.
# Logits are float32, as those of other teachers.
command=("${server[@]}" --served-model-name teacher --host "${HOST:-127.0.0.1}"
  --port "${PORT:-8000}" --max-model-len "$longest" --max-num-batched-tokens 32768
  --hf-overrides '{"head_dtype": "float32"}' --generation-config vllm
  --max-logprobs -1 --enable-scale-out --no-enable-prefix-caching "${key[@]}" "$@")
if [ "${DRY_RUN:-0}" = 1 ]; then printf '%q ' "${command[@]}"; echo; exit; fi
export PYTHONPATH="$PWD${PYTHONPATH:+:$PYTHONPATH}" VLLM_ALLOW_INSECURE_SERIALIZATION=0
exec "${command[@]}"
