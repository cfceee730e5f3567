"""vLLM in this process as a teacher: numbers as transformers gives them, a trainer left alone."""

import os
import random
import re
from dataclasses import replace
from pathlib import Path
from typing import Any
from unittest import mock

import numpy as np
import pytest
import torch
import torch.distributed as dist
from safetensors.torch import load_file, save_file
from torch import Tensor

from marco_train.config.model import DType
from marco_train.config.opd import Objective, TopKSource
from marco_train.config.teacher import TeacherBackend
from marco_train.errors import InputError
from marco_train.inference.engine import VLLMEngine
from marco_train.models.agreement import same_answer
from marco_train.models.hf_io import save_model
from marco_train.models.weights import random_model
from marco_train.teachers.build import build_teacher
from marco_train.teachers.preflight import check_scores, probe_rollouts
from marco_train.types import Rollout
from tests.helpers.models import DENSE, architecture
from tests.helpers.ranks import Rank, run_on_ranks
from tests.helpers.rollouts import rollouts
from tests.helpers.teachers import teacher_config, wanted_of
from tests.helpers.world import World

pytestmark = pytest.mark.vllm

FLOAT32 = same_answer(DType.float32, num_layers=2)
KINDS = [
    (Objective.sampled, 0, TopKSource.sampler),
    (Objective.topk, 5, TopKSource.sampler),
    (Objective.topk, 5, TopKSource.teacher),
    (Objective.full, 0, TopKSource.sampler),
]
SHAPES = {"dense": DENSE, "mixture": {}}


@pytest.fixture(scope="module")
def teachers(world: World, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Models whose heads are as wide as vLLM's kernels for CPUs need them."""
    found = tmp_path_factory.mktemp("teachers")
    for seed, (name, changes) in enumerate(SHAPES.items()):
        model = random_model(architecture(head_dim=32, **changes), torch.float32, seed)
        save_model(model, found / name, world.path("data", "tokenizer"))
    return found


def scores_of(backend: TeacherBackend, path: str, stop_id: int | None) -> list[list[Tensor]]:
    """Scores of each kind, and of the probe sentences."""
    found = []
    for kind in KINDS:
        wanted = wanted_of(*kind)
        teacher = build_teacher(teacher_config(path, backend, stop_id=stop_id), wanted)
        scored = teacher.score([*rollouts(), ended()])
        found += [[v.float() for v in vars(s.scores).values()] for s in scored]
        check_scores(teacher, probe_rollouts(path, wanted), 320, FLOAT32, "teacher")
        teacher.close()
    return found


def ended() -> Rollout:
    """A rollout that ends with the student's stop token."""
    first = rollouts()[1]
    return replace(first, response_ids=[*first.response_ids[:-1], 2])


@pytest.mark.parametrize(
    ("name", "stop_id"),
    [("dense", 0), ("mixture", None)],
)
@pytest.mark.long
def test_the_scores_are_those_of_transformers(
    name: str, stop_id: int | None, teachers: Path, rank: Rank
) -> None:
    path = f"{teachers}/{name}"
    ours = rank.call(scores_of, TeacherBackend.vllm, path, stop_id)
    theirs = rank.call(scores_of, TeacherBackend.hf, path, stop_id)
    assert len(ours) == len(theirs) == 4 * 6
    for found, expected in zip(ours, theirs, strict=True):
        for one, other in zip(found, expected, strict=True):
            torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-4)


def numpy_state() -> list[int]:
    """The words of numpy's generator."""
    state: list[int] = np.random.get_state(legacy=False)["state"]["key"].tolist()
    return state


def environment() -> dict[str, str]:
    """The variables of this process but those that torch's own compiler sets at its first use."""
    return {name: value for name, value in os.environ.items() if "TORCHINDUCTOR" not in name}


def one_after_another(path: str) -> list[float]:
    """What a teacher says before and after another engine of this process was closed."""
    asked, wanted = rollouts(), wanted_of(Objective.sampled)
    cfg = teacher_config(path, TeacherBackend.vllm)
    first, second = build_teacher(cfg, wanted_of(*KINDS[1])), build_teacher(cfg, wanted)
    first.score(asked[: dist.get_rank() + 1])  # ranks need not do the same
    before = second.score(asked)
    first.close()
    after = second.score(asked)
    third = build_teacher(cfg, wanted)
    second.close()
    last = third.score(asked)
    third.close()
    fresh = build_teacher(cfg, wanted)
    newest = fresh.score(asked)
    fresh.close()
    return [
        float((vars(s.scores)["teacher_logprobs"] - vars(o.scores)["teacher_logprobs"]).abs().max())
        for found in (after, last, newest)
        for s, o in zip(found, before, strict=True)
    ]


