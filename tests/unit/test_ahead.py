"""Rollouts are asked for in time, handed out once, and refused where other weights sampled them."""

from collections.abc import Iterator, Sequence

import pytest

from marco_train.errors import StaleRolloutError
from marco_train.rollout.stream import RolloutStream
from marco_train.types import FinishReason, Prompt, Rollout
from tests.helpers.configs import compose_config


class Stub:
    """The part of a sampler that is asked; notes what."""

    def __init__(self) -> None:
        self.version = 0
        self.asked: list[tuple[int, int]] = []  # prompt and version

    def sample(self, prompts: Sequence[Prompt], num_responses: int) -> Iterator[Rollout]:
        self.asked += [(prompt.index, self.version) for prompt in prompts]
        reason, version = FinishReason.stop, self.version
        return iter(
            [
                Rollout(prompt, n, [2], [-0.1], [[]], reason, version)
                for prompt in prompts
                for n in range(num_responses)
            ]
        )


class Prompts:
    """One prompt a step."""

    def __init__(self) -> None:
        self.step = -1

    def __next__(self) -> list[Prompt]:
        self.step += 1
        return [Prompt(self.step, [5], "s", "c", "en")]

    def metrics(self) -> dict[str, float]:
        return {"data/epoch": self.step}


def stream_of(staleness: int) -> tuple[Stub, RolloutStream]:
    servers = ["rollout@stage.rollout=vllm_server", f"stage.rollout.max_staleness={staleness}"]
    cfg = compose_config("quickstart_opd", *(servers if staleness else [])).stage
    stub = Stub()
    return stub, RolloutStream(cfg, stub, Prompts())  # type: ignore[arg-type]


def indices(rollouts: Iterator[Rollout]) -> list[tuple[int, int]]:
    return [(r.prompt.index, r.sample_index) for r in rollouts]


@pytest.mark.parametrize("staleness", [0, 1])
def test_each_prompt_is_asked_once_by_the_weights_that_are_allowed(staleness: int) -> None:
    stub, stream = stream_of(staleness)
    for step in range(4):
        stub.version = step
        assert indices(stream.rollouts(step, until=4)) == [(step, 0), (step, 1)]
        said = {"rollout/staleness": min(step, staleness), "data/epoch": step}
        found = stream.metrics([])
        assert said.items() <= found.items() and "rollout/truncated" in found
    assert stub.asked == [(step, max(0, step - staleness)) for step in range(4)]


@pytest.mark.parametrize("staleness", [0, 1])
def test_a_response_of_other_weights_is_refused(staleness: int) -> None:
    stub, stream = stream_of(staleness)
    list(stream.rollouts(0, until=4))
    stub.version = 1  # and step 2 comes, without a sync between
    with pytest.raises(StaleRolloutError, match="a response of the weights of step"):
        list(stream.rollouts(2, until=4))


def test_a_sampler_in_the_trainers_process_does_not_sample_ahead() -> None:
    with pytest.raises(ValueError, match=r"no stage.rollout.max_staleness with .*=native; known"):
        compose_config("quickstart_opd", "stage.rollout.max_staleness=1")
