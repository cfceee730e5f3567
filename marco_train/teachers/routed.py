"""Several teachers at once: each rollout goes to the one for its category or language."""

from collections.abc import Mapping, Sequence

from torch import Tensor

from marco_train.teachers.base import Teacher
from marco_train.types import Rollout, ScoredRollout, rollout_groups


class RoutedTeacher:
    """A default teacher, and others for some categories or languages.

    A rollout's category is looked up before its language.
    """

    def __init__(self, default: Teacher, others: Mapping[str, Teacher]) -> None:
        """Name the others by group, as `category_math` or `language_de`."""
        self._default = default
        self._others = others

    @property
    def head(self) -> Tensor:
        """Weights of the default teacher's output head; only objectives without one are routed."""
        return self._default.head

    def score(self, rollouts: Sequence[Rollout]) -> list[ScoredRollout]:
        """Score this rank's rollouts, in their order; every rank asks every teacher."""
        rows: dict[str | None, list[int]] = {group: [] for group in (None, *self._others)}
        for row, rollout in enumerate(rollouts):
            found = [group for group in rollout_groups(rollout) if group in self._others]
            rows[found[0] if found else None].append(row)
        scored: dict[int, ScoredRollout] = {}
        for group, members in rows.items():
            teacher = self._default if group is None else self._others[group]
            found_scores = teacher.score([rollouts[row] for row in members])
            scored |= dict(zip(members, found_scores, strict=True))
        return [scored[row] for row in range(len(rollouts))]
