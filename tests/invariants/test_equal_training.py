"""The same updates however the global batch is spread: ranks, experts, microbatches, ZeRO."""

from dataclasses import replace

import pytest
import torch

from marco_train.config import TrainConfig
from marco_train.data.chat import load_tokenizer
from marco_train.data.loader import SFTLoader
from marco_train.engine.policy import build_policy
from marco_train.losses.balance import balance_loss, router_z_loss
from marco_train.losses.cross_entropy import cross_entropy
from marco_train.models.routing import Routing
from tests.helpers.configs import GRADIENT_DESCENT, compose_config
from tests.helpers.ranks import run_on_ranks
from tests.helpers.world import World

pytestmark = pytest.mark.slow

STEPS = 3
Outcome = tuple[dict[str, torch.Tensor], list[dict[str, float]]]


def fine_tune(cfg: TrainConfig) -> Outcome:
    """Make three updates of plain gradient descent; the weights and what was measured."""
    tokenizer = load_tokenizer(cfg.model)
    data = SFTLoader(cfg.data, cfg.stage, tokenizer, cfg.seed)
    policy = build_policy(cfg.model, cfg.optim, cfg.parallel, STEPS, cfg.seed, "")
    measured = [policy.train_step(next(data), cross_entropy) for _ in range(STEPS)]
    return {name: weight.clone() for name, weight in policy.named_weights()}, measured


def config(world: World, *overrides: str) -> TrainConfig:
    return compose_config(
        "quickstart_sft",
        f"root={world.root}",
        "stage.global_batch_size=7",  # uneven over two ranks
        "stage.max_length=64",
        "data.max_tokens_per_microbatch=128",
        "parallel.expert_parallel_size=1",
        *GRADIENT_DESCENT,
        *overrides,
    )


@pytest.fixture(scope="module")
def one_rank(world: World) -> Outcome:
    (found,) = run_on_ranks(1, fine_tune, config(world))
    assert isinstance(found, tuple)
    return found


VARIANTS: dict[str, tuple[int, list[str]]] = {
    "two ranks": (2, []),
    "two ranks, experts over two": (2, ["parallel.expert_parallel_size=2"]),
    "two ranks, experts over two, ZeRO 2": (
        2,
        ["parallel.expert_parallel_size=2", "parallel.zero_stage=2"],
    ),
    "two ranks, small microbatches": (
        2,
        ["parallel.expert_parallel_size=2", "data.max_tokens_per_microbatch=64"],
    ),
    "one rank, small microbatches": (1, ["data.max_tokens_per_microbatch=64"]),
    "one rank, ZeRO 2": (1, ["parallel.zero_stage=2"]),
    "four ranks, experts over two": (4, ["parallel.expert_parallel_size=2"]),
    "four ranks, experts over four": (4, ["parallel.expert_parallel_size=4"]),
    "two ranks, a crossing for each expert": (
        2,
        ["parallel.expert_parallel_size=2", "parallel.dispatch=all_to_all"],
    ),
    "two ranks, layers computed again": (
        2,
        ["parallel.expert_parallel_size=2", "parallel.recompute=layer"],
    ),
    "one rank, attention computed again": (1, ["parallel.recompute=attention"]),
}


@pytest.mark.parametrize(("num_ranks", "overrides"), VARIANTS.values(), ids=VARIANTS.keys())
def test_updates_do_not_depend_on_how_the_batch_is_spread(
    num_ranks: int, overrides: list[str], world: World, one_rank: Outcome
) -> None:
    assert_same(run_on_ranks(num_ranks, fine_tune, config(world, *overrides)), one_rank)


def assert_same(found: list[Outcome], expected: Outcome) -> None:
    wanted_weights, wanted_metrics = expected
    for weights, metrics in found:
        assert weights.keys() == wanted_weights.keys()
        for name, weight in weights.items():
            torch.testing.assert_close(weight, wanted_weights[name], rtol=1e-5, atol=1e-5, msg=name)
        for step, wanted in zip(metrics, wanted_metrics, strict=True):
            assert step == pytest.approx(wanted, rel=1e-5, abs=1e-6)


def count_microbatches(cfg: TrainConfig) -> list[int]:
    tokenizer = load_tokenizer(cfg.model)
    data = SFTLoader(cfg.data, cfg.stage, tokenizer, cfg.seed)
    return [len(next(data)) for _ in range(STEPS)]


def test_the_variants_are_what_their_names_say(world: World) -> None:
    small = config(world, "data.max_tokens_per_microbatch=64")
    assert min(run_on_ranks(1, count_microbatches, small)[0]) > 1
    assert min(run_on_ranks(2, count_microbatches, small)[0]) > 1
    assert run_on_ranks(1, count_microbatches, config(world))[0] != [1] * STEPS


def test_a_rank_without_a_sequence_joins_the_update(world: World) -> None:
    # One conversation: the second rank has nothing, and half of the experts.
    single = [*("stage.global_batch_size=1", "data.max_tokens_per_microbatch=64")]
    (expected,) = run_on_ranks(1, fine_tune, config(world, *single))
    over_two = config(world, *single, "parallel.expert_parallel_size=2")
    assert_same(run_on_ranks(2, fine_tune, over_two), expected)


