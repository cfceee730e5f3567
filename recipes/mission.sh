# Sourced by marco_mini/run.sh and marco_nano/run.sh: `mission <run> <experts> <their width> <words>`
# chains a base, or an upcycled one, SFT, OPD from two teachers, the card's benchmarks and the card.
# Each part finds by what it wrote that it was finished, and goes on from its last checkpoint if not.
#
#   model.path=PATH   the base: a directory, or org/name of the hub; or
#   dense=PATH        a dense Qwen3 that is upcycled first
#   scale=tiny        all of it in minutes on two cores, with models and rows that it makes itself
#   root=DIRECTORY    of the parts' directories (outputs; of scale=tiny outputs/marco_tiny)
#   key=value         for every part; sft.key=value, opd.key=value, benchmark.key=value for one alone
#   DRY_RUN=1         print every launch and do nothing
source "$(dirname "${BASH_SOURCE[0]}")/launch.sh"

mission() {
  local run=$1 experts=$2 width=$3 base="" dense="" scale="" root="" word words=() measured overrides; shift 3
  for word in "$@"; do
    case $word in
      model.path=*) base=${word#*=} ;;
      dense=*) dense=${word#*=} ;;
      scale=*) scale=${word#*=} ;;
      root=*) root=${word#*=} ;;
      name=* | output_dir=*) refuse "$word would be that of every part: give root=<directory>" ;;
      *) words+=("$word") ;;
    esac
  done
  [[ $scale = tiny || -z $scale ]] || refuse "scale=$scale is unknown: give scale=tiny, or leave it out"
  local upcycling=(--num-experts "$experts" --expert-width "$width" --top-k 8)
  measured=(suite=card "rollout@stage.rollout=vllm")
  if [ "$scale" = tiny ]; then
    [ -z "$base$dense" ] || refuse "scale=tiny makes its own base: leave model.path and dense out"
    run=marco_tiny root=${root:-outputs/marco_tiny}
    dense=$root/given/base
    # The router of zeros, the paper's, would send all tokens to the same experts in so few steps.
    upcycling=(--num-experts 16 --expert-width 48 --top-k 4 --router-std 0.02)
    measured=(suite=fixture responses_per_prompt=2 max_response_length=16)
    export NPROC=${NPROC:-2}
  fi
  root=${root:-outputs}
  [ -n "$base$dense" ] || refuse "no base: give model.path=<base>, dense=<dense Qwen3>, or scale=tiny"
  [ -z "$base" ] || [ -z "$dense" ] || refuse "model.path=$base and dense=$dense: give one of them"
  base=${base:-$root/${run}_base}
  overrides_of sft "${words[@]}"
  local sft=("model.path=$base" "root=$root" "${overrides[@]}")
  overrides_of opd "${words[@]}"
  local opd=("model.path=$root/${run}_sft/export" "root=$root" "${overrides[@]}")
  overrides_of benchmark "${words[@]}"
  local benchmark=("model.path=$root/${run}_opd/export" "root=$root" "name=${run}_benchmark"
    "${measured[@]}" "${overrides[@]}")
  # What is mistyped for the last part is refused before the first.
  checked marco_train.train "experiment=${run}_sft" "${sft[@]}"
  checked marco_train.train "experiment=${run}_opd" "${opd[@]}"
  checked marco_train.commands.benchmark "${benchmark[@]}"
  if [ "$scale" = tiny ]; then alone python recipes/marco_mini/make_tiny.py --out "$root/given"; fi
  if [ -n "$dense" ]; then
    alone python scripts/upcycle.py --dense "$dense" --out "$base" "${upcycling[@]}"
  fi
  launch "${run}_sft" "${sft[@]}"
  launch "${run}_opd" "${opd[@]}"
  launch_module marco_train.commands.benchmark "${benchmark[@]}"
  alone python -m marco_train.commands.verbs card "$root/${run}_opd" --benchmark "$root/${run}_benchmark"
}

refuse() {
  echo "error: $1" >&2
  exit 2
}

overrides_of() { overrides_for_part "$1" "sft opd benchmark" "${@:2}"; }

checked() { # module, words: refuses a run that does not fit together
  if [ "${DRY_RUN:-0}" = 1 ]; then return; fi
  python -m "$@" --check || exit 2
}

alone() { # a command of one process, on the first node; what it refuses is no crash
  if [ "${NODE_RANK:-0}" != 0 ]; then return; fi
  if [ "${DRY_RUN:-0}" = 1 ]; then printf '%q ' "$@"; echo; return; fi
  local status=0
  "$@" || status=$?
  if [ "$status" -ne 0 ]; then exit $((status == 1 ? 2 : status)); fi
}
