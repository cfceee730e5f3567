"""How often ranks exchange something in a step, beside gradients and tokens on their way."""

import sys
from collections import Counter
from collections.abc import Callable
from datetime import timedelta
from pathlib import Path
from types import FrameType
from typing import Any

import pytest
import torch
import torch.distributed as dist

from marco_train import distributed
from marco_train.distributed import Groups, gather_objects, limit_waits
from marco_train.run import Run
from tests.helpers.configs import compose_config
from tests.helpers.ranks import run_on_ranks
from tests.helpers.runs import STAGES, overrides, run
from tests.helpers.world import World

pytestmark = pytest.mark.slow

EXCHANGES = (
    *("all_gather", "all_gather_object", "all_gather_into_tensor", "all_gather_coalesced"),
    *("all_reduce", "all_to_all", "all_to_all_single", "barrier", "broadcast"),
    *("broadcast_object_list", "gather", "reduce", "reduce_scatter", "reduce_scatter_tensor"),
)
# Exchanges of the update's gradients, of tokens and of weights.
CARRIERS = {"deepspeed", "models/dispatch.py", "models/weights.py"}


def caller() -> str:
    """The file of the package that exchanges something, or DeepSpeed on its behalf."""
    frame: FrameType | None = sys._getframe(2)
    while frame is not None:
        path = frame.f_code.co_filename
        if "/deepspeed/" in path:
            return "deepspeed"
        if "/marco_train/" in path and not path.endswith("/distributed.py"):
            return path.rpartition("/marco_train/")[2]
        frame = frame.f_back
    return "nobody"


def exchanges_of_a_step(world: World, out: Path, stage: str) -> dict[str, int]:
    """Run three steps; the exchanges of the second by the file that makes them."""
    counts: Counter[str] = Counter()
    by_step: list[dict[str, int]] = []
    depth = 0

    def counted(exchange: Callable[..., Any]) -> Callable[..., Any]:
        def call(*args: Any, **kwargs: Any) -> Any:
            nonlocal depth
            counts[caller()] += depth == 0
            depth += 1
            try:
                return exchange(*args, **kwargs)
            finally:
                depth -= 1

        return call

    for name in EXCHANGES:
        if hasattr(dist, name):
            setattr(dist, name, counted(getattr(dist, name)))  # in this process, which ends here
    plain = Run.save_if_due

    def save_if_due(self: Run, step: int) -> None:
        plain(self, step)
        by_step.append({name: n for name, n in counts.items() if n and name not in CARRIERS})
        counts.clear()

    setattr(Run, plain.__name__, save_if_due)
    given = [*overrides(stage, world, out, 1), "checkpoint.save_every=null", "stage.max_steps=3"]
    more = ["stage.eval_every=null"] if stage == "sft" else ["~stage.cascade.second"]
    STAGES[stage](compose_config(f"quickstart_{stage}", *given, *more))
    return by_step[1]


# Ranks agree on whether to make an update twice: by its losses, and by its gradient's norm.
OF_ALL = {
    "data/loader.py": 1,
    "data/packing.py": 1,
    "engine/policy.py": 1,
    "engine/guard.py": 2,
    "metrics.py": 1,
}


@pytest.mark.parametrize(
    ("stage", "wanted"),
    [
        ("sft", OF_ALL | {"run.py": 1}),
        # A sync is agreed on twice: by checksums, and by the canary. Rollouts that change ranks
        # cross between two alone.
        (
            "opd",
            OF_ALL
            | {"run.py": 1, "rollout/sync.py": 2, "rollout/base.py": 1, "rollout/balance.py": 1},
        ),
    ],
)
def test_each_station_exchanges_something_once_a_step(
    stage: str, wanted: dict[str, int], world: World, tmp_path: Path
) -> None:
    assert run_on_ranks(2, exchanges_of_a_step, world, tmp_path, stage) == [wanted, wanted]


def told(size: int) -> list[tuple[int, str]]:
    rank = dist.get_rank()
    return gather_objects((rank, "x" * size * rank))


@pytest.mark.parametrize("size", [0, 9, distributed.GATHERED_AT_ONCE, 100_000])
def test_objects_of_any_size_are_gathered_in_the_order_of_ranks(size: int) -> None:
    wanted = [(rank, "x" * size * rank) for rank in range(3)]
    assert run_on_ranks(3, told, size) == [wanted] * 3


def timeouts_after_a_run(world: World, out: Path, experts_over: int) -> list[timedelta]:
    """Of the groups that the run and DeepSpeed have formed, in the order in which they did."""
    Groups.timeout = timedelta(seconds=33)
    run(
        compose_config(
            "quickstart_sft", *overrides("sft", world, out, experts_over), "stage.max_steps=1"
        ),
        "sft",
        None,
    )
    groups = [group for group in dist.distributed_c10d._world.pg_map if group != dist.group.WORLD]
    return [group._get_backend(torch.device("cpu")).options._timeout for group in groups]


@pytest.mark.parametrize("experts_over", [1, 2])
def test_a_rank_waits_as_long_as_configured_in_the_groups_that_deepspeed_forms(
    experts_over: int, world: World, tmp_path: Path
) -> None:
    for found in run_on_ranks(2, timeouts_after_a_run, world, tmp_path, experts_over):
        assert len(found) >= experts_over  # DeepSpeed's of all ranks, and that of the experts
        assert set(found) == {timedelta(seconds=33)}


def waited_in_vain() -> str:
    group = dist.new_group()
    Groups.timeout = timedelta(seconds=1)
    limit_waits()
    met = dist.distributed_c10d._get_default_store()
    if dist.get_rank() == 1:
        met.wait(["the first has waited"], timedelta(seconds=60))
        return ""
    try:
        dist.all_reduce(torch.ones(1), group=group)
    except RuntimeError as error:
        return str(error)
    finally:
        met.set("the first has waited", "")
    return "did not"


def test_a_rank_does_not_wait_longer_for_one_that_is_silent() -> None:
    said, _ = run_on_ranks(2, waited_in_vain)
    assert "Timed out waiting 1000ms" in said
