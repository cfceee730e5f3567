#!/usr/bin/env bash
# Culture, from entities of Wikidata and an LLM: recipes/curation/culture.sh input=<dump or SPARQL JSON>
#     output_dir=D [languages=[de,fr]] [plan=true] [key=value ...]
set -euo pipefail
source "$(dirname "${BASH_SOURCE[0]}")/build.sh"

build culture "$@"
