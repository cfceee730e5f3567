"""The quickstart's distillation with vLLM as sampler and as both teachers, cut short."""

import importlib.util
import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from marco_train.models.hf_io import save_model
from marco_train.models.weights import random_model
from marco_train.stages.opd import run_opd
from tests.conftest import DENSE, World, architecture, compose_config
from tests.helpers.ranks import run_on_ranks

pytestmark = pytest.mark.skipif(
    importlib.util.find_spec("vllm") is None, reason="vLLM is not installed"
)

WIDE = {"head_dim": 32, "moe_intermediate_size": 32}  # what vLLM's kernels for CPUs take


@pytest.fixture(scope="module")
def root(world: World, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The world with models that vLLM runs."""
    found = tmp_path_factory.mktemp("wide")
    shutil.copytree(world.path("data"), found / "data")
    shapes = {"sft": WIDE, "teacher_first": WIDE | DENSE, "teacher_second": WIDE | DENSE}
    for seed, (name, changes) in enumerate(shapes.items()):
        model = random_model(architecture(**changes), torch.float32, seed)
        save_model(model, found / name / "export", found / "data" / "tokenizer")
    return found


IN_PROCESS = [
    "rollout@stage.rollout=vllm",
    "stage.rollout.kv_cache_gib=0.0625",
    "stage.rollout.max_tokens_per_batch=512",
]
TEACHERS = [
    override
    for teacher in ("stage.cascade.first.teacher", "stage.cascade.second.teacher")
    for override in (
        f"teacher@{teacher}=vllm",
        f"{teacher}.dtype=float32",
        f"{teacher}.kv_cache_gib=0.0625",
        f"{teacher}.max_tokens_per_batch=512",
    )
]


def distil(root: Path, out: Path, num_ranks: int, *overrides: str) -> list[dict[str, Any]]:
    """Make three steps, the last with the second teacher; what each measured."""
    cfg = compose_config(
        "quickstart_opd",
        f"root={root}",
        f"output_dir={out}",
        "stage.global_batch_size=6",
        "stage.max_response_length=8",
        "stage.cascade.first.num_steps=2",
        "stage.cascade.second.num_steps=1",
        "data.max_tokens_per_microbatch=128",
        f"parallel.expert_parallel_size={num_ranks}",
        "optim.warmup_steps=0",
        *overrides,
    )
    run_on_ranks(num_ranks, run_opd, cfg)
    lines = (out / "metrics.jsonl").read_text().splitlines()
    return [json.loads(line) for line in lines]


def test_two_ranks_distil_with_vllm_as_one_does(root: Path, tmp_path: Path) -> None:
    # The second teacher is opened while the first and the sampler hold engines.
    one, two = (distil(root, tmp_path / str(n), n, *IN_PROCESS, *TEACHERS) for n in (1, 2))
    assert [step["cascade/phase"] for step in one] == [0, 0, 1]
    for alone, shared in zip(one, two, strict=True):
        for step in (alone, shared):
            assert step["kl/sampler_mismatch"] < 1e-5  # vLLM's log-probabilities are the policy's
            assert step["rollout/sync_gib_per_s"] > 0
        for name in ("rollout/response_length", "data/num_tokens"):
            assert alone[name] == shared[name]
        for name in ("kl/reverse", "optim/grad_norm", "loss/entropy"):
            assert alone[name] == pytest.approx(shared[name], rel=1e-4)
    weights = [load_file(tmp_path / str(n) / "export" / "model.safetensors") for n in (1, 2)]
    for name, weight in weights[0].items():
        torch.testing.assert_close(weights[1][name], weight, rtol=1e-3, atol=1e-4, msg=name)
