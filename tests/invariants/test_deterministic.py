"""A run that is asked to repeat its numbers sets what GPUs need for it, and changes no CPU's."""

import os
from pathlib import Path

import pytest
import torch

from marco_train.config import TrainConfig
from marco_train.distributed import compute_deterministically
from marco_train.train import run_stage
from tests.helpers.configs import compose_config
from tests.helpers.ranks import run_on_ranks
from tests.helpers.runs import learnt, overrides
from tests.helpers.world import World

NAMES = ("CUBLAS_WORKSPACE_CONFIG", "CUBLASLT_WORKSPACE_SIZE", "VLLM_BATCH_INVARIANT")


def settings() -> tuple[bool, list[str | None]]:
    return torch.are_deterministic_algorithms_enabled(), [os.environ.get(name) for name in NAMES]


def settings_of_run(cfg: TrainConfig) -> tuple[bool, list[str | None]]:
    """Make a run; what the process is set to afterwards."""
    run_stage(cfg)
    return settings()


@pytest.mark.slow
def test_a_deterministic_run_on_a_cpu_is_the_same_to_the_last_byte(
    world: World, tmp_path: Path
) -> None:
    found = {}
    for asked in ("false", "true"):
        out = tmp_path / asked
        given = [*overrides("opd", world, out, 1), f"deterministic={asked}"]
        (found[asked],) = run_on_ranks(1, settings_of_run, compose_config("quickstart_opd", *given))
    assert found["false"] == (False, [None, None, None])
    # vLLM's would put kernels for GPUs into a process that has none.
    assert found["true"] == (True, [":16:8", "1", None])
    steps, weights = learnt(tmp_path / "true")
    assert len(steps) == 6
    assert (steps, weights) == learnt(tmp_path / "false")


def settings_with_a_gpu() -> tuple[bool, list[str | None]]:
    torch.cuda.is_available = lambda: True
    compute_deterministically()
    return settings()


def test_with_a_gpu_vllm_is_told_too() -> None:
    assert run_on_ranks(1, settings_with_a_gpu) == [(True, [":16:8", "1", "1"])]
