"""The teacher scores the tokens it is asked about, and changes where the cascade says."""

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM

from marco_train.config.opd import Objective, TopKSource
from marco_train.config.teacher import HFTeacherConfig
from marco_train.data.chat import load_tokenizer
from marco_train.data.loader import PromptLoader
from marco_train.errors import InputError
from marco_train.stages.checks import Checks
from marco_train.stages.opd import prepare_opd
from marco_train.teachers import cascade
from marco_train.teachers.base import ScoreSpec, Teacher
from marco_train.teachers.cascade import Cascade
from marco_train.teachers.hf import HFTeacher
from marco_train.teachers.routed import RoutedTeacher
from marco_train.types import (
    HiddenScores,
    Rollout,
    ScoredRollout,
    TokenScores,
    TopKScores,
)
from tests.helpers.configs import compose_config
from tests.helpers.rollouts import rollouts
from tests.helpers.teachers import hf_teacher, wanted_for, wanted_of
from tests.helpers.tokenizers import TEMPLATE
from tests.helpers.world import CATEGORIES, World


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
        prepare_opd(missing, Checks())


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
