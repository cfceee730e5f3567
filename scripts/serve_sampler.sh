#!/usr/bin/env bash
# Serve the student for `rollout@stage.rollout=vllm_server`, as long as a command runs:
#
#   scripts/serve_sampler.sh <model directory> [vLLM's options] -- <command>
#
# Without `--` and a command the servers run until they are interrupted. The weights come from the
# trainer, so config.json is enough in the directory. A server that ends is started again; nothing
# of it is left when the command or this script ends, however that happens.
#
#   NUM_SERVERS=1   the first listens on PORT, the next on PORT + 1 ...
#   PORT=8100
#   HOST=127.0.0.1  whoever reaches a server can replace its weights, so another needs VLLM_API_KEY
#   VLLM_API_KEY    which requests have to bring; the run finds it under the same name
#   GPUS            devices, one a server: GPUS="6 7" NUM_SERVERS=2
#   MAX_RESTARTS=3  of one server
#   VLLM_BATCH_INVARIANT=1  on GPUs: a response does not depend on those beside it, which costs time;
#                   for runs with deterministic=true. Not on a CPU, where it holds anyway
#   DRY_RUN=1       print the command of the first server and do nothing
#
# For stage.rollout.weights_by=nccl, on GPUs that no rank has: --weight-transfer-config '{"backend": "nccl"}'
#
# The run takes their addresses:
#   stage.rollout.servers.urls=[http://127.0.0.1:8100,http://127.0.0.1:8101]
set -euo pipefail
root=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
model=${1:?usage: scripts/serve_sampler.sh <model directory> [options] [-- <command>]}; shift
options=()
while [ $# -gt 0 ] && [ "$1" != -- ]; do options+=("$1"); shift; done
[ $# -gt 0 ] && shift
if [ -x "$root/.venv/bin/python" ]; then PATH="$root/.venv/bin:$PATH"; fi
port=${PORT:-8100}

key=()
if [ -n "${VLLM_API_KEY:-}" ]; then
  key=(--middleware marco_train.inference.key.RequireKey)
elif [[ ! "${HOST:-127.0.0.1}" =~ ^(127\..*|localhost|::1)$ || " ${options[*]} " == *" --host"[\ =]* ]]; then
  echo "serve_sampler: HOST=${HOST:-of --host} is reached by others, who could replace the weights: set VLLM_API_KEY" >&2
  exit 2
fi

# On a CPU what a seed draws depends on how a prompt was cut; on a GPU on seed and place alone.
chunks=()
nvidia-smi --list-gpus 2>/dev/null | grep -q . || chunks=(--no-enable-chunked-prefill)
# Random weights until the trainer's come. generation_config.json has no say. Logits are float32, as
# those of the policy.
command=(python -m vllm.entrypoints.openai.api_server --model "$model" --served-model-name student
  --host "${HOST:-127.0.0.1}" --hf-overrides '{"head_dtype": "float32"}' --load-format dummy
  --skip-tokenizer-init --generation-config vllm --logprobs-mode raw_logprobs --max-logprobs -1
  --enable-scale-out "${chunks[@]}" --no-enable-prefix-caching --disable-uvicorn-access-log --worker-extension-cls marco_train.inference.worker.Receiver "${key[@]}" "${options[@]}")
if [ "${DRY_RUN:-0}" = 1 ]; then printf '%q ' "${command[@]}" --port "$port"; echo; exit; fi

# On a CPU servers and ranks share the cores as the launcher says.
export VLLM_CPU_OMP_THREADS_BIND=${VLLM_CPU_OMP_THREADS_BIND:-nobind} VLLM_NO_USAGE_STATS=1
export VLLM_ALLOW_INSECURE_SERIALIZATION=0 # no pickles between its processes, but among workers
export VLLM_LOGGING_LEVEL=${VLLM_LOGGING_LEVEL:-ERROR}
export PYTHONPATH="$root${PYTHONPATH:+:$PYTHONPATH}"
gpus=(${GPUS:-})
if [ ${#gpus[@]} -gt 0 ] && [ ${#gpus[@]} -lt "${NUM_SERVERS:-1}" ]; then
  echo "serve_sampler: GPUS names ${#gpus[@]} devices for ${NUM_SERVERS:-1} servers; name one each" >&2
  exit 2
fi

end_server() { # with its group, or alone where it has none yet
  local process=${server:-${!:-}}
  if [ -n "$process" ] && [ "$process" != "$before" ]; then
    kill -KILL -- "-$process" 2>/dev/null || kill -KILL "$process" 2>/dev/null || true
  fi
}

keep_up() { # number: one server, started anew where it ends
  local number=$1 server="" before=${!:-} restarts # before: another keeper
  trap 'end_server; exit' TERM EXIT
  if [ ${#gpus[@]} -gt 0 ]; then export CUDA_VISIBLE_DEVICES=${gpus[$number]}; fi
  for ((restarts = 0; restarts <= ${MAX_RESTARTS:-3}; restarts++)); do
    # A group of its own, so that its engine and workers end with it.
    MARCO_TRAIN_OWNER=$$ VLLM_SERVER_DEV_MODE=1 setsid "${command[@]}" --port $((port + number)) &
    server=$!
    wait "$server" || true
    end_server
    kill -0 $$ 2>/dev/null || exit # this script was killed, which its servers see too
    echo "serve_sampler: the server on port $((port + number)) ended" >&2
  done
  server=""
  echo "serve_sampler: gave up port $((port + number)) after ${MAX_RESTARTS:-3} restarts" >&2
}

keepers=() run="" stopping=no
trap 'kill -TERM "${keepers[@]}" 2>/dev/null || true; wait "${keepers[@]}" 2>/dev/null || true' EXIT
stop() {
  stopping=yes
  if [ -n "$run" ]; then kill -TERM "$run" 2>/dev/null || true; fi
}
trap 'stop; if [ $# -eq 0 ]; then exit 130; fi' INT TERM
for ((number = 0; number < ${NUM_SERVERS:-1}; number++)); do
  keep_up "$number" &
  keepers+=($!)
done
if [ $# -gt 0 ]; then
  "$@" &
  run=$!
  if [ "$stopping" = yes ]; then stop; fi # told so before there was a command
  wait "$run" || true
  while kill -0 "$run" 2>/dev/null; do wait "$run" || true; done # a signal ends a wait
  wait "$run" && status=0 || status=$? # which is remembered
  exit "$status"
fi
wait "${keepers[@]}" || true
exit 1 # no server is kept up any more