def use_engines(path: str) -> tuple[list[str], list[float]]:
    """What building, using and closing engines changes of the process, and of what they say."""
    os.environ["LOCAL_WORLD_SIZE"] = str(dist.get_world_size())
    random.seed(1)
    np.random.seed(2)
    torch.manual_seed(3)
    threads = torch.get_num_threads()
    before = environment()
    states = random.getstate(), numpy_state(), torch.get_rng_state()
    differences = one_after_another(path)
    changed = []
    if environment() != before:
        changed.append("environment")
    if random.getstate() != states[0] or numpy_state() != states[1]:
        changed.append("generators")
    if not torch.equal(torch.get_rng_state(), states[2]):
        changed.append("torch's generator")
    torch.set_num_threads(threads + 1)
    if torch.get_num_threads() != threads + 1:
        changed.append("threads")
    total = torch.ones(1)
    dist.all_reduce(total)
    if total != dist.get_world_size():
        changed.append("process group")
    return changed, differences


@pytest.fixture(scope="module")
def used(teachers: Path) -> list[tuple[list[str], list[float]]]:
    """What each of two ranks found after it used engines."""
    return run_on_ranks(2, use_engines, f"{teachers}/dense")


@pytest.mark.long
def test_the_trainer_is_left_alone_on_two_ranks(used: list[tuple[list[str], list[float]]]) -> None:
    assert [changed for changed, _ in used] == [[], []]


def test_closing_an_engine_leaves_the_others_at_work(
    used: list[tuple[list[str], list[float]]],
) -> None:
    for _, differences in used:
        assert max(differences) < 1e-5


# Of what shape, what is absent, and what the refusal names. Of the first two vLLM says nothing.
ABSENT = {
    "an expert": ({}, "layers.1.mlp.experts.2.", r"1\.mlp\.experts\.\S+w13_weight, .*w2_weight;"),
    "queries": (DENSE, "layers.1.self_attn.q_proj", r"1 weights .*layers\.1\.\S+qkv_proj\.weight;"),
    "a norm": (DENSE, "layers.1.input_layernorm", r"vLLM cannot load .*layers\.1\.input_layernorm"),
}


def refusal(path: str, kind: tuple[Any, ...]) -> str:
    try:
        build_teacher(teacher_config(path, TeacherBackend.vllm), wanted_of(*kind))
    except InputError as error:
        return str(error)
    return "accepted"


@pytest.mark.parametrize("kind", [KINDS[0], KINDS[3]], ids=["sampled", "full"])
@pytest.mark.parametrize(("shape", "absent", "names"), ABSENT.values(), ids=ABSENT.keys())
def test_a_model_that_did_not_arrive_whole_is_refused(
    shape: dict[str, Any],
    absent: str,
    names: str,
    kind: tuple[Any, ...],
    tmp_path: Path,
    rank: Rank,
) -> None:
    model = random_model(architecture(head_dim=32, **shape), torch.float32, seed=0)
    save_model(model, tmp_path / "teacher")
    file = tmp_path / "teacher" / "model.safetensors"
    kept = {name: w for name, w in load_file(file).items() if absent not in name}
    save_file(kept, file, metadata={"format": "pt"})
    said = rank.call(refusal, str(tmp_path / "teacher"), kind)
    assert re.search(names, said), said


def largest_rounding(path: str) -> float:
    """How far differences of neighbouring log-probabilities are from whole eighths, at most."""
    engine = VLLMEngine(
        path, "bfloat16", max_length=16, max_tokens_per_batch=64, kv_cache_bytes=2**26
    )
    ((_, logprobs),) = engine.token_logprobs([list(range(3, 11))], num_topk=4)
    engine.close()
    eighths = 8 * logprobs[:, 1:].diff()
    return float((eighths - eighths.round()).abs().max())


@pytest.mark.long
def test_logits_of_a_bfloat16_model_are_not_rounded(
    world: World, tmp_path: Path, rank: Rank
) -> None:
    model = random_model(architecture(head_dim=32, **DENSE), torch.bfloat16, 0)
    with torch.no_grad():
        model.head.mul_(512)  # rounded logits above 16 would be whole eighths
    save_model(model, tmp_path / "model", world.path("data", "tokenizer"))
    assert rank.call(largest_rounding, str(tmp_path / "model")) > 0.1


def check_engine_on_a_gpu() -> None:
    llm = mock.MagicMock()
    cuda: dict[str, Any] = {"is_available": lambda: True, "get_rng_state_all": list}
    with (
        mock.patch("vllm.LLM", llm),
        mock.patch.multiple(torch.cuda, **cuda),
    ):
        engine = VLLMEngine("model", "bfloat16", 64, 64, 2**20, with_weights=False)
        options = llm.call_args.kwargs
        assert options["enable_sleep_mode"] and not options["enforce_eager"]
        assert options["enable_chunked_prefill"]
        assert engine.sleep()
        engine.load_weights([])
    names = [name for name, *_ in llm.return_value.method_calls]
    assert names == ["sleep", "wake_up", "apply_model", "wake_up", "reset_prefix_cache"]
    # Weights are in place before the keys take their memory.
    wakes = [call.kwargs["tags"] for call in llm.return_value.wake_up.call_args_list]
    assert wakes == [["weights"], ["kv_cache"]]


def test_an_engine_on_a_gpu_compiles_and_sleeps_until_weights_come(rank: Rank) -> None:
    rank.call(check_engine_on_a_gpu)
