"""Sequences to packed microbatches under a token budget, the same number on every rank.

Prompt and response are joined here, once, and inputs and targets are shifted here, once.
Legend: T packed tokens, N tokens with loss, R tokens of a response, D width of the teacher,
L layers, k experts a token.
"""

from collections.abc import Sequence
from dataclasses import replace

import torch
from torch import Tensor

from marco_train.config.opd import Objective
from marco_train.distributed import reduce_max
from marco_train.types import (
    GROUPED_BY,
    Example,
    FullMicrobatch,
    HiddenScores,
    Microbatch,
    Rollout,
    SampledMicrobatch,
    ScoredRollout,
    TokenScores,
    TopKMicrobatch,
    TopKScores,
    known_places,
    no_experts,
    rollout_groups,
)


def pack_examples(
    examples: Sequence[Example], max_tokens: int, samples: Sequence[int] = ()
) -> list[Microbatch]:
    """Pack this rank's examples of a global batch.

    Args:
        examples: The sequences.
        max_tokens: Of a microbatch.
        samples: Position of each example in the run's stream of samples; none of measures.
    """
    bins = _equal_bins([len(example.input_ids) for example in examples], max_tokens)
    return [
        replace(
            _join([examples[i] for i in members]),
            samples=tuple(samples[i] for i in members) if samples else (),
        )
        for members in bins
    ]


def pack_rollouts(
    scored: Sequence[ScoredRollout], objective: Objective, max_tokens: int
) -> Sequence[Microbatch]:
    """Pack this rank's scored rollouts of a global batch.

    Every response token has loss whose place the teacher scored.
    """
    # An update is the same in whichever order its rollouts ended.
    scored = sorted(scored, key=lambda s: s.rollout.order)
    bins = _equal_bins([len(s.rollout.input_ids) for s in scored], max_tokens)
    packed = [[scored[i] for i in members] for members in bins]
    make = {
        Objective.sampled: _sampled_microbatch,
        Objective.topk: _topk_microbatch,
        Objective.full: _full_microbatch,
    }[objective]
    return [make(members) for members in packed]


def _sampled_microbatch(scored: Sequence[ScoredRollout]) -> SampledMicrobatch:
    scores = [s.scores for s in scored if isinstance(s.scores, TokenScores)]
    assert len(scores) == len(scored), "the teacher did not score tokens"
    joined, known = _join_rollouts(scored)
    return SampledMicrobatch(
        **vars(joined),
        sampler_logprobs=_sampler_logprobs(scored)[known],
        teacher_logprobs=_lay([s.teacher_logprobs for s in scores])[known],
    )


def _topk_microbatch(scored: Sequence[ScoredRollout]) -> TopKMicrobatch:
    scores = [s.scores for s in scored if isinstance(s.scores, TopKScores)]
    assert len(scores) == len(scored), "the teacher did not score the likeliest tokens"
    joined, known = _join_rollouts(scored)
    ids = [s.topk_ids for s in scores]
    logprobs = [s.teacher_topk_logprobs for s in scores]
    return TopKMicrobatch(
        **vars(joined),
        sampler_logprobs=_sampler_logprobs(scored)[known],
        topk_ids=torch.cat(ids)[known] if ids else torch.zeros(0, 0, dtype=torch.int64),
        teacher_topk_logprobs=torch.cat(logprobs)[known] if logprobs else torch.zeros(0, 0),
        topk_overlap=_lay([s.topk_overlap for s in scores])[known],
    )


def _full_microbatch(scored: Sequence[ScoredRollout]) -> FullMicrobatch:
    scores = [s.scores.teacher_hidden for s in scored if isinstance(s.scores, HiddenScores)]
    assert len(scores) == len(scored), "the teacher did not give hidden states"
    joined, known = _join_rollouts(scored)
    return FullMicrobatch(
        **vars(joined),
        sampler_logprobs=_sampler_logprobs(scored)[known],
        teacher_hidden=_lay(scores)[known],
    )


def _lay(values: Sequence[Tensor]) -> Tensor:
    """Join floats of the places of several responses; [0] without any."""
    return torch.cat(list(values)) if values else torch.zeros(0)


