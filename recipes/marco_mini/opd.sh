#!/usr/bin/env bash
# recipes/marco_mini/opd.sh model.path=<Hugging Face directory> [overrides]; see README.md.
set -euo pipefail
source "$(dirname "${BASH_SOURCE[0]}")/../launch.sh"
launch marco_mini_opd "$@"
