"""A teacher that is not fit to teach is refused, with what was expected and what to do."""

import json
import math
import shutil
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import AutoModelForCausalLM

from marco_train.config.model import DType
from marco_train.config.opd import Objective, TopKSource
from marco_train.config.teacher import TeacherBackend
from marco_train.data.chat import CHATML
from marco_train.data.loader import PromptLoader
from marco_train.errors import InputError
from marco_train.models.agreement import same_answer
from marco_train.teachers.base import ScoreSpec
from marco_train.teachers.build import build_teacher
from marco_train.teachers.preflight import (
    PROBES,
    FirstOfEachKind,
    check_files,
    check_scores,
    check_turns,
    compare_with_student,
    probe_rollouts,
)
from marco_train.types import Conversation, Prompt, Rollout, ScoredRollout, TokenScores
from tests.helpers.configs import compose_config
from tests.helpers.preflight import Scripted, answers, figures
from tests.helpers.rollouts import rollouts
from tests.helpers.teachers import teacher_config, wanted_of
from tests.helpers.tokenizers import tokenizer_of
from tests.helpers.world import World

TEMPLATE = CHATML.read_text()
LANGUAGES = "en zh ar de es fr ko ja pt tr id it nl pl ru vi th he uk ms bn cs ur kk el ro hu ne az"


@pytest.fixture
def teacher_dir(world: World, tmp_path: Path) -> Path:
    shutil.copytree(world.path("teacher_first", "export"), tmp_path / "teacher")
    return tmp_path / "teacher"


def check(world: World, path: Path) -> None:
    teacher = teacher_config(str(path), TeacherBackend.hf)
    check_files(world.path("data", "tokenizer"), TEMPLATE, teacher, "teacher 'first'")


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
        check_files(world.path("data", "tokenizer"), TEMPLATE, cfg, "teacher")

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


# ChatML, and what another template makes of the turns that ours renders as they stand.
TURNS = """\
{%- for m in messages %}{% set words = m.content %}{% set role = m.role %}
{%- CHANGE %}
{{- '<|im_start|>' + role + '\\n' + words + '<|im_end|>\\n' }}{% endfor %}
{%- if add_generation_prompt %}{{- '<|im_start|>assistant\\n' }}{% endif %}"""
OF_ANSWERS = "if role == 'assistant' %}{% set words = "
CHANGES = {
    "an earlier answer with <think>": (
        OF_ANSWERS + "m.content.split('</think>')[-1] %}{% endif",
        [
            ("user", "one?"),
            ("assistant", "<think>hm</think>1"),
            ("user", "two?"),
            ("assistant", "2"),
        ],
    ),
    "several turns": (
        OF_ANSWERS + "m.content + ' ' %}{% endif",
        [("user", "one?"), ("assistant", "1"), ("user", "two?"), ("assistant", "2")],
    ),
    "a system turn": (
        "if role == 'system' %}{% set words = m.content + '!' %}{% endif",
        [("system", "be brief"), ("user", "one?"), ("assistant", "1")],
    ),
    "a tool turn": (
        "if role == 'tool' %}{% set role = 'user' %}{% set words = '(' + words + ')' %}{% endif",
        [("user", "one?"), ("assistant", "<call>"), ("tool", "1")],
    ),
}
PLAIN_ROWS = [[("user", f"{n}?"), ("assistant", str(n))] for n in range(7)]


def prompts_of(
    world: World,
    tmp_path: Path,
    *chats: list[tuple[str, str]],
    template: str = TEMPLATE,
    **kwargs: Any,
) -> list[tuple[Conversation, Prompt]]:
    """What a run on these chats would ask first."""
    file = tmp_path / "rows.jsonl"
    rows = [
        {"messages": [{"role": role, "content": words} for role, words in turns]} for turns in chats
    ]
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    shutil.copytree(world.path("data", "tokenizer"), tmp_path / "student")
    (tmp_path / "student" / "chat_template.jinja").write_text(template)
    data = [f"root={world.root}", "data=quickstart_text", f"data.sources.text.path={file}"]
    cfg = compose_config("quickstart_opd", *data)
    tokenizer = tokenizer_of(tmp_path / "student", **kwargs)
    return list(
        PromptLoader(cfg.data, cfg.stage, tokenizer, cfg.seed).first_prompts(lambda _: True)
    )


