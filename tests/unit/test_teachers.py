"""The teacher scores the tokens it is asked about, and changes where the cascade says."""

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from transformers import AutoModelForCausalLM

from marco_train.config import TrainConfig
from marco_train.config.opd import Objective, TopKSource
from marco_train.config.teacher import HFTeacherConfig, TeacherBackend
from marco_train.data.chat import load_tokenizer
from marco_train.data.loader import PromptLoader
from marco_train.data.packing import pack_rollouts
from marco_train.engine.policy import build_policy
from marco_train.errors import InputError
from marco_train.losses.distillation import build_reverse_kl
from marco_train.models import load_model
from marco_train.models.hf_io import stop_token_ids
from marco_train.rollout.native import NativeSampler
from marco_train.teachers import cascade
from marco_train.teachers.base import ScoreSpec, Teacher
from marco_train.teachers.build import build_teacher
from marco_train.teachers.cascade import Cascade
from marco_train.teachers.hf import HFTeacher
from marco_train.teachers.routed import RoutedTeacher
from marco_train.types import (
    HiddenScores,
    Prompt,
    Rollout,
    ScoredRollout,
    TokenScores,
    TopKScores,
)
from tests.helpers.configs import GRADIENT_DESCENT, compose_config
from tests.helpers.ranks import run_on_ranks
from tests.helpers.rollouts import rollouts
from tests.helpers.teachers import hf_teacher, teacher_config, wanted_of
from tests.helpers.tokenizers import TEMPLATE
from tests.helpers.world import CATEGORIES, World


def wanted_for(objective: Objective) -> ScoreSpec:
    return wanted_of(objective, top_k=5 if objective is Objective.topk else 0)


@pytest.mark.parametrize("max_tokens", [1, 40, 4096])
@pytest.mark.parametrize("name", ["teacher_first", "teacher_second", "sft"])
def test_the_scores_are_those_of_each_sequence_alone(
    name: str, max_tokens: int, world: World
) -> None:
    path = world.path(name, "export")
    model = AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32)
    by_token = hf_teacher(path, wanted_for(Objective.sampled), max_tokens_per_batch=max_tokens)
    by_state = hf_teacher(path, wanted_for(Objective.full), max_tokens_per_batch=max_tokens)
    by_policy = hf_teacher(path, wanted_for(Objective.topk), max_tokens_per_batch=max_tokens)
    by_itself = hf_teacher(
        path, wanted_of(Objective.topk, 5, TopKSource.teacher), max_tokens_per_batch=max_tokens
    )
    asked = rollouts()
    tokens, states = by_token.score(asked), by_state.score(asked)
    of_policy, of_teacher = by_policy.score(asked), by_itself.score(asked)
    for rollout, token_scored, state_scored, policy_scored, itself_scored in zip(
        asked, tokens, states, of_policy, of_teacher, strict=True
    ):
        with torch.no_grad():
            logits = model(torch.tensor([rollout.input_ids])).logits[0]
        first = len(rollout.prompt.input_ids) - 1
        wanted = logits[first:-1].log_softmax(-1)
        assert token_scored.rollout is state_scored.rollout is rollout
        assert isinstance(token_scored.scores, TokenScores)
        assert isinstance(state_scored.scores, HiddenScores)
        places = torch.arange(len(rollout.response_ids))
        torch.testing.assert_close(
            token_scored.scores.teacher_logprobs,
            wanted[places, torch.tensor(rollout.response_ids)],
            rtol=1e-4,
            atol=1e-4,
        )
        found = (state_scored.scores.teacher_hidden @ by_state.head.T).log_softmax(-1)
        torch.testing.assert_close(found, wanted, rtol=1e-4, atol=1e-4)
        assert isinstance(policy_scored.scores, TopKScores)
        assert isinstance(itself_scored.scores, TopKScores)
        assert policy_scored.scores.topk_ids.tolist() == rollout.topk_ids
        assert torch.equal(itself_scored.scores.topk_ids, wanted.topk(5).indices)
        for scores in (policy_scored.scores, itself_scored.scores):
            torch.testing.assert_close(
                scores.teacher_topk_logprobs,
                wanted.gather(1, scores.topk_ids),
                rtol=1e-4,
                atol=1e-4,
            )


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


