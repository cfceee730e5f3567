"""A suite that a run asks its own model: what is refused, and what is measured of the answers."""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest

from marco_train.config.benchmark import OwnRowsConfig
from marco_train.config.trained import EvalConfig
from marco_train.data.chat import load_tokenizer
from marco_train.errors import InputError
from marco_train.evaluation.suite import Suite
from marco_train.rollout.base import Sampler
from marco_train.types import FinishReason, Rollout
from tests.helpers.configs import compose_config
from tests.helpers.world import World


class Says(Sampler):
    """Answers each prompt in turn with the tokens of a text, and notes how it was asked."""

    def __init__(self, tokenizer: Any, texts: list[str]) -> None:
        self._ids = [tokenizer.encoder.encode(text)[0] for text in texts]
        self.asked: list[tuple[int, bool]] = []

    def sample(self, prompts: Any, num_responses: int, *, greedy: bool = False) -> Any:
        self.asked.append((num_responses, greedy))
        for prompt, ids in zip(prompts, self._ids, strict=True):
            for number in range(num_responses):
                done = FinishReason.length if len(ids) > 2 else FinishReason.stop
                yield Rollout(prompt, number, ids, [-1.0] * len(ids), [[]] * len(ids), done, 0)


def suite_of(
    world: World, tmp_path: Path, limit: int, without: Sequence[str] = (), **more: Any
) -> tuple[Any, Suite]:
    file = tmp_path / "own.jsonl"
    rows = [
        {"question": f"test math {n}?", "answer": None if n in without else n}
        for n in ("one", "two", "three", "vier")
    ]
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    own = OwnRowsConfig(path=str(file), verifier="exact")
    tokenizer = load_tokenizer(compose_config("quickstart_sft", f"root={world.root}").model)
    return tokenizer, Suite.load(EvalConfig(suite="own", own=own, **more), tokenizer, limit)


def test_answers_are_scored_described_and_shown(world: World, tmp_path: Path) -> None:
    tokenizer, suite = suite_of(world, tmp_path, 64, num_examples_shown=3)
    sampler = Says(tokenizer, ["one", "three", "three", ""])
    metrics, samples = suite.ask(sampler, step=6)
    assert sampler.asked == [(1, True)]
    assert metrics["eval/score"] == metrics["eval/score/task_own"] == 50
    assert (metrics["eval/no_answer"], metrics["eval/verifier_errors"]) == (0.25, 0)
    shown = [(s.facts["step"], s.facts["reference"], s.facts["right"]) for s in samples]
    assert shown == [(7, "one", True), (7, "two", False), (7, "three", True)]
    assert all(sample.is_answer and sample.mean_kl is None for sample in samples)
    again = suite.ask(Says(tokenizer, ["one", "two", "three", "vier"]), step=8)
    assert again[0]["eval/score"] == 100  # nothing is kept of the first time


def test_rows_that_are_not_asked_are_said_with_the_reason(
    world: World, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    suite_of(world, tmp_path, 64)
    assert "left out" not in capsys.readouterr().out
    suite_of(world, tmp_path, 64, without=["two"])
    assert "own of stage.eval: 1 of 4 rows left out: 1 as row 1 has no answer\n" in (
        capsys.readouterr().out
    )


def test_a_suite_may_be_sampled_n_times(world: World, tmp_path: Path) -> None:
    tokenizer, suite = suite_of(world, tmp_path, 64, greedy=False, responses_per_prompt=3)
    sampler = Says(tokenizer, ["one"] * 4)
    assert suite.ask(sampler, step=0)[0]["eval/score"] == 25
    assert sampler.asked == [(3, False)]


def test_questions_that_are_all_too_long_are_refused(world: World, tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"own: 4 of 4 questions of stage.eval.suite have more th"):
        suite_of(world, tmp_path, 3)


def test_without_a_suite_nothing_is_asked(world: World) -> None:
    tokenizer = load_tokenizer(compose_config("quickstart_sft", f"root={world.root}").model)
    suite = Suite.load(EvalConfig(), tokenizer, 64)
    assert not suite
    assert suite.ask(Sampler(), step=0) == ({}, [])