@pytest.mark.parametrize(("kind", "change"), CHANGES.items())
def test_a_teacher_that_renders_turns_of_the_run_otherwise_is_refused(
    kind: str, change: tuple[str, list[tuple[str, str]]], world: World, teacher_dir: Path
) -> None:
    template, turns = TURNS.replace("CHANGE", change[0]), change[1]
    (teacher_dir / "chat_template.jinja").write_text(template)
    check(world, teacher_dir)  # one question is rendered alike
    prompts = prompts_of(world, teacher_dir.parent, *PLAIN_ROWS, turns)
    with pytest.raises(InputError) as refusal:
        check_turns(prompts, str(teacher_dir), {}, "teacher 'first'")
    said = str(refusal.value)
    assert said.startswith(f"teacher 'first' ({teacher_dir}) renders the prompt of source 'text', ")
    assert "row 7 (from 0; " in said
    assert kind in said
    assert "at token " in said
    assert "model.chat_template=tokenizer" in said

    # Where the run holds no such turns, or renders them as the teacher does, it may teach.
    without = [pair for pair in prompts if pair[0].row < 7]
    assert without
    check_turns(without, str(teacher_dir), {}, "teacher 'first'")
    (teacher_dir.parent / "same").mkdir()
    same = prompts_of(world, teacher_dir.parent / "same", *PLAIN_ROWS, turns, template=template)
    check_turns(same, str(teacher_dir), {}, "teacher 'first'")


def test_the_first_difference_is_shown_with_what_stands_around_it(
    world: World, teacher_dir: Path
) -> None:
    template, turns = CHANGES["a tool turn"]
    (teacher_dir / "chat_template.jinja").write_text(TURNS.replace("CHANGE", template))
    prompts = prompts_of(world, teacher_dir.parent, turns)
    ours, theirs = (f"<|im_start|>{text}" for text in ("tool\\n1<|im_end|>", "user\\n(1)"))
    with pytest.raises(InputError) as refusal:
        check_turns(prompts, str(teacher_dir), {}, "teacher")
    found, expected = str(refusal.value).split(", and the run ")
    assert theirs in found
    assert ours in expected


def test_a_kind_of_turn_that_comes_late_is_compared_too(world: World, tmp_path: Path) -> None:
    turns = CHANGES["a tool turn"][1]
    found = prompts_of(world, tmp_path, *PLAIN_ROWS, turns, turns)
    assert len(found) == 2048  # the nine rows again and again
    prompts = sorted(found, key=lambda pair: pair[0].row)
    wanted = FirstOfEachKind()
    chosen = [pair for pair in prompts if wanted(pair[0])]
    assert chosen[:256] == prompts[:256]
    (late,) = chosen[256:]
    assert late[0].row == 7


@pytest.mark.parametrize("error", ["{{ raise_exception('no tools here') }}", "{{ 'a' + 1 }}"])
def test_a_teacher_whose_template_refuses_turns_of_the_run_is_refused(
    error: str, world: World, teacher_dir: Path
) -> None:
    file = teacher_dir / "chat_template.jinja"
    change = "if role == 'tool' %}" + error + "{% endif"
    file.write_text(TURNS.replace("CHANGE", change))
    prompts = prompts_of(world, teacher_dir.parent, *PLAIN_ROWS, CHANGES["a tool turn"][1])
    with pytest.raises(
        InputError, match=r"row 7 \(from 0; a tool turn\): the chat template cannot"
    ):
        check_turns(prompts, str(teacher_dir), {}, "teacher")
    file.write_text("{% for %}")
    with pytest.raises(InputError, match=r"teacher 'first' .*, asked a plain .*TemplateSyntaxErro"):
        check(world, teacher_dir)


def test_arguments_reach_the_teachers_template(world: World, teacher_dir: Path) -> None:
    opens = "{{- '<|im_start|>assistant\\n' }}"
    change = OF_ANSWERS + "m.content if keep else '' %}{% endif"
    template = TURNS.replace("CHANGE", change).replace(
        opens, opens + "{% if not think %}{{- '<none>' }}{% endif %}"
    )
    (teacher_dir / "chat_template.jinja").write_text(template)
    tokenizer = world.path("data", "tokenizer")
    cfg = teacher_config(str(teacher_dir), TeacherBackend.hf)
    with pytest.raises(InputError, match="opens a turn with"):
        check_files(tokenizer, TEMPLATE, cfg, "teacher")
    check_files(tokenizer, TEMPLATE, cfg, "teacher", {"think": True})

    prompts = prompts_of(world, teacher_dir.parent, *PLAIN_ROWS, CHANGES["several turns"][1])
    check_turns(prompts, str(teacher_dir), {"think": True, "keep": True}, "teacher")
    with pytest.raises(InputError, match="renders the prompt of source 'text'"):
        check_turns(prompts, str(teacher_dir), {"think": True}, "teacher")


