"""A teacher that is not fit to teach is refused, with what was expected and what to do."""

import json
import shutil
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import Tensor

from marco_train.config import DType, Objective, TeacherBackend
from marco_train.data.chat import CHATML
from marco_train.errors import InputError
from marco_train.teachers.base import Wanted
from marco_train.teachers.build import build_teacher
from marco_train.teachers.preflight import PROBES, check_files, check_scores, probe_rollouts
from marco_train.types import Rollout, ScoredRollout, TokenScores
from tests.conftest import World, teacher_config, wanted_of

TEMPLATE = CHATML.read_text()
LANGUAGES = "en zh ar de es fr ko ja pt tr id it nl pl ru vi th he uk ms bn cs ur kk el ro hu ne az"


@pytest.fixture
def teacher_dir(world: World, tmp_path: Path) -> Path:
    shutil.copytree(world.path("teacher_first", "export"), tmp_path / "teacher")
    return tmp_path / "teacher"


def check(world: World, path: Path) -> None:
    teacher = teacher_config(str(path), TeacherBackend.hf)
    check_files(world.path("data", "tokenizer"), TEMPLATE, 320, teacher, "teacher 'first'")


def test_there_is_a_probe_in_each_of_the_29_languages() -> None:
    assert list(PROBES) == LANGUAGES.split()
    assert len(set(PROBES.values())) == 29


def test_a_fit_teacher_passes(world: World, teacher_dir: Path) -> None:
    check(world, teacher_dir)


def test_another_stop_at_the_end_of_a_turn_is_refused(world: World, teacher_dir: Path) -> None:
    file = teacher_dir / "generation_config.json"
    generation = json.loads(file.read_text())
    assert generation["eos_token_id"] == [2, 0]
    file.write_text(json.dumps(generation | {"eos_token_id": 0}))
    with pytest.raises(InputError, match=r"stops at \[0\] .* the student ends a turn with 2: .*"):
        check(world, teacher_dir)
    file.unlink()  # then config.json is what says it, and it says nothing
    with pytest.raises(InputError, match=r"stops at \[\] "):
        check(world, teacher_dir)


def test_a_stated_stop_of_the_teacher_is_one_of_its_own(world: World, teacher_dir: Path) -> None:
    (teacher_dir / "generation_config.json").write_text('{"eos_token_id": [0]}')

    def check_with(stop_id: int) -> None:
        cfg = teacher_config(str(teacher_dir), TeacherBackend.hf, stop_id=stop_id)
        check_files(world.path("data", "tokenizer"), TEMPLATE, 320, cfg, "teacher")

    check_with(0)
    with pytest.raises(InputError, match=r"stops at \[0\] .*, and its stop_id is 5: give one of"):
        check_with(5)
    with pytest.raises(InputError, match="stop_id is 320, and must be one of the 320 ids"):
        check_with(320)


def test_another_template_is_refused(world: World, teacher_dir: Path) -> None:
    file = teacher_dir / "chat_template.jinja"
    file.write_text("{% for m in messages %}{{ 'Q: ' + m['content'] + ' A: ' }}{% endfor %}")
    with pytest.raises(InputError, match=r"opens a turn with 'Q: The river .*the student with"):
        check(world, teacher_dir)
    file.unlink()
    with pytest.raises(InputError, match="has no chat template"):
        check(world, teacher_dir)


def wanted_for(objective: Objective = Objective.sampled) -> Wanted:
    return wanted_of(objective, top_k=4 if objective is Objective.topk else 0)


@pytest.mark.parametrize("backend", [TeacherBackend.hf, TeacherBackend.moe])
@pytest.mark.parametrize("objective", Objective, ids=lambda objective: objective.value)
def test_the_numbers_of_real_teachers_pass(
    objective: Objective, backend: TeacherBackend, world: World
) -> None:
    path = world.path("teacher_first", "export")
    cfg = teacher_config(path, backend, max_tokens_per_batch=64)
    teacher = build_teacher(cfg, wanted_for(objective))
    probes = probe_rollouts(world.path("data", "tokenizer"), wanted_for(objective))
    assert [r.prompt.language for r in probes] == list(PROBES)
    check_scores(teacher, probes, 320, DType.float32, "teacher")


class Scripted:
    """A teacher whose scores of each rollout go through a fault."""

    def __init__(self, fault: Callable[[Tensor, int], Tensor]) -> None:
        self.head = torch.zeros(320, 8)
        self._fault = fault
        self._calls = 0

    def score(self, rollouts: Sequence[Rollout]) -> list[ScoredRollout]:
        self._calls += 1
        generator = torch.Generator().manual_seed(0)
        return [
            ScoredRollout(r, TokenScores(self._fault(self._honest(r, generator), self._calls)))
            for r in rollouts
        ]

    def _honest(self, rollout: Rollout, generator: torch.Generator) -> Tensor:
        return -2 - torch.rand(len(rollout.response_ids), generator=generator)


UNIFORM = -float(torch.tensor(320.0).log())
FAULTS: dict[str, tuple[Callable[[Tensor, int], Tensor], str]] = {
    "one short": (lambda x, _: x[:-1], r"gave \d+ teacher_logprobs for \d+ tokens"),
    "one too many": (lambda x, _: torch.cat([x, x[:1]]), r"gave \d+ teacher_logprobs for \d+"),
    "not a number": (lambda x, _: torch.where(x > -2.01, float("nan"), x), "not finite"),
    "minus infinity": (lambda x, _: torch.where(x > -2.01, -float("inf"), x), "not finite"),
    "another answer each time": (
        lambda x, calls: x + 0.01 * calls,
        r"one question twice with log-probabilities that differ by 0.01 nats \(bound 0.001\)",
    ),
    "no opinion": (lambda x, _: torch.full_like(x, UNIFORM), "finds all tokens alike"),
    "nonsense": (lambda x, _: x - 40, "gives plain sentences"),
}


@pytest.mark.parametrize(("fault", "names"), FAULTS.values(), ids=FAULTS.keys())
def test_a_teacher_with_a_fault_is_refused(
    fault: Callable[[Tensor, int], Tensor], names: str, world: World
) -> None:
    probes = probe_rollouts(world.path("data", "tokenizer"), wanted_for())
    check_scores(Scripted(lambda x, _: x), probes, 320, DType.float32, "teacher")
    with pytest.raises(InputError, match=names):
        check_scores(Scripted(fault), probes, 320, DType.float32, "teacher")


class Elsewhere(Scripted):
    """Scores other tokens than it was sent."""

    def score(self, rollouts: Sequence[Rollout]) -> list[ScoredRollout]:
        return [
            replace(s, rollout=replace(s.rollout, response_ids=s.rollout.response_ids[::-1]))
            for s in super().score(rollouts)
        ]


class Forgetful(Scripted):
    """Answers all but one."""

    def score(self, rollouts: Sequence[Rollout]) -> list[ScoredRollout]:
        return super().score(rollouts)[:-1]


def test_scores_of_other_tokens_or_fewer_rollouts_are_refused(world: World) -> None:
    probes = probe_rollouts(world.path("data", "tokenizer"), wanted_for())
    with pytest.raises(InputError, match="scored other tokens than it was sent"):
        check_scores(Elsewhere(lambda x, _: x), probes, 320, DType.float32, "teacher")
    with pytest.raises(InputError, match="answered 28 of 29 rollouts"):
        check_scores(Forgetful(lambda x, _: x), probes, 320, DType.float32, "teacher")
