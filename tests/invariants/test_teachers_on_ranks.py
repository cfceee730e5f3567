"""Teachers are the same and say the same on any number of ranks."""

import re
import shutil
from pathlib import Path

import pytest
import torch
import torch.distributed as dist

from marco_train.config import TrainConfig
from marco_train.config.opd import Objective
from marco_train.config.teacher import TeacherBackend
from marco_train.data.chat import load_tokenizer
from marco_train.data.loader import PromptLoader
from marco_train.data.packing import pack_rollouts
from marco_train.engine.policy import build_policy
from marco_train.errors import InputError
from marco_train.losses.distillation import build_reverse_kl
from marco_train.models import load_model
from marco_train.models.hf_io import save_model, stop_token_ids
from marco_train.models.weights import random_model
from marco_train.rollout.native import NativeSampler
from marco_train.teachers.build import build_teacher
from marco_train.teachers.identity import Identity
from marco_train.teachers.preflight import (
    compare_with_student,
)
from marco_train.types import (
    Prompt,
)
from tests.helpers.checkpoints import AN_EXPERT, another_template, changed, with_value
from tests.helpers.configs import GRADIENT_DESCENT, compose_config
from tests.helpers.models import architecture
from tests.helpers.preflight import Scripted, answers, figures
from tests.helpers.ranks import run_on_ranks
from tests.helpers.rollouts import rollouts
from tests.helpers.score_cache import cache, rollout
from tests.helpers.teachers import hf_teacher, opened, teacher_config, wanted_for, wanted_of
from tests.helpers.world import World

pytestmark = pytest.mark.slow


def score_in_our_model(
    path: str, ranks_of_experts: int, max_tokens: int, objective: Objective
) -> list[tuple[int, list[torch.Tensor]]]:
    """A rank's rollouts, of which the last rank has none: their numbers and scores."""
    cfg = teacher_config(
        path,
        TeacherBackend.native,
        max_tokens_per_batch=max_tokens,
        expert_parallel_size=ranks_of_experts,
    )
    teacher = build_teacher(cfg, wanted_for(objective))
    busy = max(1, dist.get_world_size() - 1)
    mine = rollouts()[dist.get_rank() :: busy] if dist.get_rank() < busy else []
    scored = teacher.score(mine)
    assert [s.rollout for s in scored] == mine
    return [(s.rollout.prompt.index, list(vars(s.scores).values())) for s in scored]


@pytest.mark.parametrize("objective", Objective, ids=lambda objective: objective.value)
@pytest.mark.parametrize(
    ("name", "ranks", "ranks_of_experts", "max_tokens"),
    [
        ("sft", 1, 1, 4096),
        ("sft", 2, 2, 1),
        ("sft", 4, 2, 40),
        ("sft", 4, 4, 40),
        ("teacher_second", 2, 1, 40),
    ],
)
def test_a_teacher_in_our_own_model_scores_as_transformers_does(
    name: str,
    ranks: int,
    ranks_of_experts: int,
    max_tokens: int,
    objective: Objective,
    world: World,
) -> None:
    path = world.path(name, "export")
    asked = rollouts()
    expected = hf_teacher(path, wanted_for(objective)).score(asked)
    wanted = {s.rollout.prompt.index: list(vars(s.scores).values()) for s in expected}
    found = run_on_ranks(ranks, score_in_our_model, path, ranks_of_experts, max_tokens, objective)
    seen = dict(pair for of_rank in found for pair in of_rank)
    assert seen.keys() == wanted.keys()
    for index, scores in seen.items():
        for score, other in zip(scores, wanted[index], strict=True):
            torch.testing.assert_close(score, other, rtol=1e-4, atol=1e-4)


def first_prompts(cfg: TrainConfig) -> tuple[list[Prompt], list[Prompt], list[Prompt]]:
    """A rank's share of the first eight, of the first batch of six, and of the first one again."""
    tokenizer = load_tokenizer(cfg.model)
    loader = PromptLoader(cfg.data, cfg.stage, tokenizer, cfg.seed)
    return loader.first(8), next(loader), loader.first(1)


def test_the_first_prompts_are_the_runs_and_move_nothing(world: World) -> None:
    cfg = compose_config("quickstart_opd", f"root={world.root}", "stage.global_batch_size=6")
    (eight, batch, again) = first_prompts(cfg)
    assert [prompt.index for prompt in eight] == list(range(8))
    assert batch == eight[:6] and again == eight[:1]
    shares = run_on_ranks(2, first_prompts, cfg)
    assert [share for share, _, _ in shares] == [eight[::2], eight[1::2]]


def distil_from_itself(cfg: TrainConfig) -> tuple[float, float]:
    """One update from a teacher that is the student: its KL, and how far weights moved."""
    tokenizer = load_tokenizer(cfg.model)
    prompts = next(PromptLoader(cfg.data, cfg.stage, tokenizer, cfg.seed))
    policy = build_policy(cfg.model, cfg.optim, cfg.parallel, 1, cfg.seed, "")
    path = str(cfg.model.path)
    sampler = NativeSampler(
        cfg.stage.rollout,
        load_model(path, torch.float32),
        stop_token_ids(path),
        cfg.stage.max_response_length,
        cfg.stage.num_sampler_topk,
        cfg.seed,
        weight_version=0,
    )
    teacher = hf_teacher(
        path, wanted_of(cfg.stage.objective, cfg.stage.top_k or 0, cfg.stage.top_k_source)
    )
    before = {name: weight.clone() for name, weight in policy.named_weights()}
    scored = teacher.score(list(sampler.sample(prompts, 2)))
    packed = pack_rollouts(scored, cfg.stage.objective, cfg.data.max_tokens_per_microbatch)
    metrics = policy.train_step(packed, build_reverse_kl(cfg.stage, teacher.head))
    moved = max(float((w - before[name]).abs().max()) for name, w in policy.named_weights())
    return metrics["kl/reverse"], moved