def wanted_for(objective: Objective = Objective.sampled) -> ScoreSpec:
    return wanted_of(objective, top_k=4 if objective is Objective.topk else 0)


@pytest.mark.parametrize("backend", [TeacherBackend.hf, TeacherBackend.native])
@pytest.mark.parametrize("objective", Objective, ids=lambda objective: objective.value)
def test_the_numbers_of_real_teachers_pass(
    objective: Objective, backend: TeacherBackend, world: World
) -> None:
    path = world.path("teacher_first", "export")
    cfg = teacher_config(path, backend, max_tokens_per_batch=64)
    teacher = build_teacher(cfg, wanted_for(objective))
    probes = probe_rollouts(world.path("data", "tokenizer"), wanted_for(objective))
    assert [r.prompt.language for r in probes] == list(PROBES)
    check_scores(teacher, probes, 320, FLOAT32, "teacher")


FLOAT32 = same_answer(DType.float32, num_layers=2)
BFLOAT16 = same_answer(DType.bfloat16, num_layers=28)
UNIFORM = -float(torch.tensor(320.0).log())
FAULTS: dict[str, tuple[Callable[[Tensor, int], Tensor], str]] = {
    "one short": (lambda x, _: x[:-1], r"gave \d+ teacher_logprobs for \d+ tokens"),
    "one too many": (lambda x, _: torch.cat([x, x[:1]]), r"gave \d+ teacher_logprobs for \d+"),
    "not a number": (lambda x, _: torch.where(x > -2.01, float("nan"), x), "not finite"),
    "minus infinity": (lambda x, _: torch.where(x > -2.01, -float("inf"), x), "not finite"),
    "another answer each time": (
        lambda x, calls: x + 0.01 * calls,
        r"one question twice with log-probabilities that differ by 0.01 .*\(bound: 0.001 nats",
    ),
    "no opinion": (lambda x, _: torch.full_like(x, UNIFORM), "finds all tokens alike"),
    "nonsense": (lambda x, _: x - 40, "gives plain sentences"),
}


@pytest.mark.parametrize(("fault", "names"), FAULTS.values(), ids=FAULTS.keys())
def test_a_teacher_with_a_fault_is_refused(
    fault: Callable[[Tensor, int], Tensor], names: str, world: World
) -> None:
    probes = probe_rollouts(world.path("data", "tokenizer"), wanted_for())
    check_scores(Scripted(lambda x, _: x), probes, 320, FLOAT32, "teacher")
    with pytest.raises(InputError, match=names):
        check_scores(Scripted(fault), probes, 320, FLOAT32, "teacher")


def test_in_bfloat16_two_answers_may_differ_by_noise_and_not_by_more(world: World) -> None:
    probes = probe_rollouts(world.path("data", "tokenizer"), wanted_for())

    def one_place(x: Tensor, calls: int) -> Tensor:
        return x + 0.4 * calls * (torch.arange(len(x)) == 0) * (len(x) % 7 == 0)

    for noise in (lambda x, calls: x + 0.05 * calls, one_place):
        check_scores(Scripted(noise), probes, 320, BFLOAT16, "teacher")
        with pytest.raises(InputError, match="one question twice"):
            check_scores(Scripted(noise), probes, 320, FLOAT32, "teacher")
    with pytest.raises(InputError, match=r"one question twice .* \(bound: 0.1 nats in the mean"):
        check_scores(Scripted(lambda x, calls: x + 0.11 * calls), probes, 320, BFLOAT16, "teacher")


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
        check_scores(Elsewhere(lambda x, _: x), probes, 320, FLOAT32, "teacher")
    with pytest.raises(InputError, match="answered 28 of 29 rollouts"):
        check_scores(Forgetful(lambda x, _: x), probes, 320, FLOAT32, "teacher")


