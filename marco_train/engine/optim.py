"""Parameter groups and learning-rate schedules."""

from collections.abc import Callable
from functools import partial
from typing import Any

from torch import nn

from marco_train.config.optim import OptimConfig
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
    """Return the learning rate as a function of the update's number, from 0."""
    return partial(cfg.rate_at, num_steps=num_steps)