def _join_rollouts(scored: Sequence[ScoredRollout]) -> tuple[Microbatch, Tensor]:
    """Lay rollouts end to end and note the category and language of every token with loss.

    Returns:
        The tensors, and of all response tokens in their order which have loss, bool.
    """
    known_of = [known_places(s.scores) for s in scored]
    known = torch.cat([torch.zeros(0, dtype=torch.bool), *known_of])
    joined = _join(
        [_as_example(s.rollout, known) for s, known in zip(scored, known_of, strict=True)]
    )
    named = [rollout_groups(s.rollout) for s in scored]
    groups = tuple(sorted({name for names in named for name in names}))
    id_of = {name: number for number, name in enumerate(groups)}
    ids = [
        [id_of[name] for name in names] + [len(groups)] * (len(GROUPED_BY) - len(names))
        for names in named
    ]
    repeats = torch.tensor([int(k.sum()) for k in known_of], dtype=torch.int64)
    group_ids = torch.tensor(ids, dtype=torch.int64).view(len(scored), len(GROUPED_BY))
    group_ids = group_ids.repeat_interleave(repeats, dim=0)
    routed = _join_experts([s.rollout for s in scored])
    assert routed.numel() == 0 or routed.shape[1] == joined.num_tokens, "experts of other tokens"
    samples = tuple(s.rollout.prompt.index for s in scored)
    joined = replace(joined, groups=groups, group_ids=group_ids, routed_experts=routed)
    return replace(joined, samples=samples), known


def _join_experts(rollouts: Sequence[Rollout]) -> Tensor:
    """Lay the experts of rollouts end to end, as their inputs lie; [L, T, k] int64."""
    parts = [rollout.routed_experts for rollout in rollouts] or [no_experts()]
    return torch.cat(parts).long().transpose(0, 1).contiguous()


def _as_example(rollout: Rollout, known: Tensor) -> Example:
    return Example(rollout.input_ids, [False] * len(rollout.prompt.input_ids) + known.tolist())


def _sampler_logprobs(scored: Sequence[ScoredRollout]) -> Tensor:
    return torch.tensor([x for s in scored for x in s.rollout.sampler_logprobs])


def _join(examples: Sequence[Example]) -> Microbatch:
    """Lay sequences end to end; each loses its last input and its first target."""
    input_ids: list[int] = []
    positions: list[int] = []
    targets: list[int] = []
    loss_mask: list[bool] = []
    for example in examples:
        input_ids += example.input_ids[:-1]
        positions += range(len(example.input_ids) - 1)
        targets += example.input_ids[1:]
        loss_mask += example.loss_mask[1:]
    num_tokens = len(input_ids)
    if num_tokens == 0:
        # This rank has nothing left, and joins the others' passes with one token without loss.
        input_ids, positions, targets, loss_mask = [0], [0], [0], [False]
    return Microbatch(
        input_ids=torch.tensor([input_ids]),
        position_ids=torch.tensor([positions]),
        targets=torch.tensor(targets),
        loss_places=torch.tensor(loss_mask).nonzero()[:, 0],
        num_tokens=num_tokens,
        num_loss_tokens=sum(loss_mask),
        groups=(),
        group_ids=torch.zeros(sum(loss_mask), 0, dtype=torch.int64),
        routed_experts=no_experts().long(),
    )


def _equal_bins(lengths: Sequence[int], max_tokens: int) -> list[list[int]]:
    """Fill bins, longest first, each sequence into the first with room; as many on every rank."""
    bins: list[list[int]] = []
    room: list[int] = []
    for index in sorted(range(len(lengths)), key=lambda i: (-lengths[i], i)):
        needed = lengths[index] - 1  # the last token is only ever a target
        for number, left in enumerate(room):
            if needed <= left:
                bins[number].append(index)
                room[number] -= needed
                break
        else:
            assert needed <= max_tokens, f"{needed} tokens do not fit {max_tokens}"
            bins.append([index])
            room.append(max_tokens - needed)
    num_bins = max(1, reduce_max(len(bins)))
    return bins + [[] for _ in range(num_bins - len(bins))]
