"""Samples of a step: which, and each token's KL as the loss found it."""

import dataclasses
from pathlib import Path
from typing import Any

import pytest
import torch

from marco_train.config.opd import Objective
from marco_train.config.tracking import LoggingConfig
from marco_train.data.chat import Tokenizer
from marco_train.data.packing import pack_rollouts
from marco_train.evaluation.samples import SampleRecorder, token_texts, varied
from marco_train.types import (
    FinishReason,
    LossOutput,
    Microbatch,
    PolicyOutput,
    Prompt,
    Rollout,
    ScoredRollout,
    TokenScores,
)
from tests.helpers.tokenizers import tokenizer_of
from tests.helpers.world import World


def rollout(index: int, response: list[int], category: str = "math", sample: int = 0) -> Rollout:
    prompt = Prompt(index, [7, 8, 9 + index], "source", category, "en")
    lps = [-1.0] * len(response)
    return Rollout(prompt, sample, response, lps, [[]] * len(response), FinishReason.stop, 0)


def scored(found: Rollout, *logprobs: float) -> ScoredRollout:
    return ScoredRollout(found, TokenScores(torch.tensor(logprobs)))


def loss(_: PolicyOutput, microbatch: Any) -> LossOutput:
    """A KL of sampler against teacher, as the sampled objective reports it."""
    kl = microbatch.sampler_logprobs - microbatch.teacher_logprobs
    return LossOutput(kl.sum(), {"kl/reverse": kl}, {})


def samples_of(
    recorder: SampleRecorder, step: int, given: list[ScoredRollout], max_tokens: int
) -> list[dict[str, Any]]:
    watched = recorder.watching(step, given, loss)
    nothing: Any = None
    for microbatch in pack_rollouts(given, Objective.sampled, max_tokens):
        assert isinstance(microbatch, Microbatch)
        found = watched(nothing, microbatch)
        assert torch.equal(found.loss, loss(nothing, microbatch).loss)
    return [sample.facts for sample in recorder.collected(step)]


@pytest.fixture
def tokenizer(world: World) -> Tokenizer:
    return tokenizer_of(Path(world.path("data", "tokenizer")))


def logging(every: int | None, count: int = 4) -> LoggingConfig:
    return LoggingConfig(backends=[], samples_every=every, num_samples=count)


@pytest.mark.parametrize("max_tokens", [7, 12, 100])
def test_each_token_has_the_kl_that_its_update_had(max_tokens: int, tokenizer: Tokenizer) -> None:
    given = [
        scored(rollout(0, [40, 41, 42]), -1.5, -3.0, -1.0),
        scored(rollout(1, [50]), -2.0),
        scored(rollout(2, [60, 61]), float("nan"), -1.25),
    ]
    found = samples_of(SampleRecorder(logging(5), tokenizer), 4, given, max_tokens)
    assert [sample["kl"] for sample in found] == [[0.5, 2.0, 0.0], [1.0], [None, 0.25]]
    assert [sample["step"] for sample in found] == [5, 5, 5]
    assert "".join(found[0]["tokens"]) == tokenizer.decode([40, 41, 42])
    assert found[0]["prompt"] == tokenizer.decode([7, 8, 9])


def test_samples_are_taken_at_their_steps_alone(tokenizer: Tokenizer) -> None:
    given = [scored(rollout(0, [40]), -1.5)]
    recorder = SampleRecorder(logging(5), tokenizer)
    assert recorder.watching(3, given, loss) is loss
    taken = [step for step in range(12) if samples_of(recorder, step, given, 100)]
    assert taken == [4, 9]
    assert samples_of(SampleRecorder(logging(None), tokenizer), 4, given, 100) == []


def test_a_response_that_was_left_out_of_the_loss_is_no_sample(tokenizer: Tokenizer) -> None:
    given = [scored(rollout(0, [40]), -1.5), scored(rollout(1, [41]), -1.5)]
    recorder = SampleRecorder(logging(1), tokenizer)
    watched = recorder.watching(0, given, loss)
    nothing: Any = None
    watched(nothing, pack_rollouts(given[1:], Objective.sampled, 100)[0])
    assert [sample.facts["kl"] for sample in recorder.collected(0)] == [[0.5]]


def test_a_sample_is_a_page_too(tokenizer: Tokenizer) -> None:
    recorder = SampleRecorder(logging(1), tokenizer)
    samples_of(recorder, 0, [scored(rollout(0, [40]), -2.0)], 100)
    (sample,) = recorder.collected(0)
    assert 'title="1"' in sample.html and sample.mean_kl == 1.0
    nothing_known = dataclasses.replace(sample, facts=sample.facts | {"kl": [None]})
    assert nothing_known.mean_kl is None


def test_samples_are_of_as_many_categories_as_there_are() -> None:
    given = [
        rollout(3, [1], "b"),
        rollout(0, [1], "a"),
        rollout(1, [1], "a", sample=1),
        rollout(2, [1], "a"),
    ]
    assert [(r.prompt.index, r.prompt.category) for r in varied(given, 2)] == [(0, "a"), (3, "b")]
    assert [r.prompt.index for r in varied(given, 9)] == [0, 3, 2]


@pytest.mark.parametrize("text", ["مرحبا 8", "日本語", "a\nb  c", "👩‍👩‍👧", "", "\ufffd\ufffd"])
def test_the_texts_of_tokens_join_to_the_whole(text: str, tokenizer: Tokenizer) -> None:
    ids = tokenizer.of_transformers.encode(text)
    found = token_texts(tokenizer, ids)
    assert len(found) == len(ids)
    assert "".join(found) == tokenizer.decode(ids) == text


def test_what_is_no_text_is_shown_all_the_same(tokenizer: Tokenizer) -> None:
    torn = tokenizer.of_transformers.encode("م")[:1]  # one byte of two
    found = token_texts(tokenizer, torn * 20)
    assert len(found) == 20 and set("".join(found)) == {"\ufffd"}
    assert any(found[:10])
    assert token_texts(tokenizer, torn) == ["\ufffd"]
