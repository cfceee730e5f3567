"""A checkpoint of some ranks, expert-parallel groups and ZeRO stage goes on with others."""

from itertools import chain
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

from marco_train.config import TrainConfig
from marco_train.data.loader import SFTLoader
from marco_train.engine.policy import Policy
from marco_train.models.weights import ALL_EXPERTS, named_weights, single_experts
from tests.helpers.checkpoints import optimizer_state, same_state
from tests.helpers.configs import compose_config
from tests.helpers.ranks import run_on_ranks
from tests.helpers.runs import losses, overrides, run
from tests.helpers.world import World

pytestmark = pytest.mark.slow

# Ranks, ranks that share experts, stage of ZeRO: before and after.
Layout = tuple[int, int, int]
CHANGES: dict[str, tuple[Layout, Layout]] = {
    "one rank to two": ((1, 1, 1), (2, 1, 1)),
    "two ranks to one": ((2, 2, 1), (1, 1, 1)),
    "two ranks, experts spread and ZeRO 2": ((2, 1, 1), (2, 2, 2)),
    "two ranks, experts whole and ZeRO 1": ((2, 2, 2), (2, 1, 1)),
    "two ranks to four, experts over two to four": ((2, 2, 1), (4, 4, 2)),
    "four ranks to one": ((4, 2, 2), (1, 1, 1)),
}
CASES = [(change, dtype) for change in CHANGES for dtype in ("float32", "bfloat16")]
"""Of which the first is not long."""


def config(world: World, out: Path, layout: Layout, *more: str, stage: str = "sft") -> TrainConfig:
    _, experts_over, zero_stage = layout
    given = [*overrides(stage, world, out, experts_over), f"parallel.zero_stage={zero_stage}"]
    return compose_config(f"quickstart_{stage}", *given, *more)


def run_noting_samples(
    cfg: TrainConfig, stage: str, crash_at: int | None
) -> tuple[list[list[int]], dict[str, Tensor]]:
    """Run on a rank; the samples of each step, and the weights that it began with."""
    drawn: list[list[int]] = []
    plain = SFTLoader._next_share

    def next_share(self: SFTLoader) -> Any:
        found = plain(self)
        drawn.append([index for index, *_ in found])
        return found

    weights: dict[str, Tensor] = {}
    load = Policy.load_state

    def load_state(self: Policy, *args: Any) -> None:
        load(self, *args)
        weights.update((n, w.clone()) for n, w in named_weights(self.model))

    setattr(SFTLoader, plain.__name__, next_share)  # in this process, which ends with the run
    setattr(Policy, load.__name__, load_state)
    run(cfg, stage, crash_at)
    return drawn, weights


def steps_of(ranks: list[tuple[list[list[int]], dict[str, Tensor]]]) -> list[list[int]]:
    """The samples of each step over all ranks."""
    by_step = zip(*(drawn for drawn, _ in ranks), strict=True)
    return [sorted(chain.from_iterable(of_ranks)) for of_ranks in by_step]


def parametrized() -> list[Any]:
    marks = [[] if number == 0 else [pytest.mark.long] for number in range(len(CASES))]
    return [
        pytest.param(change, dtype, id=f"{change}, {dtype}", marks=mark)
        for (change, dtype), mark in zip(CASES, marks, strict=True)
    ]


@pytest.mark.parametrize(("change", "dtype"), parametrized())
def test_a_run_goes_on_in_another_layout(
    change: str, dtype: str, world: World, tmp_path: Path
) -> None:
    before, after = CHANGES[change]
    given = [f"model.dtype={dtype}"]
    whole, parts = tmp_path / "whole", tmp_path / "parts"
    calm = run_on_ranks(
        before[0], run_noting_samples, config(world, whole, before, *given), "sft", None
    )
    first = run_on_ranks(
        before[0], run_noting_samples, config(world, parts, before, *given), "sft", 3
    )
    saved = parts / "checkpoints" / "step_000003"
    second = run_on_ranks(
        after[0],
        run_noting_samples,
        config(world, tmp_path / "again", after, *given, f"resume={saved}"),
        "sft",
        None,
    )
    # A run that begins with another's checkpoint saves it as its own, before its first update.
    loaded = tmp_path / "again" / "checkpoints" / "step_000003"
    assert len(list(loaded.glob("rank_*"))) == after[0]
    same_state(saved, loaded)
    masters = optimizer_state(saved)
    for rank, (_, weights) in enumerate(second):
        for name, weight in weights.items():
            expected = masters[f"master.{name}"].to(weight.dtype)
            assert torch.equal(weight, expected), (rank, name)

    # What is not stored can be told from what is: the calm run's export from its last masters.
    exported = load_file(whole / "export" / "model.safetensors")
    last = optimizer_state(whole / "checkpoints" / "step_000006")
    named = {n.removeprefix("master."): t for n, t in last.items() if n.startswith("master.")}
    stored = dict(single_experts(named.items(), ALL_EXPERTS))
    assert exported.keys() == stored.keys()
    for name, weight in exported.items():
        assert torch.equal(stored[name].to(weight.dtype), weight), name

    assert steps_of(calm) == steps_of(first)[:3] + steps_of(second)
    then, now = losses(whole), losses(parts) + losses(tmp_path / "again")
    assert [line["step"] for line in now] == [1, 2, 3, 4, 5, 6]
    # In bfloat16 two calm runs of other layouts differ by a rounding of a weight, and so by more.
    tolerance = 1e-6 if dtype == "float32" else 1e-2
    for one, other in zip(then, now, strict=True):
        for name in ("loss/cross_entropy", "data/num_loss_tokens", "optim/lr"):
            assert other[name] == pytest.approx(one[name], abs=tolerance), (one["step"], name)


@pytest.mark.long
def test_a_cascade_goes_on_with_another_number_of_ranks(world: World, tmp_path: Path) -> None:
    whole, parts = tmp_path / "whole", tmp_path / "parts"
    one, two = (1, 1, 1), (2, 2, 2)
    run_on_ranks(1, run, config(world, whole, one, stage="opd"), "opd", None)
    run_on_ranks(1, run, config(world, parts, one, stage="opd"), "opd", 5)
    run_on_ranks(2, run, config(world, parts, two, stage="opd"), "opd", None)
    then, now = losses(whole), losses(parts)
    assert [line["cascade/phase"] for line in now] == [0, 0, 0, 0, 1, 1]
    for one_step, other in zip(then, now, strict=True):
        for name in ("kl/reverse", "rollout/response_length", "data/num_loss_tokens", "optim/lr"):
            assert other[name] == pytest.approx(one_step[name], rel=1e-5), (one_step["step"], name)
