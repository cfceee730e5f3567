#!/usr/bin/env bash
# Science, from prompts and an LLM's answers: recipes/curation/science.sh input=<prompts>
#     output_dir=D [languages=[de,fr]] [plan=true] [key=value ...]
set -euo pipefail
source "$(dirname "${BASH_SOURCE[0]}")/build.sh"

build science "$@"
