"""Sequences end to end, shifted once."""

from dataclasses import replace

import pytest
import torch

from marco_train.config.opd import Objective
from marco_train.data.packing import pack_examples, pack_rollouts
from marco_train.types import (
    Example,
    FinishReason,
    FullMicrobatch,
    HiddenScores,
    Prompt,
    Rollout,
    SampledMicrobatch,
    ScoredRollout,
    TokenScores,
    TopKMicrobatch,
    TopKScores,
)


def test_two_examples_are_joined_and_shifted_within_themselves() -> None:
    examples = [
        Example([1, 2, 3], [False, True, True]),
        Example([4, 5, 6, 7], [False, False, False, True]),
    ]
    (batch,) = pack_examples(examples, max_tokens=16)
    # The longest comes first.
    assert batch.input_ids.tolist() == [[4, 5, 6, 1, 2]]
    assert batch.position_ids.tolist() == [[0, 1, 2, 0, 1]]
    assert batch.targets.tolist() == [5, 6, 7, 2, 3]
    assert batch.loss_places.tolist() == [2, 3, 4]
    assert batch.num_loss_tokens == 3


def test_the_budget_bounds_each_microbatch_and_loses_nothing() -> None:
    lengths = [9, 3, 8, 2, 5, 5, 7, 4]
    examples = [Example(list(range(n)), [True] * n) for n in lengths]
    batches = pack_examples(examples, max_tokens=10)
    assert all(batch.input_ids.shape[1] <= 10 for batch in batches)
    assert sum(batch.num_loss_tokens for batch in batches) == sum(n - 1 for n in lengths)
    assert len(batches) == 4  # 35 inputs, ten at a time


def rollout(prompt: list[int], response: list[int], logprobs: list[float]) -> Rollout:
    asked = Prompt(0, prompt, "s", "c", "en")
    return Rollout(asked, 0, response, logprobs, [], FinishReason.stop, 0)


def test_scores_stand_at_the_tokens_they_belong_to() -> None:
    scored = [
        ScoredRollout(
            rollout([1, 2], [3, 4], [-0.5, -0.25]), TokenScores(torch.tensor([-1.0, -2.0]))
        ),
        ScoredRollout(rollout([5, 6, 7], [8], [-0.125]), TokenScores(torch.tensor([-3.0]))),
    ]
    (batch,) = pack_rollouts(scored, Objective.sampled, max_tokens=16)
    assert isinstance(batch, SampledMicrobatch)
    assert batch.input_ids.tolist() == [[1, 2, 3, 5, 6, 7]]
    assert batch.targets.tolist() == [2, 3, 4, 6, 7, 8]
    assert batch.loss_places.tolist() == [1, 2, 5]
    assert batch.sampler_logprobs.tolist() == [-0.5, -0.25, -0.125]
    assert batch.teacher_logprobs.tolist() == [-1, -2, -3]


def test_hidden_states_lie_in_the_order_of_the_loss_tokens() -> None:
    scored = [
        ScoredRollout(rollout([1], [2], [-1.0]), HiddenScores(torch.full((1, 4), 1.0))),
        ScoredRollout(rollout([3], [4, 5], [-1.0, -2.0]), HiddenScores(torch.full((2, 4), 2.0))),
    ]
    (batch,) = pack_rollouts(scored, Objective.full, max_tokens=16)
    assert isinstance(batch, FullMicrobatch)
    assert batch.targets[batch.loss_places].tolist() == [4, 5, 2]
    assert batch.teacher_hidden[:, 0].tolist() == [2, 2, 1]


def test_likeliest_tokens_lie_in_the_order_of_the_loss_tokens() -> None:
    def scores(*rows: list[int]) -> TopKScores:
        return TopKScores(
            torch.tensor(rows), -torch.tensor(rows).float(), torch.tensor(rows)[:, 0].float()
        )

    scored = [
        ScoredRollout(rollout([1], [2], [-1.0]), scores([7, 8])),
        ScoredRollout(rollout([3], [4, 5], [-1.0, -2.0]), scores([5, 6], [9, 1])),
    ]
    (batch,) = pack_rollouts(scored, Objective.topk, max_tokens=16)
    assert isinstance(batch, TopKMicrobatch)
    assert batch.targets[batch.loss_places].tolist() == [4, 5, 2]
    assert batch.topk_ids.tolist() == [[5, 6], [9, 1], [7, 8]]
    assert batch.teacher_topk_logprobs.tolist() == [[-5, -6], [-9, -1], [-7, -8]]
    assert batch.sampler_logprobs.tolist() == [-1, -2, -1]
    assert batch.topk_overlap.tolist() == [5, 9, 7]


def test_no_rollouts_at_all_still_make_a_microbatch() -> None:
    for objective in Objective:
        (batch,) = pack_rollouts([], objective, max_tokens=16)
        assert batch.num_loss_tokens == 0


