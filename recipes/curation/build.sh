# Sourced by the recipes of this folder: `build <kind> [key=value ...]` builds one set, in one process.
#
#   OPENAI_API_KEY  the key of the LLM's endpoint, where it has one
#   DRY_RUN=1       print the command and do nothing

source "$(dirname "${BASH_SOURCE[0]}")/../launch.sh"

build() {
  local command=(python -m marco_train.commands.curate "$@")
  if [ "${DRY_RUN:-0}" = 1 ]; then printf '%q ' "${command[@]}"; echo; return; fi
  "${command[@]}"
}
