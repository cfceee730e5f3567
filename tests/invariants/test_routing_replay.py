"""The policy's forward pass takes the experts that it is given."""

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import load_file
from torch import Tensor

from marco_train.config import TrainConfig
from marco_train.data.chat import load_tokenizer
from marco_train.data.loader import SFTLoader
from marco_train.engine.policy import Policy, build_policy
from marco_train.losses.cross_entropy import cross_entropy
from marco_train.metrics import check_names
from marco_train.models import Qwen3Moe, load_model
from marco_train.models.attention import PackedSequences
from marco_train.models.qwen3_moe import DecoderLayer, rotary_angles
from marco_train.models.routing import LayerRouting, Router, Routing
from marco_train.models.weights import empty_model, named_weights
from marco_train.rollout import build as rollout_build
from marco_train.stages.opd import run_opd
from marco_train.types import Microbatch
from tests.helpers.configs import GRADIENT_DESCENT, compose_config
from tests.helpers.models import sparse_mlps
from tests.helpers.ranks import run_on_ranks
from tests.helpers.world import World

pytestmark = pytest.mark.slow

Outcome = tuple[dict[str, Tensor], dict[str, float]]
NUM_EXPERTS = 8


def config(world: World, *overrides: str) -> TrainConfig:
    return compose_config(
        "quickstart_sft",
        f"root={world.root}",
        "stage.global_batch_size=5",
        "stage.max_length=64",
        "data.max_tokens_per_microbatch=512",  # one microbatch: every load is known at once
        "parallel.expert_parallel_size=1",
        *GRADIENT_DESCENT,
        *overrides,
    )


ROUTER_LOSSES = ["optim.balance_coefficient=0.5", "optim.router_z_coefficient=0.1"]


def own_choice(policy: Policy, batch: Microbatch) -> Tensor:
    """What the routers choose of themselves, [L, T, K]."""
    seen = Routing()
    with torch.no_grad():
        policy.model(batch.input_ids, batch.position_ids, routing=seen)
    return seen.expert_ids


def foreign_choice(batch: Microbatch) -> Tensor:
    """Two experts of each layer that depend on token and place alone, [2, T, 2]."""
    token, place = batch.input_ids[0], batch.position_ids[0]
    first = torch.stack([(3 * token + layer) % NUM_EXPERTS for layer in range(2)])
    return torch.stack([first, (first + 1 + place % (NUM_EXPERTS - 1)) % NUM_EXPERTS], -1)


def update(cfg: TrainConfig, replay: str) -> Outcome:
    """Make one update of plain gradient descent; the weights and what was measured."""
    tokenizer = load_tokenizer(cfg.model)
    data = SFTLoader(cfg.data, cfg.stage, tokenizer, cfg.seed)
    policy = build_policy(cfg.model, cfg.optim, cfg.parallel, 1, cfg.seed, "")
    batches = list(next(data))
    for number, batch in enumerate(batches):
        own = own_choice(policy, batch)  # every rank takes part
        if batch.num_tokens == 0 or replay == "none":
            continue
        chosen = own if replay == "own" else foreign_choice(batch)
        batches[number] = replace(batch, routed_experts=chosen)
    measured = policy.measure(batches, cross_entropy)
    metrics = policy.train_step(batches, cross_entropy)
    assert metrics["loss/cross_entropy"] == pytest.approx(measured["loss/cross_entropy"], rel=1e-6)
    check_names(metrics)
    return {name: weight.clone() for name, weight in policy.named_weights()}, metrics


def without_mismatch(metrics: dict[str, float]) -> tuple[dict[str, float], dict[str, float]]:
    """The other metrics, and those of the mismatch."""
    mismatch = {k: v for k, v in metrics.items() if k.startswith("moe/replay_mismatch")}
    return {k: v for k, v in metrics.items() if k not in mismatch}, mismatch


@pytest.mark.parametrize("extra", [[], ROUTER_LOSSES], ids=["", "with router losses"])
def test_replaying_the_policys_own_choice_changes_nothing(extra: list[str], world: World) -> None:
    cfg = config(world, *extra)
    ((weights, metrics),) = run_on_ranks(1, update, cfg, "own")
    ((wanted_weights, wanted_metrics),) = run_on_ranks(1, update, cfg, "none")
    metrics, mismatch = without_mismatch(metrics)
    assert mismatch == {f"moe/replay_mismatch{x}": 0.0 for x in ("", "/layer_0", "/layer_1")}
    assert metrics == pytest.approx(wanted_metrics, rel=1e-6)
    for name, weight in weights.items():  # the step is the gradient
        torch.testing.assert_close(weight, wanted_weights[name], rtol=1e-6, atol=1e-6, msg=name)


