#!/usr/bin/env bash
# Two steps at full width with 2 of the 28 layers, without a GPU or a network: random weights, bytes
# for tokens, the rows of recipes/own_data. recipes/qwen3_0.6b/rehearse.sh [overrides]
set -euo pipefail
source "$(dirname "${BASH_SOURCE[0]}")/../launch.sh"
[ "${DRY_RUN:-0}" = 1 ] || python recipes/own_data/make_model.py
export NPROC=${NPROC:-1}
launch qwen3_0_6b_sft name=qwen3_0_6b_rehearsal resume=never checkpoint=none \
  model.path=null model.tokenizer=outputs/own_data/model model.architecture.num_hidden_layers=2 \
  '~data.sources.dolci' data.sources.own.path=recipes/own_data/rows.jsonl \
  stage.max_steps=2 stage.global_batch_size=8 stage.max_length=256 \
  data.max_tokens_per_microbatch=1024 "$@"
