"""Phases end where the config says, or where the held-out reverse KL falls no more."""

import importlib.util
import json
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch

from marco_train.config.model import DType
from marco_train.config.teacher import TeacherConfig
from marco_train.errors import InputError
from marco_train.rollout.build import check_sampler
from marco_train.stages import opd
from marco_train.stages.opd import run_opd
from marco_train.teachers import cascade
from marco_train.teachers.base import Teacher
from marco_train.teachers.cascade import Cascade, check_teacher, teachers_of
from marco_train.types import Rollout, ScoredRollout
from tests.helpers.configs import compose_config
from tests.helpers.models import architecture
from tests.helpers.tokenizers import TEMPLATE
from tests.helpers.world import World

LENGTHS = ["stage.cascade.first.num_steps=10", "stage.cascade.second.num_steps=4"]


def rule(every: int, num_measures: int, min_fall: float, phase: str = "first") -> list[str]:
    fields = {
        "measure_every": every,
        "num_prompts": 3,
        "num_measures": num_measures,
        "min_fall": min_fall,
    }
    return [f"stage.cascade.{phase}.early_switch.{name}={value}" for name, value in fields.items()]


def cascade_of(world: World, *overrides: str) -> Cascade:
    cfg = compose_config("quickstart_opd", f"root={world.root}", *LENGTHS, *overrides)
    return Cascade(cfg.stage, cfg.model.tokenizer, TEMPLATE, 320)


def steps_until(found: Cascade, values: list[float]) -> tuple[int, str | None]:
    """Measure as the loop does; the step and the phase that ended, or the end of the values."""
    step, coming = 0, iter(values)
    while step < found.num_steps:
        while found.measure_due(step):
            value = next(coming, None)
            if value is None:
                return step, None
            if ended := found.observe(step, value):
                return step, ended
        step += 1
    return step, None


# Measured before steps 0, 2, 4, ...: the values, and the step before which the phase ends.
CURVES = {
    "falls on": ([1.0, 0.8, 0.6, 0.4, 0.2], (1, 0.1), None),
    "falls by too little": ([1.0, 0.8, 0.75], (1, 0.1), 4),
    "falls by too little once, with patience": ([1.0, 0.8, 0.75, 0.6, 0.4], (2, 0.1), None),
    "falls by too little twice": ([1.0, 0.8, 0.75, 0.74], (2, 0.1), 6),
    "falls and rises again": ([1.0, 0.9, 0.5, 0.85], (2, 0.1), None),
    "rises": ([1.0, 0.5, 0.9, 0.8], (2, 0.0), 6),
    "one measure is no curve": ([1.0], (1, 5.0), None),
    "must fall by more than it can": ([1.0, 0.0], (1, 5.0), 2),
}


@pytest.mark.parametrize(("values", "bounds", "end"), CURVES.values(), ids=CURVES.keys())
def test_a_phase_ends_where_its_kl_falls_no_more(
    values: list[float], bounds: tuple[int, float], end: int | None, world: World
) -> None:
    found = cascade_of(world, *rule(2, *bounds))
    assert found.num_held_out == 3
    step, ended = steps_until(found, values)
    if end is None:
        assert ended is None and found.num_steps == 14
        return
    assert (step, ended) == (end, "first")
    assert [(p.first, p.end) for p in found.phases] == [(0, end), (end, end + 4)]
    assert found.phase_at(end).name == "second"
    assert not found.measure_due(end)  # the second makes all its steps


def test_phases_without_a_rule_need_no_held_out_prompts(world: World) -> None:
    found = cascade_of(world)
    assert found.num_held_out == 0
    assert not any(found.measure_due(step) for step in range(found.num_steps))


def test_a_resumed_cascade_knows_what_was_measured(world: World) -> None:
    given = [*rule(2, 1, 0.1), *rule(1, 1, 0.0, "second")]
    whole = cascade_of(world, *given)
    assert steps_until(whole, [1.0, 0.8, 0.75]) == (4, "first")
    assert whole.measure_due(4)  # now of the second
    whole.observe(4, 0.9)
    later = cascade_of(world, *given)
    later.resume(6, whole.state_at(6))
    assert later.phases == whole.phases
    assert not later.measure_due(4) and later.measure_due(5)
    assert later.observe(5, 0.95) == "second" and later.num_steps == 5
    assert not later.measure_due(5)
    assert whole.observe(5, 0.95) == "second" and whole.state_at(5) == later.state_at(5)


BAD_RULES = {
    "measure_every is 0": (0, 1, 0.1),
    "num_measures is 0": (2, 0, 0.1),
    "min_fall is -1": (2, 1, -1),
}


@pytest.mark.parametrize(("names", "values"), BAD_RULES.items())
def test_a_rule_out_of_bounds_is_refused(
    names: str, values: tuple[int, int, float], world: World
) -> None:
    with pytest.raises(InputError, match=f"stage.cascade.*.early_switch.{names}"):
        cascade_of(world, *rule(*values))


class Noted(Teacher):
    """Notes when it is opened, checked and closed."""

    head = None

    def __init__(self, cfg: TeacherConfig, notes: list[str]) -> None:
        self.name = cfg.path.split("/")[-2]
        self.identity = {"weights": self.name}
        self.notes = notes
        notes.append(f"open {self.name}")

    def score(self, rollouts: Sequence[Rollout]) -> list[ScoredRollout]:
        return []

    def close(self) -> None:
        self.notes.append(f"close {self.name}")