KINDS = {
    "sampled": (Objective.sampled, 0, TopKSource.sampler),
    "full": (Objective.full, 0, TopKSource.sampler),
    "topk": (Objective.topk, 5, TopKSource.sampler),
    "topk of the teacher": (Objective.topk, 5, TopKSource.teacher),
    "topk, all of them": (Objective.topk, 320, TopKSource.teacher),
}


def expected_logprob(path: str, kind: str, asked: Sequence[Rollout]) -> float:
    """Mean log-probability of all tokens of responses under a model of transformers.

    Beyond K likeliest tokens, what is left is shared evenly.
    """
    model = AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32)
    _, top_k, source = KINDS[kind]
    found = []
    for rollout in asked:
        with torch.no_grad():
            logits = model(torch.tensor([rollout.input_ids])).logits[0]
        first = len(rollout.prompt.input_ids) - 1
        places = zip(logits[first:-1].log_softmax(-1), rollout.response_ids, strict=True)
        for place, (logprobs, token) in enumerate(places):
            likeliest = logprobs.topk(top_k).indices.tolist()
            if source is TopKSource.sampler and top_k:
                likeliest = rollout.topk_ids[place]
            if top_k and token not in likeliest:
                left = 1 - float(logprobs[likeliest].exp().sum())
                found.append(math.log(left / (320 - top_k)))
            else:
                found.append(float(logprobs[token]))
    return sum(found) / len(found)


@pytest.mark.parametrize("kind", KINDS)
def test_a_teacher_is_asked_about_the_students_own_answers(
    kind: str, world: World, capsys: pytest.CaptureFixture[str]
) -> None:
    path = world.path("teacher_first", "export")
    teacher = build_teacher(teacher_config(path, TeacherBackend.hf), wanted_of(*KINDS[kind]))
    expected = expected_logprob(path, kind, rollouts())
    assert expected < -5  # the world's teachers are drawn at random
    compare_with_student(teacher, answers(-5.25), 320, "teacher 'first'")
    assert capsys.readouterr().out.startswith("teacher 'first' gives the student's answers")
    with pytest.raises(
        InputError, match="a tenth of what the student gains; its weights did not"
    ) as refusal:
        compare_with_student(teacher, answers(-1.0), 320, "teacher 'first'")
    assert capsys.readouterr().out == ""
    found = figures(str(refusal.value))
    assert found == pytest.approx([expected, -1.0, -math.log(320)], abs=0.006)


# What the student gives its own answers, what the teacher does, and whether it may teach; a uniform
# guess over 320 tokens is -5.77.
PAIRS = [
    (-1.0, -1.5, True),
    (-1.0, -5.0, True),  # far from its student, and better than a guess
    (-1.0, -5.5, False),
    (-1.0, -5.77, False),
    (-1.0, -9.0, False),
    (-2.8, -5.6, False),
    (-3.0, -9.0, True),  # a student that cannot write yet shows nothing
    (-5.77, -7.0, True),
]


@pytest.mark.parametrize(("own", "theirs", "fit"), PAIRS)
def test_a_teacher_no_better_than_a_guess_is_refused_once_the_student_can_write(
    own: float, theirs: float, fit: bool, capsys: pytest.CaptureFixture[str]
) -> None:
    teacher = Scripted(lambda x, _: torch.full_like(x, theirs))
    if fit:
        compare_with_student(teacher, answers(own), 320, "teacher")
        said = capsys.readouterr().out
    else:
        with pytest.raises(InputError) as refusal:
            compare_with_student(teacher, answers(own), 320, "teacher")
        said = str(refusal.value)
    assert figures(said) == pytest.approx([theirs, own, -5.77], abs=0.006)


def test_tokens_without_a_number_are_left_out_on_both_sides(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    asked = answers(-1.0)
    asked[0].sampler_logprobs[0] = -100.0
    known = Scripted(lambda x, calls: torch.full_like(x, -2.0))
    scores = known.score(asked)
    assert isinstance(scores[0].scores, TokenScores)
    scores[0].scores.teacher_logprobs[0] = float("nan")
    monkeypatch.setattr(known, "score", lambda _: scores)
    compare_with_student(known, asked, 320, "teacher")
    assert figures(capsys.readouterr().out)[:2] == [-2.0, -1.0]


def test_without_answers_nothing_is_said(capsys: pytest.CaptureFixture[str]) -> None:
    compare_with_student(Scripted(lambda x, _: x), [], 320, "teacher")
    assert capsys.readouterr().out == ""
