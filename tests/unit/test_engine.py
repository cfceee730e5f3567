"""Schedules, parameter groups and the DeepSpeed dictionary."""

import pytest
import torch

from marco_train.config.model import DType
from marco_train.config.optim import BalanceScope, OptimConfig, Schedule
from marco_train.config.parallel import ParallelConfig
from marco_train.engine.expert_groups import mark_experts
from marco_train.engine.optim import build_schedule, parameter_groups
from marco_train.engine.zero import deepspeed_config
from marco_train.models.weights import random_model
from tests.helpers.models import architecture


def optim(**changes: object) -> OptimConfig:
    fields: dict[str, object] = {
        "learning_rate": 1e-5,
        "min_learning_rate": 1e-6,
        "schedule": Schedule.cosine,
        "warmup_steps": 10,
        "beta1": 0.9,
        "beta2": 0.95,
        "eps": 1e-8,
        "weight_decay": 0.1,
        "clip_norm": 0.5,
        "balance_coefficient": 0.0,
        "balance_scope": BalanceScope.global_batch,
        "router_z_coefficient": 0.0,
    }
    return OptimConfig(**(fields | changes))  # type: ignore[arg-type]


def test_the_cosine_rises_then_falls_to_its_minimum_at_the_last_update() -> None:
    rate = build_schedule(optim(), num_steps=111)
    assert rate(0) == pytest.approx(1e-6)
    assert rate(4) == pytest.approx(5e-6)
    assert rate(9) == rate(10) == pytest.approx(1e-5)
    assert rate(60) == pytest.approx((1e-5 + 1e-6) / 2)  # half way
    assert rate(110) == pytest.approx(1e-6)
    assert all(rate(s) >= rate(s + 1) for s in range(10, 110))


def test_the_constant_schedule_stays_at_its_peak() -> None:
    rate = build_schedule(
        optim(schedule=Schedule.constant, min_learning_rate=1e-5, warmup_steps=0), num_steps=5
    )
    assert [rate(step) for step in range(6)] == [1e-5] * 6


def test_matrices_are_decayed_and_norms_are_not() -> None:
    model = random_model(architecture(), torch.float32, seed=0)
    matrices, norms = parameter_groups(model, weight_decay=0.1, expert_parallel_size=1)
    assert matrices["weight_decay"] == 0.1
    assert norms["weight_decay"] == 0.0
    assert {p.dim() for p in norms["params"]} == {1}
    assert {p.dim() for p in matrices["params"]} == {2, 3}
    assert len(matrices["params"]) + len(norms["params"]) == len(list(model.parameters()))


def test_marked_experts_have_a_group_of_their_own_and_compute_the_same() -> None:
    model = random_model(architecture(), torch.float32, seed=0)
    ids, positions = torch.arange(9)[None], torch.arange(9)[None]
    before = model(ids, positions)
    mark_experts(model, expert_parallel_size=2)
    assert torch.equal(model(ids, positions), before)
    groups = parameter_groups(model, weight_decay=0.1, expert_parallel_size=2)
    assert [group["name"] for group in groups] == ["matrices", "norms", "ep_size_2"]
    experts = groups[2]
    assert experts["moe"] is True
    assert len(experts["params"]) == 4  # two matrices in each of two layers
    assert sum(len(group["params"]) for group in groups) == len(list(model.parameters()))


def test_the_whole_deepspeed_dictionary() -> None:
    parallel = ParallelConfig(expert_parallel_size=2, zero_stage=2)
    assert deepspeed_config(optim(), parallel, DType.bfloat16) == {
        "train_micro_batch_size_per_gpu": 1,
        "gradient_accumulation_steps": 1,
        "managed_gradient_accumulation": False,
        "gradient_clipping": 0.5,
        "prescale_gradients": False,
        "gradient_predivide_factor": 1.0,
        "zero_allow_untested_optimizer": False,
        "zero_optimization": {
            "stage": 2,
            "reduce_scatter": True,
            "contiguous_gradients": True,
            "overlap_comm": False,
            "round_robin_gradients": False,
            "reduce_bucket_size": 33_554_432,
            "allgather_bucket_size": 33_554_432,
        },
        "fp16": {"enabled": False},
        "bf16": {"enabled": True, "immediate_grad_update": True},
        "data_types": {"grad_accum_dtype": "fp32"},
        "communication_data_type": "fp32",
        "steps_per_print": 2**31,
        "wall_clock_breakdown": False,
        "dump_state": False,
    }
