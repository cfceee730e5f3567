# Sourced by this folder's scripts: set-up, where runs lie, and `stage`, which times a launch.
set -euo pipefail
source "$(dirname "${BASH_SOURCE[0]}")/../launch.sh"
[ "${DRY_RUN:-0}" = 1 ] || { scripts/setup; PATH="$recipe_home/.venv/bin:$PATH"; }
export NPROC=${NPROC:-2}

root=outputs/quickstart seed=0
for override in "$@"; do
  case $override in
    root=*) root=${override#root=} ;;
    seed=*) seed=${override#seed=} ;;
  esac
done

# The data are the same for every seed: seeds differ in weights, batches and samples.
prepare() {
  [ "${DRY_RUN:-0}" = 1 ] || timed data python recipes/quickstart/prepare.py --out "$root/data"
}

# Sparse mixture from the dense base: 4 slices of 48, 4 copies of each.
upcycle() {
  [ "${DRY_RUN:-0}" = 1 ] || [ "$root/student/config.json" -nt "$root/base/finished.json" ] ||
    timed student python scripts/upcycle.py --dense "$root/base/export" --out "$root/student" \
      --overwrite --num-experts 16 --expert-width 48 --top-k 4 --drop-ratio 0.25 --router-std 0.02 --seed "$seed"
}

# stage <name> <experiment> [overrides]: runs in $root/<name>.
stage_names="base teacher_first teacher_second sft opd evaluate control_sft control_first
  control_second evaluate_controls"
stage() {
  local name=$1 experiment=$2 overrides; shift 2
  overrides_for_part "$name" "$stage_names" "$@"
  if [ "${DRY_RUN:-0}" = 1 ]; then launch "$experiment" "${overrides[@]}"; return; fi
  timed "$name" launch "$experiment" "${overrides[@]}"
}

# beside <name> <experiment> [overrides]: a stage in the background, until `joined`; it prints to
# $root/<name>.log.
beside() {
  if [ "${DRY_RUN:-0}" = 1 ]; then stage "$@"; return; fi
  mkdir -p "$root"
  beside_log=$root/$1.log
  echo "$1 is trained beside what follows, and prints to $beside_log"
  stage "$@" >"$beside_log" 2>&1 </dev/null &
  beside_pid=$!
  # However this script ends, the stage saves a checkpoint and ends too.
  trap 'kill -TERM "$beside_pid" 2>/dev/null && wait "$beside_pid" || true' EXIT
}

# joined: waits for the stage in the background, and fails as it did.
joined() {
  local status=0
  [ "${DRY_RUN:-0}" != 1 ] || return 0
  wait "$beside_pid" || status=$?
  trap - EXIT
  if [ "$status" -eq 0 ]; then tail -n 2 "$beside_log"; else tail -n 20 "$beside_log" >&2; fi
  return "$status"
}

# timed <name> <command>: seconds go to $root/seconds/<name>, unless there was nothing to do.
timed() {
  local name=$1 start=$EPOCHREALTIME before after file=$root/seconds/$1; shift
  before=$(newest "$root/$name")
  "$@"
  after=$(newest "$root/$name")
  [ "$before" = "$after" ] && return
  mkdir -p "$root/seconds"
  python -c "import sys; print(round(float(sys.argv[2]) - float(sys.argv[1]), 1))" \
    "$start" "$EPOCHREALTIME" > "$file"
}

# When a directory last held something new.
newest() { stat --format %Y "$1"/{finished,manifest,config}.json 2>/dev/null | sort -n | tail -n 1 || true; }