def test_no_rollouts_are_no_scores(world: World) -> None:
    teacher = hf_teacher(world.path("teacher_first", "export"), wanted_for(Objective.full))
    assert teacher.score([]) == []


def test_a_head_that_is_not_the_whole_story_is_refused(
    world: World, monkeypatch: pytest.MonkeyPatch
) -> None:
    plain = HFTeacher._hidden
    monkeypatch.setattr(HFTeacher, "_hidden", lambda *args: plain(*args) * 1.1)
    with pytest.raises(InputError, match="hidden states times head differ"):
        hf_teacher(world.path("teacher_first", "export"), wanted_for(Objective.full))


def width_of(teacher: Teacher) -> int:
    assert teacher.head is not None
    return teacher.head.shape[1]


def test_the_cascade_changes_teacher_at_exactly_its_step(
    world: World, monkeypatch: pytest.MonkeyPatch
) -> None:
    opened: list[str] = []

    def record(cfg: HFTeacherConfig, wanted: ScoreSpec, *_: Any) -> HFTeacher:
        opened.append(Path(cfg.path).parent.name)
        return HFTeacher(cfg, wanted)

    monkeypatch.setattr(cascade, "build_teacher", record)
    cfg = compose_config(
        "quickstart_opd",
        f"root={world.root}",
        "stage.cascade.first.num_steps=3",
        "stage.cascade.second.num_steps=2",
    )
    whole = Cascade(cfg.stage, cfg.model.tokenizer, TEMPLATE, 320)
    assert opened == []  # checked, not loaded
    widths = [width_of(whole.teacher_at(step, [])) for step in range(whole.num_steps)]
    assert widths == [32, 32, 32, 48, 48]
    assert opened == ["teacher_first", "teacher_second"]
    assert [whole.ends_at(step) for step in range(5)] == [False, False, True, False, True]
    assert [whole.phase_at(step).name for step in (2, 3)] == ["first", "second"]

    opened.clear()
    resumed = Cascade(cfg.stage, cfg.model.tokenizer, TEMPLATE, 320)
    resumed.resume(3, whole.state_at(3))
    assert width_of(resumed.teacher_at(3, [])) == 48
    assert opened == ["teacher_second"]


class Named(Teacher):
    """Scores each token with one number, its own."""

    def __init__(self, number: float) -> None:
        self.head = torch.zeros(320, 4)
        self.identity = {}
        self.asked: list[list[int]] = []
        self._number = number

    def score(self, asked: Sequence[Rollout]) -> list[ScoredRollout]:
        self.asked.append([r.prompt.index for r in asked])
        return [
            ScoredRollout(r, TokenScores(torch.full((len(r.response_ids),), self._number)))
            for r in asked
        ]


def test_a_rollout_goes_to_the_teacher_of_its_category_then_of_its_language() -> None:
    groups = [("math", "en"), ("code", "de"), ("math", "de"), ("code", "en"), ("math", "en")]
    asked = [
        replace(r, prompt=replace(r.prompt, category=category, language=language))
        for r, (category, language) in zip(rollouts(), groups, strict=True)
    ]
    default, math, german, idle = Named(0.0), Named(1.0), Named(2.0), Named(3.0)
    teacher = RoutedTeacher(
        default, {"category_math": math, "language_de": german, "language_fr": idle}
    )
    found = teacher.score(asked)
    assert [s.rollout for s in found] == asked
    first = [s.scores.teacher_logprobs[0] for s in found if isinstance(s.scores, TokenScores)]
    assert first == [1, 2, 1, 0, 1]
    assert (default.asked, math.asked, german.asked) == ([[3]], [[0, 2, 4]], [[1]])
    assert idle.asked == [[]]  # its ranks may need each other


