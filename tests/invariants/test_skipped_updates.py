"""An update whose loss or gradient is not finite, or a spike, is as if nobody had asked for it."""

import json
import math
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from marco_train.config import TrainConfig
from marco_train.data.chat import load_tokenizer
from marco_train.data.loader import SFTLoader
from marco_train.distributed import rank, world_size
from marco_train.engine.guard import Skipped
from marco_train.engine.policy import Policy, build_policy
from marco_train.losses.cross_entropy import cross_entropy
from marco_train.losses.distillation import build_reverse_kl
from marco_train.stages import opd, sft
from marco_train.types import LossFn, LossOutput, Microbatch, PolicyOutput
from tests.helpers.configs import compose_config
from tests.helpers.ranks import run_on_ranks
from tests.helpers.runs import losses, overrides, run
from tests.helpers.world import World

pytestmark = pytest.mark.slow

UPDATES = 8
# By update. Of the second each loss is a number, and only the square of the gradient is not.
FAULTS = {1: math.nan, 2: 1e34, 4: math.inf, 6: 1000.0}


def scaled(loss_fn: LossFn, factor: float, is_at_fault: Callable[[Microbatch], bool]) -> LossFn:
    """A loss that is so many times what it should be, of some microbatches."""

    def loss(output: PolicyOutput, microbatch: Any) -> LossOutput:
        found = loss_fn(output, microbatch)
        by = factor if is_at_fault(microbatch) else 1.0
        return LossOutput(
            found.loss * by,
            {name: value * by for name, value in found.values.items()},
            found.spreads,
        )

    return loss


def config(world: World, *more: str) -> TrainConfig:
    return compose_config(
        "quickstart_sft",
        f"root={world.root}",
        "stage.global_batch_size=7",
        "stage.max_length=64",
        "data.max_tokens_per_microbatch=64",
        "optim.warmup_steps=0",
        "parallel.expert_parallel_size=1",
        *more,
    )


def is_of(microbatch: Microbatch, samples: tuple[int, ...] | None) -> bool:
    """Whether a microbatch is the one of these samples."""
    return microbatch.samples == samples


Outcome = tuple[dict[str, Tensor], list[dict[str, float]], list[Skipped]]


def tensors_of(policy: Policy) -> dict[str, Tensor]:
    """Weights, masters and moments of this rank."""
    weights = {name: p.detach() for name, p in policy.model.named_parameters()}
    pieces = policy.state().pieces
    held = {f"{kind}.{p.parameter}": t for p in pieces for kind, t in p.tensors.items()}
    return weights | held


def train(cfg: TrainConfig, is_asked: bool) -> Outcome:
    """Weights, masters and moments after some updates, of which some are at fault.

    Unless it is asked for these, they are passed over.
    """
    data = SFTLoader(cfg.data, cfg.stage, load_tokenizer(cfg.model), cfg.seed)
    policy = build_policy(cfg.model, cfg.optim, cfg.parallel, UPDATES, cfg.seed, "")
    measured, found = [], []
    for update in range(UPDATES):
        microbatches = next(data)
        if update not in FAULTS:
            measured.append(policy.train_step(microbatches, cross_entropy))
            assert policy.skipped is None
        elif not is_asked:
            policy.num_updates += 1
        else:
            factor = FAULTS[update]
            before = {name: t.clone() for name, t in tensors_of(policy).items()}
            # On one rank alone, and in the first of its microbatches.
            first = microbatches[0].samples if rank() == world_size() - 1 else None
            bad = scaled(cross_entropy, factor, partial(is_of, samples=first))
            metrics = policy.train_step(microbatches, bad)
            assert all(map(math.isfinite, metrics.values()))
            assert policy.skipped is not None
            assert metrics[policy.skipped.metric] == 1
            found.append(policy.skipped)
            for name, tensor in tensors_of(policy).items():
                assert torch.equal(tensor, before[name]), name
            if rank() == world_size() - 1 and not math.isfinite(factor):
                assert policy.skipped.samples == sorted(first or ())
            assert (len(policy.skipped.samples) == 7) == math.isfinite(factor)
    return {n: t.clone() for n, t in tensors_of(policy).items()}, measured, found


