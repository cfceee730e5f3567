# Sourced by this folder's scripts: set-up, where runs lie, and `stage`, which times a launch.
set -euo pipefail
source "$(dirname "${BASH_SOURCE[0]}")/../launch.sh"
[ "${DRY_RUN:-0}" = 1 ] || { scripts/setup; PATH="$recipe_home/.venv/bin:$PATH"; }
export NPROC=${NPROC:-2}

root=outputs/quickstart
for override in "$@"; do
  case $override in root=*) root=${override#root=} ;; esac
done

prepare() {
  [ "${DRY_RUN:-0}" = 1 ] || python recipes/quickstart/prepare.py --out "$root/data"
}

# stage <directory> <experiment> [overrides]: seconds go to <directory>/wall_seconds, once.
stage() {
  local directory=$root/$1 experiment=$2; shift 2
  local start=$EPOCHREALTIME before=no
  [ -e "$directory/finished.json" ] && before=yes
  launch "$experiment" "$@"
  if [ "${DRY_RUN:-0}" != 1 ] && [ $before = no ]; then
    python -c "import sys; print(float(sys.argv[2]) - float(sys.argv[1]))" \
      "$start" "$EPOCHREALTIME" > "$directory/wall_seconds"
  fi
}

# Sparse mixture from the dense base: 4 slices of 48, 4 copies of each.
upcycle() {
  [ "${DRY_RUN:-0}" = 1 ] || [ -e "$root/student/config.json" ] ||
    python scripts/upcycle.py --dense "$root/base/export" --out "$root/student" \
      --num-experts 16 --expert-width 48 --top-k 4 --drop-ratio 0.25 --router-std 0.02
}
