# Sourced by every recipe: `launch <experiment> [overrides]` runs one stage on all processes, and
# `launch_module <module> [words]` what takes a command line of its own.
#
#   NPROC        processes on this node; default: its GPUs that CUDA_VISIBLE_DEVICES leaves, or 1
#   NNODES       default 1          NODE_RANK    default 0
#   MASTER_ADDR  needed with more than one node
#   MASTER_PORT  default 29500; a single node picks a free one
#   OMP_NUM_THREADS  of each process; default: the cores that each has, 8 at most, and 1 without GPUs
#   DRY_RUN=1    print the command and do nothing

recipe_home=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
cd "$recipe_home"
if [ -x .venv/bin/python ]; then PATH="$recipe_home/.venv/bin:$PATH"; fi

count_gpus() {
  local visible=${CUDA_VISIBLE_DEVICES-all}
  case $visible in
    all) nvidia-smi --list-gpus 2>/dev/null | wc -l ;;
    "" | -*) echo 0 ;;
    *) tr ',' '\n' <<<"$visible" | grep -c . ;;
  esac
}

count_threads() { # of each of so many processes
  # Without GPUs: ranks that share cores would slow each other many times over.
  if [ "$(count_gpus)" -eq 0 ]; then echo 1; return; fi
  local threads=$(($(nproc) / $1))
  echo $((threads < 1 ? 1 : threads > 8 ? 8 : threads))
}

# overrides_for_part <part> <names of all parts> <words>: sets `overrides` to the words that are for
# every part, and to those for this one, which stand behind its name: opd.stage.objective=sampled.
overrides_for_part() {
  local part=$1 parts=" $2 " word; shift 2
  overrides=()
  for word in "$@"; do
    case $word in
      "$part".*) overrides+=("${word#"$part".}") ;;
      *) [[ $parts == *[[:space:]]"${word%%.*}"[[:space:]]* ]] || overrides+=("$word") ;;
    esac
  done
}

launch() {
  local experiment=$1; shift
  launch_module marco_train.train "experiment=$experiment" "$@"
}

launch_module() {
  local module=$1; shift
  local processes=${NPROC:-$(count_gpus)}
  if [ "$processes" -le 0 ]; then
    processes=1
    [ "${DRY_RUN:-0}" != 1 ] || echo "no GPU is seen here, so one process is launched: NPROC=8 prints eight" >&2
  fi
  local rendezvous=(--standalone)
  if [ "${NNODES:-1}" -gt 1 ]; then
    rendezvous=(--nnodes "$NNODES" --node_rank "${NODE_RANK:-0}"
      --master_addr "${MASTER_ADDR:?more than one node needs MASTER_ADDR}"
      --master_port "${MASTER_PORT:-29500}")
  fi
  # torchrun, which leaves the last word to the ranks.
  local command=(python -m marco_train.commands.launch "${rendezvous[@]}" --nproc_per_node "$processes"
    -m "$module" "$@")
  if [ "${DRY_RUN:-0}" = 1 ]; then printf '%q ' "${command[@]}"; echo; return; fi
  # Microbatches differ in shape, and pieces of freed memory would not fit the next. An engine of vLLM
  # turns this off for memory of its own that sleeps (0.32.0, device_allocator/cumem.py).
  export PYTORCH_ALLOC_CONF=${PYTORCH_ALLOC_CONF-${PYTORCH_CUDA_ALLOC_CONF-expandable_segments:True}}
  OMP_NUM_THREADS=${OMP_NUM_THREADS:-$(count_threads "$processes")} watched "${command[@]}"
}

# watched <command>: passes SIGTERM, SIGINT and SIGUSR1 on to the ranks, which save then, and SIGUSR2,
# at which they print their stacks; ends with their exit status where torchrun itself knows only 1: 2 if
# refused, 75 to be queued again, 143 if told to end. It has a session of its own, as Slurm signals all
# of a group, and SIGUSR1 ends a torchrun.
watched() {
  local status=0 file pid
  file=$(mktemp)
  MARCO_TRAIN_EXIT_STATUS=$file setsid "$@" &
  pid=$!
  trap 'kill -TERM "$pid" 2>/dev/null || true' TERM INT
  trap 'kill -USR1 $(cat "/proc/$pid/task/$pid/children") 2>/dev/null || true' USR1
  trap 'kill -USR2 $(cat "/proc/$pid/task/$pid/children") 2>/dev/null || true' USR2
  wait "$pid" || status=$?
  while kill -0 "$pid" 2>/dev/null; do wait "$pid" && status=0 || status=$?; done # a signal ends a wait
  trap - TERM INT USR1 USR2
  if [ "$status" -ne 0 ] && [ -s "$file" ] && [ "$(cat "$file")" -ne 0 ]; then status=$(cat "$file"); fi
  rm -f "$file"
  return "$status"
}