LAYOUTS = {
    "one rank": (1, []),
    "two ranks": (2, []),
    "two ranks, experts over two": (2, ["parallel.expert_parallel_size=2"]),
}


@pytest.mark.parametrize("dtype", ["float32", pytest.param("bfloat16", marks=pytest.mark.long)])
@pytest.mark.parametrize("zero_stage", [1, 2])
@pytest.mark.parametrize(("num_ranks", "more"), LAYOUTS.values(), ids=LAYOUTS.keys())
def test_what_follows_an_update_at_fault_is_as_if_it_had_not_been(
    num_ranks: int, more: list[str], zero_stage: int, dtype: str, world: World
) -> None:
    more = [*more, f"parallel.zero_stage={zero_stage}", f"model.dtype={dtype}"]
    cfg = config(world, *more, "optim.spike_factor=5", "optim.spike_window=2")
    calm = run_on_ranks(num_ranks, train, cfg, False)
    faulty = run_on_ranks(num_ranks, train, cfg, True)
    for (state, measured, found), (wanted, wanted_measured, _) in zip(faulty, calm, strict=True):
        assert state.keys() == wanted.keys()
        for name, tensor in state.items():
            assert torch.equal(tensor, wanted[name]), name
        assert measured == wanted_measured
        assert [(each.update, each.metric) for each in found] == [
            (1, "optim/skipped_non_finite"),
            (2, "optim/skipped_non_finite"),
            (4, "optim/skipped_non_finite"),
            (6, "optim/skipped_spike"),
        ]
        said = "the gradient's norm is not finite, and no loss of a microbatch is at fault"
        assert found[1].reason == said and found[1].samples == list(range(14, 21))


PLANTED = 9
"""A sample whose loss is no number, in the second step of six."""


def with_planted_row(cfg: TrainConfig, stage: str, crash_at: int | None, factor: float) -> None:
    """A run in which one sample gives a loss of so many times what it should be."""

    def is_at_fault(batch: Microbatch) -> bool:
        return PLANTED in batch.samples

    bad = scaled(cross_entropy, factor, is_at_fault)
    setattr(sft, cross_entropy.__name__, bad)  # in this process, which ends with the run

    def build(*args: Any) -> LossFn:
        return scaled(build_reverse_kl(*args), factor, is_at_fault)

    setattr(opd, build_reverse_kl.__name__, build)
    run(cfg, stage, crash_at)


@pytest.mark.parametrize(
    ("stage", "num_ranks", "more"),
    [
        ("sft", 1, []),
        pytest.param("sft", 2, ["model.dtype=bfloat16"], marks=pytest.mark.long),
        pytest.param("opd", 2, [], marks=pytest.mark.long),
    ],
)
def test_a_run_leaves_out_a_planted_row_names_it_and_resumes_alike(
    stage: str, num_ranks: int, more: list[str], world: World, tmp_path: Path
) -> None:
    found = []
    for out, crash_at in ((tmp_path / "whole", None), (tmp_path / "parts", 4)):
        given = [*overrides(stage, world, out, num_ranks), *more]
        cfg = compose_config(f"quickstart_{stage}", *given)
        for crash in (crash_at, None) if crash_at else (None,):
            run_on_ranks(num_ranks, with_planted_row, cfg, stage, crash, math.nan)
        quarantined = (out / "quarantine.jsonl").read_text()
        weights = (out / "export" / "model.safetensors").read_bytes()
        found.append((losses(out), quarantined, weights))
    assert found[0] == found[1]
    assert [line["optim/skipped_non_finite"] for line in found[0][0]] == [0, 1, 0, 0, 0, 0]
    rows = [json.loads(line) for line in found[0][1].splitlines()]
    assert all(row["reason"].startswith("update 1: the loss is not finite (") for row in rows)
    assert all(row.keys() == {"source", "row", "reason", "begins"} for row in rows)
    cfg = compose_config(f"quickstart_{stage}", *overrides(stage, world, tmp_path, 1))
    assert place_of(cfg) in [(row["source"], row["row"]) for row in rows]
    if stage == "sft" and num_ranks == 2:
        assert len(rows) < 6  # those of one microbatch


