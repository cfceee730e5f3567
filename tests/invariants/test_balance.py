"""Ranks learn from as many tokens each, whatever the lengths of their own responses."""

from collections.abc import Sequence

import numpy as np
import pytest
import torch

from marco_train.config.opd import Objective
from marco_train.data.packing import pack_rollouts
from marco_train.distributed import rank
from marco_train.rollout.balance import balance_ranks, choose_moves
from marco_train.types import (
    FinishReason,
    HiddenScores,
    Prompt,
    Rollout,
    ScoredRollout,
    Scores,
    TokenScores,
    TopKScores,
)
from tests.helpers.ranks import run_on_ranks

pytestmark = pytest.mark.slow


@pytest.mark.parametrize(
    ("lengths", "moves"),
    [
        ([[5, 5], [5, 5]], []),
        ([[9], [1]], []),  # nothing fits
        ([[4, 2, 6], []], [(0, 1, 2)]),
        ([[3, 3, 3, 3], [2], [1]], [(0, 1, 1), (0, 2, 0)]),  # 12, 2, 1; 9, 2, 4; 6, 5, 4
        ([[], [], []], []),
        ([[7, 1, 1, 1], [], [2]], [(0, 1, 0)]),  # 10, 0, 2; 3, 7, 2
    ],
)
def test_the_fullest_gives_to_the_emptiest_what_leaves_them_most_alike(
    lengths: list[list[int]], moves: list[tuple[int, int, int]]
) -> None:
    assert choose_moves(lengths) == moves


def test_lengths_of_responses_are_evened_out_to_a_hundredth() -> None:
    drawn = np.random.default_rng(0).lognormal(7, 1, (8, 64)).clip(1, 8192).astype(int).tolist()
    before = [sum(of) for of in drawn]
    held = {(home, place): home for home, of in enumerate(drawn) for place in range(len(of))}
    for home, taker, place in choose_moves(drawn):
        held[home, place] = taker
    after = [sum(drawn[h][p] for (h, p), at in held.items() if at == r) for r in range(8)]
    mean = sum(before) / 8
    assert max(before) > 1.15 * mean
    assert max(after) <= 1.01 * mean and sum(after) == sum(before)


def scored(index: int, length: int, scores: Scores) -> ScoredRollout:
    """A response of one token less to a prompt of one, with its routing."""
    rollout = Rollout(
        Prompt(index, [index], "s", "c", "en"),
        0,
        [*range(length - 1)],
        [-0.1 * n - index for n in range(length - 1)],
        [],
        FinishReason.length,
        weight_version=3,
        routed_experts=torch.full((length - 1, 2, 1), index, dtype=torch.int16),
    )
    return ScoredRollout(rollout, scores)


def scores_of(objective: Objective, index: int, length: int) -> Scores:
    values = torch.arange(length - 1) / 7 - index
    match objective:
        case Objective.sampled:
            return TokenScores(values)
        case Objective.topk:
            ids = torch.full((length - 1, 2), index)
            return TopKScores(ids, values[:, None].repeat(1, 2), values)
    return HiddenScores(values[:, None].repeat(1, 4).bfloat16())


Described = tuple[tuple[int, int], list[int], list[float], list[object], list[object]]


def described(each: ScoredRollout) -> Described:
    tensors = [tensor.float().tolist() for tensor in vars(each.scores).values()]
    return (
        each.rollout.order,
        each.rollout.response_ids,
        each.rollout.sampler_logprobs,
        tensors,
        [str(each.rollout.routed_experts.dtype), each.rollout.routed_experts.tolist()],
    )


def dealt(lengths: Sequence[Sequence[int]], objective: Objective) -> tuple[list[Described], int]:
    """What a rank has after balancing, and its microbatches of eight tokens."""
    first = sum(len(of) for of in lengths[: rank()])
    mine = [
        scored(first + n, length, scores_of(objective, first + n, length))
        for n, length in enumerate(lengths[rank()])
    ]
    found = balance_ranks(mine)
    return [described(each) for each in found], len(pack_rollouts(found, objective, 8))


@pytest.mark.parametrize("objective", [*Objective])
def test_every_rollout_is_kept_once_as_it_was(objective: Objective) -> None:
    lengths = [[9, 9, 9, 9, 5], [4], []]
    of_ranks = run_on_ranks(3, dealt, lengths, objective)
    together = sorted(each for found, _ in of_ranks for each in found)
    every = [length for of in lengths for length in of]
    assert together == [
        described(scored(n, length, scores_of(objective, n, length)))
        for n, length in enumerate(every)
    ]
    assert [sum(len(each[1]) + 1 for each in found) for found, _ in of_ranks] == [14, 13, 18]
    assert {num for _, num in of_ranks} == {
        2
    }  # of eight tokens each; five on the first, unbalanced
