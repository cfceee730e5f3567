#!/usr/bin/env bash
# All three sets, as configs/data/marco_{sft,opd}.yaml read them:
#   recipes/curation/all.sh output_dir=data/marco translation.input=... culture.input=... science.input=...
#     [<kind>.key=value ...] [key=value ...]
# A key without a kind is of all three. D/<kind>.jsonl is a link into D/<kind>.
set -euo pipefail
source "$(dirname "${BASH_SOURCE[0]}")/build.sh"

output_dir=data/marco
shared=()
for word in "$@"; do
  case $word in
    output_dir=*) output_dir=${word#output_dir=} ;;
    translation.* | culture.* | science.*) ;;
    *) shared+=("$word") ;;
  esac
done
for kind in translation culture science; do
  own=()
  for word in "$@"; do
    case $word in "$kind".*) own+=("${word#"$kind".}") ;; esac
  done
  build "$kind" "output_dir=$output_dir/$kind" "${shared[@]}" "${own[@]}"
done
