"""A cache of scores before a teacher that counts what it is asked."""

from collections import Counter
from collections.abc import Callable, Sequence
from pathlib import Path

import torch

from marco_train.config.opd import Objective, ScoreCacheConfig
from marco_train.teachers.base import ScoreSpec, Teacher, scores_from_hidden
from marco_train.teachers.cache import ScoreCache
from marco_train.types import FinishReason, Prompt, Rollout, ScoredRollout, Scores
from tests.helpers.teachers import wanted_of

WIDTH, VOCAB = 6, 20


class CountingTeacher(Teacher):
    """Scores from states that are a function of the ids, and counts what it was asked."""

    def __init__(self, wanted: ScoreSpec) -> None:
        self.head: torch.Tensor = torch.randn(
            VOCAB, WIDTH, generator=torch.Generator().manual_seed(3)
        )
        self.asked: list[list[int]] = []
        self.num_calls = 0
        self._wanted = wanted

    def score(self, rollouts: Sequence[Rollout]) -> list[ScoredRollout]:
        self.num_calls += 1
        if rollouts:
            self.asked.append([r.prompt.index for r in rollouts])
        return [ScoredRollout(r, self._scores(r)) for r in rollouts]

    def take_counts(self) -> Counter[str]:
        return Counter(rejected=1)

    def _scores(self, rollout: Rollout) -> Scores:
        generator = torch.Generator().manual_seed(sum(rollout.input_ids))
        hidden = torch.randn(len(rollout.response_ids), WIDTH, generator=generator)
        return scores_from_hidden(rollout, hidden, self.head, self._wanted)


def wanted_for(objective: Objective) -> ScoreSpec:
    return wanted_of(objective, top_k=3 if objective is Objective.topk else 0, vocab_size=VOCAB)


def rollout(index: int, num_response: int = 4) -> Rollout:
    generator = torch.Generator().manual_seed(index)
    response = torch.randint(0, VOCAB, (num_response,), generator=generator).tolist()
    likeliest = [torch.randperm(VOCAB, generator=generator)[:3].tolist() for _ in response]
    return Rollout(
        Prompt(index, [index, 1, 2], "s", "c", "en"),
        0,
        response,
        [-1.0] * num_response,
        likeliest,
        FinishReason.stop,
        weight_version=0,
    )


def cache(
    path: Path,
    objective: Objective = Objective.sampled,
    max_gib: float = 1.0,
    identity: str = "teacher",
    said: Sequence[float] = (-1.0, -2.0),
) -> tuple[ScoreCache, CountingTeacher]:
    wanted = wanted_for(objective)
    teacher = CountingTeacher(wanted)
    cfg = ScoreCacheConfig(path=str(path), max_gib=max_gib)
    teacher.identity = {"weights": identity}
    return ScoreCache(teacher, wanted, cfg, list(said), alike(said)), teacher


def alike(said: Sequence[float]) -> Callable[[list[float]], bool]:
    return lambda known: max(abs(a - b) for a, b in zip(known, said, strict=True)) <= 0.1
