#!/usr/bin/env bash
# Translation both ways, from mined pairs of NLLB: recipes/curation/translation.sh input=<their directory>
#     output_dir=D [languages=[de,fr]] [plan=true] [key=value ...]
set -euo pipefail
source "$(dirname "${BASH_SOURCE[0]}")/build.sh"

build translation "$@"