def forward_token_by_token(model: Qwen3Moe, batch: Microbatch) -> tuple[Tensor, Tensor]:
    """Logits [T, V] where every token takes the experts given, and foreign pairs of layers [L]."""
    ids, positions, given = batch.input_ids, batch.position_ids, batch.routed_experts
    cfg = model.architecture
    attend, rope = (
        PackedSequences(positions),
        rotary_angles(positions, cfg.head_dim, cfg.rope_theta),
    )
    hidden = model.model.embed_tokens(ids[0])
    foreign = torch.zeros(cfg.num_hidden_layers)
    layers = [module for module in model.modules() if isinstance(module, DecoderLayer)]
    for number, (layer, mlp) in enumerate(zip(layers, sparse_mlps(model), strict=True)):
        hidden = hidden + layer.self_attn(layer.input_layernorm(hidden), rope, attend)
        rows = []
        for token, x in enumerate(layer.post_attention_layernorm(hidden)):
            p = (mlp.gate.weight @ x).softmax(0)
            taken = given[number, token].tolist()
            own = sorted(range(NUM_EXPERTS), key=(-p).tolist().__getitem__)[: len(taken)]
            foreign[number] += len(set(taken) - set(own))
            row = torch.zeros_like(x)
            for expert in taken:
                gate, up = (mlp.experts.gate_up_proj[expert] @ x).chunk(2)
                out = mlp.experts.down_proj[expert] @ (F.silu(gate) * up)
                row = row + p[expert] / sum(p[e] for e in taken) * out
            rows.append(row)
        hidden = hidden + torch.stack(rows)
    return model.logits(model.model.norm(hidden)), foreign


def update_token_by_token(cfg: TrainConfig) -> Outcome:
    tokenizer = load_tokenizer(cfg.model)
    (batch,) = next(SFTLoader(cfg.data, cfg.stage, tokenizer, cfg.seed))
    model = load_model(str(cfg.model.path), torch.float32)
    batch = replace(batch, routed_experts=foreign_choice(batch))
    logits, foreign = forward_token_by_token(model, batch)
    losses = F.cross_entropy(logits, batch.targets, reduction="none")
    loss = losses[batch.loss_places].sum() / batch.num_loss_tokens
    loss.backward()
    with torch.no_grad():
        for parameter in model.parameters():
            assert parameter.grad is not None
            parameter.sub_(parameter.grad)
    shares = (foreign / (2 * batch.num_tokens)).tolist()
    metrics = {"loss/cross_entropy": loss.item(), "moe/replay_mismatch": sum(shares) / 2}
    metrics |= {f"moe/replay_mismatch/layer_{n}": share for n, share in enumerate(shares)}
    return {name: weight.clone() for name, weight in named_weights(model)}, metrics


@pytest.fixture(scope="module")
def by_hand(world: World) -> Outcome:
    return update_token_by_token(config(world))


SPREAD: dict[str, tuple[int, list[str]]] = {
    "one rank": (1, []),
    "one rank, layers computed again": (1, ["parallel.recompute=layer"]),
    "one rank, small microbatches": (1, ["data.max_tokens_per_microbatch=64"]),
    "two ranks": (2, []),
    "two ranks, experts over two": (2, ["parallel.expert_parallel_size=2"]),
    "two ranks, a crossing for each expert": (
        2,
        ["parallel.expert_parallel_size=2", "parallel.dispatch=all_to_all"],
    ),
}


@pytest.mark.parametrize(("num_ranks", "extra"), SPREAD.values(), ids=SPREAD.keys())
def test_given_experts_are_taken_on_any_number_of_ranks(
    num_ranks: int, extra: list[str], world: World, by_hand: Outcome
) -> None:
    wanted_weights, wanted = by_hand
    assert wanted["moe/replay_mismatch"] > 0.5
    for weights, metrics in run_on_ranks(num_ranks, update, config(world, *extra), "foreign"):
        assert {name: metrics[name] for name in wanted} == pytest.approx(wanted, rel=1e-5)
        for name, weight in weights.items():
            torch.testing.assert_close(weight, wanted_weights[name], rtol=1e-5, atol=1e-5, msg=name)


