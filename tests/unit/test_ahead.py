"""Rollouts are asked for in time, handed out once, and refused where other weights sampled them."""

from collections.abc import Iterator, Sequence

import pytest

from marco_train.errors import AwayError
from marco_train.rollout.stream import Ahead, StaleRolloutError
from marco_train.types import FinishReason, Prompt, Rollout
from tests.conftest import compose_config


class Stub:
    """The part of a sampler that is asked; notes what."""

    def __init__(self) -> None:
        self.version = 0
        self.asked: list[tuple[int, int]] = []  # prompt and version
        self.fails = 0

    def sample(self, prompts: Sequence[Prompt], num_responses: int) -> Iterator[Rollout]:
        self.asked += [(prompt.index, self.version) for prompt in prompts]
        return Responses(self, prompts, num_responses)


class Prompts:
    """One prompt a step."""

    def __init__(self) -> None:
        self.step = -1

    def __next__(self) -> list[Prompt]:
        self.step += 1
        return [Prompt(self.step, [5], "s", "c", "en")]

    def metrics(self) -> dict[str, float]:
        return {"data/epoch": self.step}


class Responses:
    """Ends with an error as often as the sampler says, before its second response."""

    def __init__(self, stub: Stub, prompts: Sequence[Prompt], num_responses: int) -> None:
        reason, version = FinishReason.stop, stub.version
        self._all = [
            Rollout(prompt, n, [2], [-0.1], [[]], reason, version)
            for prompt in prompts
            for n in range(num_responses)
        ]
        self._stub = stub
        self._given = 0

    def __iter__(self) -> "Responses":
        return self

    def __next__(self) -> Rollout:
        if self._given == 1 and self._stub.fails:
            self._stub.fails -= 1
            raise AwayError("away", final=False)
        if self._given == len(self._all):
            raise StopIteration
        self._given += 1
        return self._all[self._given - 1]


def ahead_of(staleness: int) -> tuple[Stub, Ahead]:
    servers = ["rollout@stage.rollout=vllm_server", f"stage.rollout.max_staleness={staleness}"]
    cfg = compose_config("quickstart_opd", *(servers if staleness else [])).stage
    stub = Stub()
    return stub, Ahead(cfg, stub, Prompts())  # type: ignore[arg-type]


def indices(rollouts: Iterator[Rollout]) -> list[tuple[int, int]]:
    return [(r.prompt.index, r.sample_index) for r in rollouts]


@pytest.mark.parametrize("staleness", [0, 1])
def test_each_prompt_is_asked_once_by_the_weights_that_are_allowed(staleness: int) -> None:
    stub, ahead = ahead_of(staleness)
    for step in range(4):
        ahead.settle()
        stub.version = step
        assert indices(ahead.rollouts(step, until=4)) == [(step, 0), (step, 1)]
        said = {"rollout/staleness": min(step, staleness), "data/epoch": step}
        assert ahead.metrics() == said
    assert stub.asked == [(step, max(0, step - staleness)) for step in range(4)]


def test_what_was_asked_ahead_survives_servers_that_are_away() -> None:
    stub, ahead = ahead_of(1)
    assert indices(ahead.rollouts(0, until=4)) == [(0, 0), (0, 1)]
    stub.fails = 2
    for _ in range(2):
        with pytest.raises(AwayError):
            ahead.settle()
    ahead.settle()
    ahead.settle()  # once more changes nothing
    stub.version = 1
    assert indices(ahead.rollouts(1, until=4)) == [(1, 0), (1, 1)]


@pytest.mark.parametrize("staleness", [0, 1])
def test_a_response_of_other_weights_is_refused(staleness: int) -> None:
    stub, ahead = ahead_of(staleness)
    list(ahead.rollouts(0, until=4))
    ahead.settle()
    stub.version = 1  # and step 2 comes, without a sync between
    with pytest.raises(StaleRolloutError, match="a response of the weights of step"):
        list(ahead.rollouts(2, until=4))


def test_a_sampler_in_the_trainers_process_does_not_sample_ahead() -> None:
    with pytest.raises(ValueError, match=r"no stage.rollout.max_staleness with .*=native; known"):
        compose_config("quickstart_opd", "stage.rollout.max_staleness=1")
