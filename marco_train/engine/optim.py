"""Parameter groups and learning-rate schedules."""

import math
from collections.abc import Callable
from typing import Any

from torch import nn

from marco_train.config import OptimConfig, Schedule
from marco_train.engine.expert_groups import expert_group_name, is_expert

LearningRate = Callable[[int], float]


def parameter_groups(
    model: nn.Module, weight_decay: float, expert_parallel_size: int
) -> list[dict[str, Any]]:
    """Split parameters by decay and, under expert parallelism, experts from the rest.

    Matrices are decayed and norms are not. DeepSpeed reduces the groups marked `moe` over the
    ranks that hold the same experts only.
    """
    parameters = list(model.parameters())
    dense = [p for p in parameters if not is_expert(p)]
    groups: list[dict[str, Any]] = [
        {
            "name": "matrices",
            "params": [p for p in dense if p.dim() > 1],
            "weight_decay": weight_decay,
        },
        {"name": "norms", "params": [p for p in dense if p.dim() == 1], "weight_decay": 0.0},
    ]
    experts = [p for p in parameters if is_expert(p)]
    if experts:
        groups.append(
            {
                "name": expert_group_name(expert_parallel_size),
                "moe": True,
                "params": experts,
                "weight_decay": weight_decay,
            }
        )
    return groups


def build_schedule(cfg: OptimConfig, num_steps: int) -> LearningRate:
    """Return the learning rate as a function of the update's number, from 0.

    Rises linearly over `warmup_steps`, the first update being at 1 / warmup_steps of the peak,
    then stays, or falls along half a cosine to `min_learning_rate` at the last update.
    """
    warmup = cfg.warmup_steps

    def cosine(step: int) -> float:
        progress = min(1.0, (step - warmup) / max(1, num_steps - 1 - warmup))
        swing = cfg.learning_rate - cfg.min_learning_rate
        return cfg.min_learning_rate + swing * (1 + math.cos(math.pi * progress)) / 2

    def learning_rate(step: int) -> float:
        if step < warmup:
            return cfg.learning_rate * (step + 1) / warmup
        return cosine(step) if cfg.schedule is Schedule.cosine else cfg.learning_rate

    return learning_rate