def scores_for(objective: Objective, count: int) -> TokenScores | TopKScores | HiddenScores:
    match objective:
        case Objective.sampled:
            return TokenScores(torch.zeros(count))
        case Objective.topk:
            ids = torch.zeros(count, 2, dtype=torch.int64)
            return TopKScores(ids, torch.zeros(count, 2), torch.zeros(count))
        case Objective.full:
            return HiddenScores(torch.zeros(count, 4))


@pytest.mark.parametrize("objective", Objective, ids=lambda objective: objective.value)
def test_experts_stand_at_the_inputs_that_took_them(objective: Objective) -> None:
    scored = []
    for number, lengths in enumerate([(2, 3), (4, 1), (1, 6)]):
        total = sum(lengths)
        ids = list(range(10 * number, 10 * number + total))
        plain = rollout(ids[: lengths[0]], ids[lengths[0] :], [0.0] * lengths[1])
        # In three layers, experts that tell of the token that took them.
        taken = 100 * torch.tensor(ids[:-1])[:, None, None] + torch.arange(6).view(3, 2)
        plain = replace(plain, topk_ids=[[0, 0]] * lengths[1], routed_experts=taken.short())
        scored.append(ScoredRollout(plain, scores_for(objective, lengths[1])))
    one, two = pack_rollouts(scored, objective, max_tokens=10)
    for batch in (one, two):
        assert batch.routed_experts.dtype == torch.int64
        assert batch.routed_experts.shape == (3, batch.num_tokens, 2)
        for token, experts in zip(
            batch.input_ids[0].tolist(), batch.routed_experts.unbind(1), strict=True
        ):
            assert experts.flatten().tolist() == [100 * token + place for place in range(6)]
    assert (one.num_tokens, two.num_tokens) == (10, 4)


def test_without_replay_or_without_rollouts_there_are_no_experts() -> None:
    plain = ScoredRollout(rollout([1], [2], [-1.0]), TokenScores(torch.zeros(1)))
    for scored in ([plain], []):
        (batch,) = pack_rollouts(scored, Objective.sampled, max_tokens=16)
        assert batch.routed_experts.numel() == 0
    (batch,) = pack_examples([Example([1, 2], [True] * 2)], max_tokens=16)
    assert batch.routed_experts.numel() == 0


NAN = float("nan")


def test_places_that_the_teacher_did_not_score_have_no_loss() -> None:
    one = rollout([1, 2], [3, 4, 5], [-0.1, -0.2, -0.3])
    other = replace(rollout([6, 6, 6], [7, 8], [-0.4, -0.5]), sample_index=1)
    empty = replace(rollout([9, 9], [], []), sample_index=2)

    def scored_by(*scores: TokenScores | TopKScores) -> list[ScoredRollout]:
        return [ScoredRollout(r, s) for r, s in zip((one, other, empty), scores, strict=True)]

    tokens = scored_by(
        TokenScores(torch.tensor([-1.0, NAN, -3.0])),
        TokenScores(torch.tensor([NAN, -5.0])),
        TokenScores(torch.zeros(0)),
    )
    # In whichever order they come, those of one length are laid by prompt and sample.
    (sampled,) = pack_rollouts(tokens[::-1], Objective.sampled, max_tokens=16)
    assert isinstance(sampled, SampledMicrobatch)
    assert sampled.targets[sampled.loss_places].tolist() == [3, 5, 8]
    assert sampled.num_loss_tokens == len(sampled.group_ids) == 3
    found = sampled.sampler_logprobs, sampled.teacher_logprobs
    torch.testing.assert_close(torch.stack(found), torch.tensor([[-0.1, -0.3, -0.5], [-1, -3, -5]]))

    def likeliest(logprobs: list[list[float]]) -> TopKScores:
        count = len(logprobs)
        ids = torch.arange(2 * count).view(count, 2)
        return TopKScores(ids, torch.tensor(logprobs).view(count, 2), torch.arange(count) / 4)

    (topk,) = pack_rollouts(
        scored_by(
            likeliest([[-1.0, -2.0], [-1.0, NAN], [-3.0, -4.0]]),
            likeliest([[NAN, NAN], [-5.0, -6.0]]),
            likeliest([]),
        ),
        Objective.topk,
        max_tokens=16,
    )
    assert isinstance(topk, TopKMicrobatch)
    assert topk.targets[topk.loss_places].tolist() == [3, 5, 8]
    assert topk.topk_ids.tolist() == [[0, 1], [4, 5], [2, 3]]
    assert topk.teacher_topk_logprobs.tolist() == [[-1, -2], [-3, -4], [-5, -6]]
    assert topk.topk_overlap.tolist() == [0, 0.5, 0.25]
    assert len(topk.group_ids) == 3
