"""An optimizer's state that leaves the device between updates learns the same, bit for bit."""

import gc
import threading

import pytest
import torch

from marco_train.checkpoint import Snapshot
from marco_train.config import TrainConfig
from marco_train.data.chat import load_tokenizer
from marco_train.data.loader import SFTLoader
from marco_train.engine.policy import Policy, build_policy
from marco_train.losses.cross_entropy import cross_entropy
from tests.helpers.configs import compose_config
from tests.helpers.ranks import run_on_ranks
from tests.helpers.world import World

pytestmark = pytest.mark.slow

STEPS = 4
KINDS = [(dtype, stage) for dtype in ("float32", "bfloat16") for stage in (1, 2)]
State = dict[str, torch.Tensor]


def config(world: World, dtype: str, zero_stage: int, num_ranks: int) -> TrainConfig:
    return compose_config(
        "quickstart_sft",
        f"root={world.root}",
        f"model.dtype={dtype}",
        "stage.global_batch_size=7",
        "stage.max_length=64",
        "data.max_tokens_per_microbatch=64",  # several a rank
        f"parallel.expert_parallel_size={num_ranks}",
        f"parallel.zero_stage={zero_stage}",
    )


def build(cfg: TrainConfig, offload: bool) -> Policy:
    cfg.parallel.offload_while_sampling = offload
    return build_policy(cfg.model, cfg.optim, cfg.parallel, STEPS, cfg.seed, "")


def copied(policy: Policy) -> State:
    pieces = Snapshot(policy.state()).state.pieces
    found = {f"{kind}.{p.parameter}": tensor for p in pieces for kind, tensor in p.tensors.items()}
    weights = policy.model.named_parameters()
    return found | {name: weight.detach().clone() for name, weight in weights}


def learn(policy: Policy, cfg: TrainConfig, first: int, until: int) -> list[dict[str, float]]:
    """Make some of the updates on the batches that belong to them; what was measured."""
    data = SFTLoader(cfg.data, cfg.stage, load_tokenizer(cfg.model), cfg.seed)
    batches = [next(data) for _ in range(until)]
    found = [policy.train_step(batch, cross_entropy) for batch in batches[first:]]
    return [
        {k: v for k, v in step.items() if not k.startswith(("time/", "perf/", "memory/"))}
        for step in found
    ]


def learn_both_ways(cfgs: list[TrainConfig]) -> list[tuple[State, State, list[object]]]:
    """States after all updates: never away, and away between them and across a resumption."""
    found: list[tuple[State, State, list[object]]] = []
    for cfg in cfgs:
        staying = build(cfg, offload=False)
        start = copied(staying)
        measured: list[object] = [learn(staying, cfg, 0, STEPS)]

        leaving = build(cfg, offload=True)
        measured_away = learn(leaving, cfg, 0, 2)
        saved = Snapshot(leaving.state())  # as a checkpoint is: while it is away
        resumed = build(cfg, offload=True)
        resumed.load_state(saved, 2)
        measured.append(measured_away + learn(resumed, cfg, 2, STEPS))
        for name, tensor in copied(staying).items():
            assert not name.startswith("master.") or not torch.equal(tensor, start[name])
        found.append((copied(staying), copied(resumed), measured))
    return found


@pytest.mark.long
@pytest.mark.parametrize("num_ranks", [1, 2])
def test_a_state_that_leaves_learns_the_same_bit_for_bit(num_ranks: int, world: World) -> None:
    cfgs = [config(world, *kind, num_ranks) for kind in KINDS]
    for outcomes in run_on_ranks(num_ranks, learn_both_ways, cfgs):
        for kind, (stayed, left, (measured, measured_away)) in zip(KINDS, outcomes, strict=True):
            assert stayed.keys() == left.keys()
            assert any(name.startswith("exp_avg_sq.") for name in stayed)
            for name, tensor in stayed.items():
                assert torch.equal(tensor, left[name]), (kind, name)
            assert measured == measured_away, kind


def float32_bytes(least: int) -> int:
    """Memory of the live float32 tensors of so many bytes or more, each storage once."""
    gc.collect()
    tensors = [o for o in gc.get_objects() if type(o) in (torch.Tensor, torch.nn.Parameter)]
    storages = [t.untyped_storage() for t in tensors if t.dtype is torch.float32]
    sizes = {s.data_ptr(): s.nbytes() for s in storages if s.nbytes() >= least}
    return sum(sizes.values())


def memory_between_updates(cfg: TrainConfig) -> dict[str, float]:
    """Of a policy whose state is away: what is kept beside it, and what was freed, in bytes."""
    before = float32_bytes(1024)
    policy = build(cfg, offload=True)
    data = SFTLoader(cfg.data, cfg.stage, load_tokenizer(cfg.model), cfg.seed)
    metrics = policy.train_step(next(data), cross_entropy)
    return {
        "kept": float32_bytes(1024) - before,
        "freed": metrics["perf/offloaded_gib"] * 2**30,
        "parameters": sum(p.numel() for p in policy.model.parameters()),
        "seconds": metrics["time/offload"],
    }


def of_each(cfgs: list[TrainConfig]) -> list[dict[str, float]]:
    return [memory_between_updates(cfg) for cfg in cfgs]


def test_between_updates_nothing_of_it_is_kept_but_the_copy(world: World) -> None:
    cfgs = [config(world, "bfloat16", stage, 1) for stage in (1, 2)]
    (found,) = run_on_ranks(1, of_each, cfgs)
    for stage, memory in zip((1, 2), found, strict=True):
        size = memory["parameters"]
        assert memory["seconds"] > 0
        assert memory["kept"] == pytest.approx(12 * size, rel=0.02)  # the copy itself, on a CPU
        # Masters and two moments; stage 1 has a buffer of gradients besides.
        assert memory["freed"] == pytest.approx((16 if stage == 1 else 12) * size, rel=0.02)


def update_while_a_checkpoint_is_copied(cfg: TrainConfig) -> list[tuple[bool, bool, bool]]:
    found = []
    for offload in (False, True):
        policy = build(cfg, offload)
        before = copied(policy)
        lent = policy.state()
        lent.lock.acquire()
        training = threading.Thread(target=learn, args=(policy, cfg, 0, 1))
        training.start()
        training.join(1)
        waited = training.is_alive()
        kept = all(
            torch.equal(tensor, before[f"{kind}.{piece.parameter}"])
            for piece in lent.pieces
            for kind, tensor in piece.tensors.items()
        )
        lent.lock.release()
        training.join(60)
        learnt = any(not torch.equal(t, before[name]) for name, t in copied(policy).items())
        found.append((waited, kept, learnt))
    return found


def test_an_update_changes_nothing_while_a_checkpoint_is_copied(world: World) -> None:
    cfg = config(world, "bfloat16", 2, 1)
    (found,) = run_on_ranks(1, update_while_a_checkpoint_is_copied, cfg)
    assert found == [(True, True, True)] * 2