def place_of(cfg: TrainConfig) -> tuple[str, int]:
    """Where the planted sample stands."""
    from marco_train.data.stream import ConversationStream

    return ConversationStream(cfg.data.sources, cfg.data.num_rows, cfg.seed).place(PLANTED)


def always_at_fault(cfg: TrainConfig) -> None:
    bad = scaled(cross_entropy, math.nan, lambda batch: True)
    setattr(sft, cross_entropy.__name__, bad)
    run(cfg, "sft", None)


def test_too_many_in_a_row_end_the_run_with_the_rows(world: World, tmp_path: Path) -> None:
    given = [*overrides("sft", world, tmp_path, 1), "checkpoint.save_every=1"]
    cfg = compose_config("quickstart_sft", *given, "optim.max_skipped_in_a_row=1")
    for _ in range(2):  # launched again, it ends at the same update
        with pytest.raises(AssertionError) as ended:
            run_on_ranks(1, always_at_fault, cfg)
        said = str(ended.value)
        assert "SkippedUpdatesError: update 1 is not made: the loss is not finite" in said
        assert "source 'math', row" in said
        assert "It is number 2 in a row, and optim.max_skipped_in_a_row is 1" in said
    assert [line["step"] for line in losses(tmp_path)] == [1]
    more = compose_config("quickstart_sft", *given, "optim.max_skipped_in_a_row=9")
    run_on_ranks(1, always_at_fault, more)  # which a resumption may change
    assert [line["optim/skipped_non_finite"] for line in losses(tmp_path)] == [1] * 6


def spiky(cfg: TrainConfig, crash_at: int | None, factor: float, at: int) -> None:
    """A run of whose updates one has a loss of so many times what it should be."""
    plain = Policy.train_step

    def train_step(self: Policy, microbatches: Any, loss_fn: LossFn) -> Any:
        is_spike = self.num_updates == at
        return plain(self, microbatches, scaled(loss_fn, factor, lambda _: is_spike))

    setattr(Policy, plain.__name__, train_step)
    run(cfg, "sft", crash_at)


@pytest.mark.long
@pytest.mark.parametrize(("num_ranks", "dtype"), [(1, "float32"), (2, "float32"), (2, "bfloat16")])
def test_a_spike_over_the_median_is_left_out_also_after_a_resumption(
    num_ranks: int, dtype: str, world: World, tmp_path: Path
) -> None:
    found = []
    for out, crash_at in ((tmp_path / "whole", None), (tmp_path / "parts", 4)):
        given = [*overrides("sft", world, out, num_ranks), f"model.dtype={dtype}"]
        given += ["optim.spike_factor=5", "optim.spike_window=4"]
        cfg = compose_config("quickstart_sft", *given)
        for crash in (crash_at, None) if crash_at else (None,):
            # The fifth update, of which a window that is not kept would know too little.
            run_on_ranks(num_ranks, spiky, cfg, crash, 100.0, 4)
        found.append((losses(out), (out / "export" / "model.safetensors").read_bytes()))
    assert found[0] == found[1]
    assert [line["optim/skipped_spike"] for line in found[0][0]] == [0, 0, 0, 0, 1, 0]
    (row, *_) = map(json.loads, (tmp_path / "whole" / "quarantine.jsonl").read_text().splitlines())
    assert row["reason"].startswith("update 4: the loss is ")
    assert "over optim.spike_factor 5 times" in row["reason"]


def test_without_a_factor_a_spike_is_trained_on(world: World, tmp_path: Path) -> None:
    cfg = compose_config("quickstart_sft", *overrides("sft", world, tmp_path, 1))
    run_on_ranks(1, spiky, cfg, None, 100.0, 4)
    assert {line["optim/skipped_spike"] for line in losses(tmp_path)} == {0}
    assert not (tmp_path / "quarantine.jsonl").exists()