def test_the_routers_would_have_learnt_something_else(world: World, by_hand: Outcome) -> None:
    ((weights, metrics),) = run_on_ranks(1, update, config(world), "none")
    assert abs(metrics["loss/cross_entropy"] - by_hand[1]["loss/cross_entropy"]) > 1e-3
    assert max(float((weights[name] - w).abs().max()) for name, w in by_hand[0].items()) > 1e-3


def test_a_rank_without_a_sequence_joins_a_replayed_update(world: World) -> None:
    single = config(world, "stage.global_batch_size=1")
    ((wanted_weights, wanted),) = run_on_ranks(1, update, single, "foreign")
    over_two = config(world, "stage.global_batch_size=1", "parallel.expert_parallel_size=2")
    for weights, metrics in run_on_ranks(2, update, over_two, "foreign"):
        assert metrics == pytest.approx(wanted, rel=1e-5, abs=1e-6)
        for name, weight in weights.items():
            torch.testing.assert_close(weight, wanted_weights[name], rtol=1e-5, atol=1e-5, msg=name)


def distil(
    world: World, out: Path, num_ranks: int, *more: str
) -> tuple[list[dict[str, float]], dict[str, Tensor]]:
    """A short run of on-policy distillation: what its steps measured, and what it exports."""
    cfg = compose_config(
        "quickstart_opd",
        f"root={world.root}",
        f"output_dir={out}",
        "stage.global_batch_size=5",  # uneven over two ranks
        "stage.max_response_length=8",
        "stage.cascade.first.num_steps=3",
        "stage.cascade.first.early_switch.measure_every=2",
        "stage.cascade.second.num_steps=1",
        "data.max_tokens_per_microbatch=128",
        "optim.warmup_steps=0",
        f"parallel.expert_parallel_size={num_ranks}",
        *more,
    )
    run_on_ranks(num_ranks, run_opd, cfg)
    lines = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
    steps = [
        {
            k: v
            for k, v in line.items()
            if not k.startswith(("time/", "perf/", "memory/", "rollout/sync"))
        }
        for line in lines
    ]
    return steps, load_file(out / "export" / "model.safetensors")


@pytest.mark.long
@pytest.mark.parametrize("num_ranks", [1, 2])
@pytest.mark.parametrize("objective", ["full", "sampled"])
def test_in_float32_a_replayed_run_is_the_run_without_replay(
    objective: str, num_ranks: int, world: World, tmp_path: Path
) -> None:
    asked = f"stage.objective={objective}"
    plain, wanted = distil(world, tmp_path / "plain", num_ranks, asked)
    replayed, weights = distil(
        world, tmp_path / "replayed", num_ranks, asked, "stage.rollout.replay_routing=true"
    )
    assert len(plain) == 4 and not any("moe/replay_mismatch" in step for step in plain)
    for step, expected in zip(replayed, plain, strict=True):
        metrics, mismatch = without_mismatch(step)
        assert mismatch == {f"moe/replay_mismatch{x}": 0.0 for x in ("", "/layer_0", "/layer_1")}
        assert metrics == pytest.approx(expected, rel=1e-6, abs=1e-7)
    for name, weight in weights.items():
        torch.testing.assert_close(weight, wanted[name], rtol=1e-6, atol=1e-6, msg=name)


class ContraryRouter(Router):
    """Takes the unlikeliest experts, as a sampler that rounds otherwise takes unlikelier ones."""

    def forward(
        self, hidden: Tensor, given: Tensor | None, observe: bool
    ) -> tuple[Tensor, Tensor, LayerRouting | None]:
        assert given is None
        return super().forward(hidden, (-hidden @ self.weight.T).topk(self.top_k).indices, observe)


def contrary_model(*shape: Any, **more: Any) -> Qwen3Moe:
    model = empty_model(*shape, **more)
    for mlp in sparse_mlps(model):
        mlp.gate.__class__ = ContraryRouter
    return model


@pytest.mark.long
def test_the_policy_follows_a_sampler_that_chooses_other_experts(
    world: World, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(rollout_build, "empty_model", contrary_model)
    lenient = "stage.rollout.canary_tolerance=10"
    plain, _ = distil(world, tmp_path / "plain", 1, lenient, "stage.max_sampler_mismatch=null")
    replay = "stage.rollout.replay_routing=true"
    for num_ranks in (1, 2):
        replayed, _ = distil(world, tmp_path / str(num_ranks), num_ranks, lenient, replay)
        for step, without in zip(replayed, plain, strict=True):
            assert step["kl/sampler_mismatch"] < 1e-5
            assert without["kl/sampler_mismatch"] > 0.1
            assert step["moe/replay_mismatch"] > 0.9