OBJECTIVES = {
    "sampled": [],
    "full": [],
    "topk": ["stage.top_k=4"],
    "topk of the teacher": ["stage.top_k=4", "stage.top_k_source=teacher"],
}


@pytest.mark.parametrize("objective", OBJECTIVES)
def test_a_student_that_is_its_own_teacher_learns_nothing(objective: str, world: World) -> None:
    cfg = compose_config(
        "quickstart_opd",
        f"root={world.root}",
        f"stage.objective={objective.split(' ', maxsplit=1)[0]}",
        *OBJECTIVES[objective],
        "stage.global_batch_size=6",
        "stage.max_response_length=8",
        "data.max_tokens_per_microbatch=128",
        *GRADIENT_DESCENT,
    )
    for kl, moved in run_on_ranks(2, distil_from_itself, cfg):
        assert abs(kl) < 1e-5
        assert moved < 1e-5


@pytest.fixture
def teacher_dir(world: World, tmp_path: Path) -> Path:
    """A mixture whose head is its own, with tokenizer and template."""
    model = random_model(architecture(tie_word_embeddings=False), torch.float32, seed=5)
    save_model(model, tmp_path / "teacher", Path(world.path("data", "tokenizer")))
    return tmp_path / "teacher"


def shared(backend: TeacherBackend, experts_over: int) -> dict[str, int]:
    """What says over how many ranks experts are shared, of a teacher that shares them."""
    return {"expert_parallel_size": experts_over} if backend is TeacherBackend.native else {}


def identity_on_a_rank(path: Path, backend: TeacherBackend, experts_over: int) -> Identity:
    return dict(opened(path, backend, **shared(backend, experts_over)).identity)


def test_every_rank_and_every_sharing_of_experts_is_one_teacher(teacher_dir: Path) -> None:
    for backend, layouts in (
        (TeacherBackend.native, [(1, 1), (2, 1), (2, 2), (4, 2), (4, 4)]),
        (TeacherBackend.hf, [(1, 1), (2, 1)]),
    ):
        found = [
            identity
            for num_ranks, experts_over in layouts
            for identity in run_on_ranks(
                num_ranks, identity_on_a_rank, teacher_dir, backend, experts_over
            )
        ]
        assert all(identity == found[0] for identity in found)


def refusal_on_a_rank(paths: list[Path], backend: TeacherBackend, experts_over: int) -> str:
    """A rank's own copy of a teacher, and why it is refused."""
    path = paths[dist.get_rank()]
    try:
        opened(path, backend, **shared(backend, experts_over))
    except InputError as error:
        return str(error)
    return "accepted"


@pytest.mark.parametrize(
    ("backend", "experts_over", "name"),
    [
        (TeacherBackend.hf, 1, "model.layers.1.mlp.experts.gate_up_proj"),
        (TeacherBackend.native, 1, AN_EXPERT),
        (TeacherBackend.native, 2, "model.norm.weight"),  # an expert is on one rank only
    ],
)
def test_ranks_with_different_teachers_all_refuse(
    backend: TeacherBackend, experts_over: int, name: str, teacher_dir: Path, tmp_path: Path
) -> None:
    paths = [teacher_dir, tmp_path / "other"]
    shutil.copytree(paths[0], paths[1])
    of_file = AN_EXPERT if experts_over == 1 else name
    changed(paths[1], with_value(of_file, 1e-3))
    for said in run_on_ranks(2, refusal_on_a_rank, paths, backend, experts_over):
        assert f"rank 1 holds other values than the ranks before it in 1 weights: {name};" in said

    changed(paths[1], with_value(of_file, float("nan")))
    for said in run_on_ranks(2, refusal_on_a_rank, paths, backend, experts_over):
        assert re.search("1 weights under .* hold values that are not finite in float32: ", said)
        assert f": {name};" in said

    shutil.rmtree(paths[1])
    shutil.copytree(paths[0], paths[1])
    another_template(paths[1])
    for said in run_on_ranks(2, refusal_on_a_rank, paths, backend, experts_over):
        assert "rank 1 read another template than rank 0; give every machine the same" in said


def score_unevenly(path: Path) -> tuple[list[list[int]], int]:
    """Rank 0 has a rollout that is on disk, rank 1 one that is not."""
    found, teacher = cache(path)
    found.score([rollout(dist.get_rank())])
    found.score([rollout(dist.get_rank())])
    return teacher.asked, teacher.num_calls


def test_every_rank_asks_its_teacher_where_one_has_to(tmp_path: Path) -> None:
    # A teacher whose experts are spread over ranks would else wait for the others for ever.
    first, _ = cache(tmp_path)
    first.score([rollout(0)])
    assert run_on_ranks(2, score_unevenly, tmp_path) == [([], 2), ([[1]], 2)]


def refusal_of_answers() -> str:
    """Of a teacher that is good on one rank's answers, of one token, and bad on the others."""
    mine = answers(-1.0)[:1] if dist.get_rank() == 0 else answers(-1.0)[1:]
    value = -1.0 if dist.get_rank() == 0 else -8.0
    try:
        compare_with_student(Scripted(lambda x, _: torch.full_like(x, value)), mine, 320, "t")
    except InputError as error:
        return str(error)
    return "accepted"


def test_the_figures_are_of_the_tokens_of_all_ranks() -> None:
    one, other = run_on_ranks(2, refusal_of_answers)
    assert one == other
    assert [len(r.response_ids) for r in rollouts()] == [1, 9, 4, 2, 12]
    assert figures(one)[0] == pytest.approx((-1.0 - 27 * 8.0) / 28, abs=0.006)
