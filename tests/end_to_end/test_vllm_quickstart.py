"""The quickstart's distillation with vLLM as sampler and as both teachers, cut short."""

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from tests.helpers.vllm_runs import IN_PROCESS, distil
from tests.helpers.world import World

pytestmark = pytest.mark.vllm


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


@pytest.mark.long
def test_two_ranks_distil_with_vllm_as_one_does(wide_world: World, tmp_path: Path) -> None:
    # The second teacher is opened while the first and the sampler hold engines.
    one, two = (distil(wide_world, tmp_path / str(n), n, *IN_PROCESS, *TEACHERS) for n in (1, 2))
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
