"""What an evaluation opens is closed, however it ends; one engine serves the models of a shape."""

from types import SimpleNamespace
from typing import Any

import pytest

from marco_train.data.chat import load_tokenizer
from marco_train.data.loader import Question
from marco_train.errors import InputError
from marco_train.evaluation import answers
from marco_train.evaluation.answers import AnswerSampler
from marco_train.evaluation.benchmark.harness import SampledLM, ask, held_out_task, rollouts_of
from marco_train.rollout.base import Sampler
from marco_train.stages import evaluate
from marco_train.stages.checks import Checks
from marco_train.types import FinishReason, Prompt, Rollout
from tests.helpers.configs import compose_config
from tests.helpers.world import World


def test_open_teachers_are_closed_where_another_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    closed: list[str] = []

    def opened(cfg: Any, vocab_size: int, name: str) -> Any:
        if name == "second":
            raise InputError("it cannot be trusted")
        return SimpleNamespace(close=lambda: closed.append(name))

    monkeypatch.setattr(evaluate, "open_teacher", opened)
    cfg: Any = SimpleNamespace(stage=SimpleNamespace(teachers={"first": 1, "second": 2}))
    prepared: Any = SimpleNamespace(measured=[], vocab_size=8)
    with pytest.raises(InputError, match="cannot be trusted"):
        evaluate.open_teachers(cfg, prepared, Checks())
    assert closed == ["first"]


class NotedSampler(Sampler):
    """Notes what it is asked, and answers nothing."""

    def __init__(self, events: list[str], name: str) -> None:
        self.note = lambda what: events.append(f"{name} {what}")

    def sample(self, prompts: Any, num_responses: int, *, greedy: bool = False) -> Any:
        self.note("samples")
        return iter(())

    def sleep(self) -> None:
        self.note("sleeps")

    def close(self) -> None:
        self.note("closes")


def test_an_engine_serves_the_models_of_a_shape_and_there_is_one_at_a_time(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    events: list[str] = []

    def built(stage: Any, shape: str, *_: Any) -> NotedSampler:
        events.append(f"{shape} is built")
        return NotedSampler(events, shape)

    def synced(source: Any, sampler: NotedSampler, *_: Any) -> None:
        assert sampler.first_canary is None  # that of another model bounds nothing
        sampler.note(f"gets {source.model.name}")
        sampler.first_canary = "found"  # type: ignore[assignment]

    monkeypatch.setattr(answers, "build_sampler", built)
    monkeypatch.setattr(answers, "sync_weights", synced)
    monkeypatch.setattr(answers, "canary_of", lambda *_: None)
    monkeypatch.setattr(answers, "stop_token_ids", lambda _: [0])
    monkeypatch.setattr(answers, "SampledLM", lambda sampler, *_, **__: sampler)
    monkeypatch.setattr(answers, "ask", lambda sampler, task: [*sampler.sample([], 1)])
    cfg: Any = SimpleNamespace(
        stage=SimpleNamespace(rollout="vllm", max_prompt_length=1),
        model=SimpleNamespace(tokenizer="", dtype="float32"),
        seed=0,
    )
    sampler = AnswerSampler(cfg, tokenizer=None)  # type: ignore[arg-type]
    for name, shape in (("sft", "wide"), ("opd", "wide"), ("teacher", "deep")):
        model: Any = SimpleNamespace(name=name, architecture=shape)
        asked: Any = sampler.ask(model, None, None)  # type: ignore[arg-type]
        assert asked == []
    sampler.close()
    assert events == [
        *("wide is built", "wide gets sft", "wide samples", "wide sleeps"),
        *("wide gets opd", "wide samples", "wide sleeps", "wide closes"),
        *("deep is built", "deep gets teacher", "deep samples", "deep sleeps", "deep closes"),
    ]


class Noting(Sampler):
    """Notes the prompts, and answers each with one token."""

    def __init__(self) -> None:
        self.prompts: list[Prompt] = []

    def sample(self, prompts: Any, num_responses: int, *, greedy: bool = False) -> Any:
        self.prompts += prompts
        for prompt in prompts:
            for number in range(num_responses):
                yield Rollout(prompt, number, [number], [-1.0], [[]], FinishReason.stop, 0)


def test_a_held_out_row_is_asked_with_the_tokens_that_training_renders(world: World) -> None:
    tokenizer = load_tokenizer(compose_config("quickstart_sft", f"root={world.root}").model)
    of_row = Prompt(3, [5, 6, 7], "source", "math", "de")  # with turns before what was said last
    question = Question(of_row, "what was said last", "x", {"name": "exact"})
    sampler = Noting()
    lm = SampledLM(sampler, tokenizer, None, 64, greedy=False, keeps_ids=True)
    asked = ask(lm, held_out_task([question], 2))
    (prompt,) = sampler.prompts
    assert (prompt.input_ids, prompt.language) == ([5, 6, 7], "de")
    scored = [(r.prompt, r.sample_index, r.response_ids) for r in rollouts_of(asked)]
    assert scored == [(prompt, 0, [0]), (prompt, 1, [1])]
