"""Whatever a row calls its category and language, its metrics have names that a run can log."""

import json
from collections.abc import Sequence

import pytest
import torch

from marco_train.config.opd import Objective
from marco_train.data.packing import pack_rollouts
from marco_train.evaluation.benchmark.grading import Graded
from marco_train.evaluation.benchmark.held_out import scores_by_category
from marco_train.metrics import MetricSums, check_names
from marco_train.rollout.base import summarize
from marco_train.teachers.base import Teacher
from marco_train.teachers.routed import RoutedTeacher
from marco_train.types import (
    FinishReason,
    LossOutput,
    Prompt,
    Rollout,
    ScoredRollout,
    TokenScores,
    group_name,
    rollout_groups,
)

TEXTS = [
    "math",
    "Business/Finance",
    "zh/en",
    "/",
    "a//b/",
    "🙂 🏳️‍🌈",
    "línea\nnueva\t\x00\x7f",
    "a lone \ud83d surrogate",
    "x" * 300,
    "/" * 300,
    "数学" * 150,
    "['a', 'b']",
    " ",
    "%2F",
    "layer_3",
    "p50",
    "all",
    "tokens",
    "category_",
    "*",
]


def rollout(category: str, language: str, index: int = 0, length: int = 3) -> Rollout:
    prompt = Prompt(index, [1, 2], "rows", category, language)
    ids = [5] * length
    return Rollout(prompt, 0, ids, [-1.0] * length, [[]] * length, FinishReason.stop, 0)


@pytest.mark.parametrize("text", TEXTS)
def test_any_text_gives_a_name_that_can_be_logged(text: str) -> None:
    groups = rollout_groups(rollout(text, text))
    assert [group.split("_")[0] for group in groups] == ["category", "language"]
    check_names(f"kl/reverse/{group}" for group in groups)
    json.dumps(groups, ensure_ascii=False).encode()  # a lone surrogate could not be written
    assert all(len(group) <= 64 for group in groups)
    assert [group_name(group) for group in groups] == groups


def test_different_texts_have_different_names() -> None:
    names = {group for text in TEXTS if text != "/" for group in rollout_groups(rollout(text, ""))}
    assert len(names) == len(TEXTS) - 1
    # Alike in all that is kept of them.
    long = {group_name("category_" + "x" * 300 + end) for end in ("", "a", "b")}
    assert len(long) == 3


def test_no_language_is_no_group() -> None:
    assert rollout_groups(rollout("math", "")) == ["category_math"]
    assert rollout_groups(rollout("", "de")) == ["language_de"]
    assert rollout_groups(rollout("", "")) == []


def test_sums_leave_out_the_groups_that_a_token_has_not() -> None:
    made = [
        rollout("math", "", 0, length=2),
        rollout("a/b", "de", 1, length=1),
        rollout("", "", 2, length=4),
    ]
    scored = [ScoredRollout(r, TokenScores(torch.zeros(len(r.response_ids)))) for r in made]
    (packed,) = pack_rollouts(scored, Objective.sampled, 64)
    # Longest first: four tokens without a group, two of math, one of a/b in German.
    values = torch.tensor([10.0, 10.0, 10.0, 10.0, 1.0, 3.0, 7.0])
    sums = MetricSums()
    sums.add(LossOutput(values.sum(), {"kl/reverse": values}, {}), packed)
    found = sums.mean(num_tokens=7)
    assert found == {
        "kl/reverse": pytest.approx(51 / 7),
        "kl/reverse/category_a%2Fb": 7.0,
        "kl/reverse/category_math": 2.0,
        "kl/reverse/language_de": 7.0,
    }
    check_names(found)
    responses = summarize(made)
    check_names(responses)
    assert responses["rollout/response_length/category_math"] == 2
    assert responses["rollout/response_length"] == pytest.approx(7 / 3)
    assert not any(name.endswith("_") for name in responses)


class Named(Teacher):
    """A teacher that says who it is."""

    head = None

    def __init__(self, name: str) -> None:
        self.identity = {"name": name}

    def score(self, rollouts: Sequence[Rollout]) -> list[ScoredRollout]:
        value = float(len(self.identity["name"]))
        return [ScoredRollout(r, TokenScores(torch.full((3,), value))) for r in rollouts]


def test_a_teacher_of_a_category_with_a_slash_gets_its_rollouts() -> None:
    teacher = RoutedTeacher(Named("one"), {group_name("category_a/b"): Named("other")})
    scored = teacher.score([rollout("a/b", ""), rollout("a", "")])
    values = [
        s.scores.teacher_logprobs.tolist() for s in scored if isinstance(s.scores, TokenScores)
    ]
    assert values == [[5.0] * 3, [3.0] * 3]


def graded(category: str, language: str, *right: bool) -> Graded:
    return Graded("id", language, category, right, ("x",) * len(right))


def test_a_category_called_all_is_not_counted_twice() -> None:
    items = [graded("all", "de", True), graded("math", "de", False), graded("math", "de", False)]
    scores = {name: scored.score for name, scored in scores_by_category(items).items()}
    assert scores == {"all": pytest.approx(100 / 3), "all (category)": 100, "math": 0}


def test_every_answer_weighs_alike_in_whatever_language() -> None:
    german = [graded("math", "de", True, False), graded("math", "de", True, True)]
    items = [*german, graded("math", "ar", False, False), graded("talk", "de", False, True)]
    scores = scores_by_category(items)
    assert {name: scored.score for name, scored in scores.items()} == {
        "all": 50,
        "math": 50,  # 3 of 6; the mean of the languages' means is 37.5
        "talk": 50,
    }
    assert scores["math"].runs == pytest.approx([200 / 3, 100 / 3])
    assert scores["talk"].std == pytest.approx(5000**0.5)  # of 0 and 100
    assert (scores["math"].num_items, scores["math"].num_samples) == (3, 6)
