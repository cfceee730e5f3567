"""Runs of distillation that vLLM takes part in."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

from marco_train.config import TrainConfig
from marco_train.stages.opd import run_opd
from tests.helpers.configs import compose_config
from tests.helpers.ranks import run_on_ranks
from tests.helpers.world import World

IN_PROCESS = [
    "rollout@stage.rollout=vllm",
    "stage.rollout.kv_cache_gib=0.0625",
    "stage.rollout.max_tokens_per_batch=512",
]


def distil(
    world: World,
    out: Path,
    num_ranks: int,
    *overrides: str,
    run: Callable[[TrainConfig], None] = run_opd,
) -> list[dict[str, Any]]:
    """Make three steps, the last with the second teacher; what each measured."""
    cfg = compose_config(
        "quickstart_opd",
        f"root={world.root}",
        f"output_dir={out}",
        "stage.global_batch_size=6",
        "stage.max_response_length=8",
        "stage.cascade.first.num_steps=2",
        "stage.cascade.second.num_steps=1",
        "data.max_tokens_per_microbatch=128",
        f"parallel.expert_parallel_size={num_ranks}",
        "optim.warmup_steps=0",
        *overrides,
    )
    run_on_ranks(num_ranks, run, cfg)
    lines = (out / "metrics.jsonl").read_text().splitlines()
    return [json.loads(line) for line in lines]