def test_a_phase_opens_and_checks_the_teachers_of_its_groups(world: World) -> None:
    routed = [
        f"root={world.root}",
        "stage.objective=sampled",
        "+teacher@stage.cascade.first.teachers_by_group.category_math=hf",
    ]
    path = "stage.cascade.first.teachers_by_group.category_math.path="
    right = path + world.path("teacher_second", "export")
    cfg = compose_config("quickstart_opd", *routed, right)
    whole = Cascade(cfg.stage, cfg.model.tokenizer, TEMPLATE, 320)
    assert isinstance(whole.teacher_at(0, []), RoutedTeacher)
    last = whole.num_steps - 1
    assert isinstance(whole.teacher_at(last, []), HFTeacher)
    missing = compose_config("quickstart_opd", *routed, path + "nowhere")
    with pytest.raises(
        InputError, match=r"'first' \(teachers_by_group.category_math\): there is no"
    ):
        Cascade(missing.stage, missing.model.tokenizer, TEMPLATE, 320)


WRONG_GROUPS = [
    ("sampled", "genre_epic", r"names 'genre_epic'; name a group category_<name>"),
    ("full", "category_math", "has several teachers, and stage.objective=full"),
]


@pytest.mark.parametrize(("objective", "group", "names"), WRONG_GROUPS)
def test_a_teacher_of_an_unknown_group_is_refused(objective: str, group: str, names: str) -> None:
    with pytest.raises(InputError, match=names):
        compose_config(
            "quickstart_opd",
            f"stage.objective={objective}",
            f"+teacher@stage.cascade.first.teachers_by_group.{group}=hf",
            f"stage.cascade.first.teachers_by_group.{group}.path=anywhere",
        )


@pytest.mark.parametrize("group", ["category_poetry", "language_tlh"])
def test_a_teacher_without_prompts_is_refused(group: str, world: World) -> None:
    path = world.path("teacher_first", "export")
    cfg = compose_config(
        "quickstart_opd",
        f"root={world.root}",
        "stage.objective=sampled",
        f"+teacher@stage.cascade.first.teachers_by_group.{group}=hf",
        f"stage.cascade.first.teachers_by_group.{group}.path={path}",
    )
    tokenizer = load_tokenizer(cfg.model)
    known = PromptLoader(cfg.data, cfg.stage, tokenizer, cfg.seed).groups()
    assert known == {f"category_{name}" for name in CATEGORIES} | {"language_en"}
    found = Cascade(cfg.stage, cfg.model.tokenizer, TEMPLATE, 320)
    with pytest.raises(
        InputError, match=rf"teachers_by_group names {group}, of which there are no .*_en"
    ):
        found.check_groups(known)
    found.check_groups(known | {group})


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


def test_more_likeliest_tokens_than_there_are_is_refused(world: World) -> None:
    cfg = compose_config(
        "quickstart_opd", f"root={world.root}", "stage.objective=topk", "stage.top_k=321"
    )
    with pytest.raises(InputError, match=r"top_k is 321, more than the 320 tokens"):
        Cascade(cfg.stage, cfg.model.tokenizer, TEMPLATE, 320)


def test_a_cascade_with_another_past_is_refused(world: World) -> None:
    short = ["stage.cascade.first.num_steps=3", "stage.cascade.second.num_steps=2"]
    cfg = compose_config("quickstart_opd", f"root={world.root}", *short)
    state = Cascade(cfg.stage, cfg.model.tokenizer, TEMPLATE, 320).state_at(4)
    longer = compose_config(
        "quickstart_opd", f"root={world.root}", "stage.cascade.first.num_steps=4"
    )
    with pytest.raises(InputError, match="the cascade changed since the checkpoint"):
        Cascade(longer.stage, longer.model.tokenizer, TEMPLATE, 320).resume(4, state)


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