def refuse(cfg: TrainConfig) -> str:
    """What an update says of a batch without loss, and whether it left the weights alone."""
    tokenizer = load_tokenizer(cfg.model)
    data = SFTLoader(cfg.data, cfg.stage, tokenizer, cfg.seed)
    policy = build_policy(cfg.model, cfg.optim, cfg.parallel, STEPS, cfg.seed, "")
    before = {name: weight.clone() for name, weight in policy.named_weights()}
    (first, *_) = next(data)
    nothing = replace(first, loss_places=torch.zeros(0, dtype=torch.int64), num_loss_tokens=0)
    try:
        policy.train_step([nothing], cross_entropy)
    except ValueError as error:
        same = all(torch.equal(weight, before[name]) for name, weight in policy.named_weights())
        return f"{type(error).__name__}: {error}, {same}, {policy.num_updates}"
    return "no refusal"


def test_a_batch_without_a_token_to_learn_is_refused(world: World) -> None:
    (said,) = run_on_ranks(1, refuse, config(world))
    assert "no token of the global batch is to be learnt" in said
    assert said.endswith("True, 0")


def test_the_updates_move_the_weights(world: World, one_rank: Outcome) -> None:
    # Else the comparisons above would hold for a policy that learns nothing.
    from marco_train.models import load_model
    from marco_train.models.weights import named_weights

    before = dict(named_weights(load_model(world.path("student"), torch.float32)))
    moved = {
        name: float((weight - before[name]).abs().max()) for name, weight in one_rank[0].items()
    }
    assert all(change > 1e-4 for name, change in moved.items() if "experts" not in name), moved
    assert sum(change > 1e-4 for change in moved.values()) > 0.9 * len(moved)


def gradient_by_hand(cfg: TrainConfig) -> dict[str, torch.Tensor]:
    """Weights after one update, from autograd on plain logits without any engine."""
    from marco_train.models import load_model
    from marco_train.models.weights import named_weights

    tokenizer = load_tokenizer(cfg.model)
    data = SFTLoader(cfg.data, cfg.stage, tokenizer, cfg.seed)
    model = load_model(str(cfg.model.path), torch.float32)
    total, num_tokens = torch.zeros(()), 0
    routers = torch.zeros(())
    batches = next(data)
    for batch in batches:
        seen = Routing()
        logits = model.logits(model(batch.input_ids, batch.position_ids, routing=seen))
        if cfg.optim.balance_coefficient > 0:
            assert len(batches) == 1, "written out for one microbatch only"
        tokens = batch.input_ids.shape[1]
        routers = cfg.optim.balance_coefficient * balance_loss(seen.load, seen.probability, tokens)
        routers = routers + cfg.optim.router_z_coefficient * router_z_loss(
            seen.squared_logsumexp, tokens
        )
        losses = torch.nn.functional.cross_entropy(logits, batch.targets, reduction="none")
        total = total + losses[batch.loss_places].sum()
        num_tokens += len(batch.loss_places)
    (total / num_tokens + routers).backward()
    with torch.no_grad():
        for parameter in model.parameters():
            assert parameter.grad is not None
            parameter.sub_(parameter.grad)
    return {name: weight.clone() for name, weight in named_weights(model)}


def test_a_balance_loss_by_microbatch_knows_only_its_own_load(world: World) -> None:
    cfg = config(world, *ROUTER_LOSSES, "optim.balance_scope=microbatch")
    alone, of_two = (run_on_ranks(ranks, one_update, cfg)[0] for ranks in (1, 2))
    expected = gradient_by_hand(cfg)
    gates = [name for name in expected if name.endswith("mlp.gate.weight")]
    for name in gates:
        torch.testing.assert_close(alone[name], expected[name], rtol=1e-5, atol=1e-6)
        assert float((of_two[name] - expected[name]).abs().max()) > 1e-3


def one_update(cfg: TrainConfig) -> dict[str, torch.Tensor]:
    tokenizer = load_tokenizer(cfg.model)
    data = SFTLoader(cfg.data, cfg.stage, tokenizer, cfg.seed)
    policy = build_policy(cfg.model, cfg.optim, cfg.parallel, STEPS, cfg.seed, "")
    policy.train_step(next(data), cross_entropy)
    return {name: weight.clone() for name, weight in policy.named_weights()}


# One microbatch a rank: the loads of the global batch are then all known to each of them.
ROUTER_LOSSES = [
    "data.max_tokens_per_microbatch=512",
    "optim.balance_coefficient=0.5",
    "optim.balance_scope=global_batch",
    "optim.router_z_coefficient=0.1",
]


@pytest.mark.parametrize("extra", [[], ROUTER_LOSSES], ids=["", "with router losses"])
def test_one_update_is_the_gradient_of_the_mean_over_all_tokens(
    extra: list[str], world: World
) -> None:
    cfg = config(world, "parallel.expert_parallel_size=2", *extra)
    expected = gradient_by_hand(cfg)
    for found in run_on_ranks(2, one_update, cfg):
        for name, weight in found.items():
            torch.testing.assert_close(weight, expected[name], rtol=1e-5, atol=1e-6, msg=name)