@pytest.fixture
def notes(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    found: list[str] = []

    def check(teacher: Noted, *_: Any) -> list[float]:
        found.append(f"check {teacher.name}")
        if "second" in teacher.name and len(found) > 8:
            raise InputError("not fit")
        return []

    monkeypatch.setattr(cascade, "build_teacher", lambda cfg, *_: Noted(cfg, found))
    monkeypatch.setattr(cascade, "check_scores", check)
    return found


def test_the_next_teacher_is_checked_before_the_former_goes(world: World, notes: list[str]) -> None:
    found = cascade_of(world)

    for step in (0, 9, 10, 13):
        if found.opens_at(step):
            notes.append("answer")
        found.teacher_at(step, [])
    first, second = "teacher_first", "teacher_second"
    assert notes == [  # the student answers only where it is needed, before more memory is taken
        *("answer", f"open {first}", f"check {first}"),
        *("answer", f"open {second}", f"check {second}", f"close {first}"),
    ]
    found.close()
    assert notes.pop() == f"close {second}"

    notes[:] = ["before"] * 7
    unfit = cascade_of(world)
    unfit.teacher_at(9, [])
    with pytest.raises(InputError, match="not fit"):
        unfit.teacher_at(10, [])
    assert notes[-1] == f"close {second}"  # and not the former
    assert f"close {first}" not in notes


def test_without_vllm_a_run_that_asks_for_it_is_refused_before_anything_is_loaded(
    world: World, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(importlib.util, "find_spec", lambda _: None)
    cfg = compose_config(
        "quickstart_opd",
        f"root={world.root}",
        "rollout@stage.rollout=vllm",
        "teacher@stage.cascade.second.teacher=vllm",
    )
    needed = r"vLLM is not installed: pip install 'marco-train\[vllm\]'.*scripts/setup_vllm_cpu"
    owner, second = teachers_of(cfg.stage)[1]
    with pytest.raises(InputError, match=needed):
        check_teacher(cfg.stage, owner, second, cfg.model.tokenizer, TEMPLATE, None)
    with pytest.raises(InputError, match=needed):
        check_sampler(cfg.stage, architecture(), DType.float32)
    check_sampler(compose_config("quickstart_opd").stage, architecture(), DType.float32)


def test_without_a_gpu_vllm_cannot_replay_routing(
    world: World, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(importlib.util, "find_spec", lambda _: object())
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    asked = [f"root={world.root}", "stage.rollout.replay_routing=true"]
    cfg = compose_config("quickstart_opd", "rollout@stage.rollout=vllm", *asked)
    with pytest.raises(InputError, match=r"replay_routing is true, and there is no GPU: .*Triton"):
        check_sampler(cfg.stage, architecture(), DType.float32)
    check_sampler(compose_config("quickstart_opd", *asked).stage, architecture(), DType.float32)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    check_sampler(cfg.stage, architecture(), DType.float32)


def test_keys_that_hold_no_full_response_are_refused_before_anything_is_loaded(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(importlib.util, "find_spec", lambda _: object())
    # Mini: 28 layers, 8 heads of 128 for keys and as many for values, two bytes a number. 10,241
    # tokens, 2,048 of a prompt, 8,192 of a response and one to score, lie in 81 blocks of 128, and
    # vLLM keeps a block back: 82 * 128 * 28 * 2 * 8 * 128 * 2 bytes are 1.12109375 GiB.
    asked = ["rollout@stage.rollout=vllm", "model.path=anywhere"]
    for given, fits in (("1.1210", False), ("1.1211", True), ("auto", True)):
        cfg = compose_config("marco_mini_opd", *asked, f"stage.rollout.kv_cache_gib={given}")
        shape = cfg.model.architecture
        assert shape is not None
        if fits:
            check_sampler(cfg.stage, shape, cfg.model.dtype)
            continue
        with pytest.raises(
            InputError,
            match=r"kv_cache_gib is 1.121, and one sequence of 10241 tokens needs 1.1211, 114688 "
            r"bytes a token",
        ):
            check_sampler(cfg.stage, shape, cfg.model.dtype)


def test_turns_are_compared_with_every_teachers_before_a_model_is_loaded(
    world: World, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    shutil.copytree(world.path("teacher_second", "export"), tmp_path / "teacher")
    template = tmp_path / "teacher" / "chat_template.jinja"
    template.write_text(template.read_text().replace("message['role']", "message.role|lower"))
    file = tmp_path / "rows.jsonl"
    turns = [("system", "be brief"), ("user", "one?"), ("assistant", "1")]
    messages = [{"role": role, "content": words} for role, words in turns]
    file.write_text(json.dumps({"messages": messages}) + "\n")
    cfg = compose_config(
        "quickstart_opd",
        f"root={world.root}",
        "data=quickstart_text",
        f"data.sources.text.path={file}",
        f"stage.cascade.second.teacher.path={tmp_path / 'teacher'}",
    )

    def no_model(*_: Any) -> None:
        raise AssertionError("a model is built")

    monkeypatch.setattr(opd, "build_policy", no_model)
    with pytest.raises(AssertionError, match="a model is built"):
        run_opd(cfg)
    # The student's template does not read it; one of the teachers' does.
    cfg.model.chat_template_kwargs = {"lower": True}
    with pytest.raises(AssertionError, match="a model is built"):
        run_opd(cfg)
    cfg.model.chat_template_kwargs = {"brief": True}
    with pytest.raises(InputError, match=r"has 'brief', which no chat template of this run reads"):
        run_opd(cfg)
    cfg.model.chat_template_kwargs = {}
    template.write_text(template.read_text().replace("|lower", "|replace('system', 'user')"))
    with pytest.raises(InputError, match=r"teacher 'second' .* renders the prompt .*a system turn"):
        run_opd(cfg)
