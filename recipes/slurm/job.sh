# Sourced by the jobs, in the repository's root: a run on nodes of the job, and servers on others.
#
#   SAVE_SECONDS=240  after SIGUSR1 the job is queued again, though the run has not ended yet
#   MAX_REQUEUES=100  of one job
#   MASTER_PORT       default: by the job's number, another one at each attempt
#   and what recipes/supervise.sh and recipes/slurm/launch_step take

directory=""
for word in "$@"; do
  case $word in output_dir=*) directory=${word#*=} ;; esac
done
if [ $# -eq 0 ] || [ -z "$directory" ]; then
  echo "usage: sbatch <options> recipes/slurm/<job>.sbatch <recipe> output_dir=<directory> [overrides]" >&2
  exit 2
fi
nodes=($(scontrol show hostnames "$SLURM_JOB_NODELIST"))

# Servers take the last nodes; the first are left to the run. Their addresses appear in a directory.
export ADDRESSES=$directory/servers/$SLURM_JOB_ID ADDRESSES_WANTED=0
mkdir -p "$directory/logs" "$ADDRESSES"
rm -f "$ADDRESSES"/*
keepers=()

announce() { # url, field of the config with a number: write the address when the server answers
  local key="header = \"Authorization: Bearer $VLLM_API_KEY\"" # not for the list of processes
  until curl --silent --fail --max-time 10 --output /dev/null --config - "$1/health" <<<"$key"; do sleep 2; done
  echo "$1" >"$ADDRESSES/.$2"
  mv "$ADDRESSES/.$2" "$ADDRESSES/$2"
}

keep_up() { # node, log, command: a step of the job, begun again where it ends
  local node=$1 log=$2 step=""; shift 2
  trap 'kill -TERM "$step" 2>/dev/null || true; wait "$step" || true; exit' TERM
  while true; do
    HOST=$node srun --overlap --nodes=1 --ntasks=1 --nodelist="$node" --cpu-bind=none "$@" >>"$log" 2>&1 &
    step=$!
    wait "$step" || true
    echo "slurm: the server on $node ended, and is begun again: see $log" >&2
    sleep 5 & # which a signal interrupts
    step=$!
    wait "$step" || true
  done
}

serve() { # field of the config, first port, number of ports, command: a server on the last free node
  local field=$1 port=$2 count=$3 node=${nodes[-1]} number; shift 3
  if [ "${#nodes[@]}" -lt 2 ]; then
    echo "slurm: no node is left for the run: $SLURM_JOB_NUM_NODES are too few for these servers" >&2
    exit 2
  fi
  unset 'nodes[-1]'
  # Others reach it, so it needs a key: this job's own, which the run finds under the same name.
  export VLLM_API_KEY=${VLLM_API_KEY:-$(od -An -N16 -tx1 /dev/urandom | tr -d ' \n')}
  PORT=$port keep_up "$node" "$directory/logs/$field.$node.log" "$@" &
  keepers+=($!)
  for ((number = 0; number < count; number++)); do
    announce "http://$node:$((port + number))" "$field.$ADDRESSES_WANTED" &
    keepers+=($!)
    ADDRESSES_WANTED=$((ADDRESSES_WANTED + 1))
  done
}

run="" told_by="" wedged=""
end_run() { # user, queue; the run saves
  told_by=$1
  if [ -n "$run" ]; then kill -TERM "$run" 2>/dev/null || true; fi
}
leave() { # time is up, or another job comes first
  end_run queue
  (
    trap 'kill $!; exit' TERM
    sleep "${SAVE_SECONDS:-240}" &
    wait $!
    requeue
  ) &
  wedged=$!
}
trap leave USR1
trap 'end_run user' TERM INT
trap 'kill -TERM $wedged "${keepers[@]}" 2>/dev/null || true; wait' EXIT

requeue() {
  if [ "${SLURM_RESTART_COUNT:-0}" -ge "${MAX_REQUEUES:-100}" ]; then
    echo "slurm: not queued again, after MAX_REQUEUES=${MAX_REQUEUES:-100} times" >&2
  else
    scontrol requeue "$SLURM_JOB_ID"
  fi
}

run_supervised() { # recipe and overrides, on the nodes that are left; ends the job
  local status
  export NNODES=${#nodes[@]} MASTER_ADDR=${nodes[0]}
  NODES=$(IFS=,; echo "${nodes[*]}") RETRY_SECONDS=none \
    recipes/supervise.sh recipes/slurm/launch_step "$@" &
  run=$!
  if [ -n "$told_by" ]; then end_run "$told_by"; fi # meanwhile
  wait "$run" || true
  while kill -0 "$run" 2>/dev/null; do wait "$run" || true; done # a signal ends a wait
  wait "$run" && status=0 || status=$? # which is remembered
  if [ "$status" -eq 75 ] || { [ "$status" -eq 143 ] && [ "$told_by" = queue ]; }; then requeue; fi
  exit "$status"
}
