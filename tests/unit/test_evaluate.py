"""What an evaluation opens is closed, however it ends; one engine serves the models of a shape."""

from types import SimpleNamespace
from typing import Any

import pytest

from marco_train.errors import InputError
from marco_train.evaluation import answers
from marco_train.evaluation.answers import AnswerSampler
from marco_train.rollout.base import Sampler
from marco_train.stages import evaluate
from marco_train.stages.checks import Checks


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
