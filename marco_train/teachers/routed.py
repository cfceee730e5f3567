"""Several teachers at once: each rollout goes to the one for its category or language."""

from collections import Counter
from collections.abc import Iterable, Mapping

from torch import Tensor

from marco_train.teachers.base import Teacher
from marco_train.teachers.identity import Identity
from marco_train.types import Rollout, ScoredRollout, rollout_groups


class RoutedTeacher:
    """A default teacher, and others for some categories or languages.

    A rollout's category is looked up before its language. All are sampled before the first is
    scored, as the teachers answer in turn.
    """

    def __init__(self, default: Teacher, others: Mapping[str, Teacher]) -> None:
        """Name the others by group, as `category_math` or `language_de`."""
        self._default = default
        self._others = others
        self.head: Tensor | None = None  # an objective that needs one is not routed

    @property
    def identity(self) -> Identity:
        """The identities of all, by group."""
        of_group = {group: teacher.identity for group, teacher in self._others.items()}
        return {"default": self._default.identity} | of_group

    def score(self, rollouts: Iterable[Rollout]) -> list[ScoredRollout]:
        """Score this rank's rollouts, in their order; every rank asks every teacher."""
        rollouts = list(rollouts)
        rows: dict[str | None, list[int]] = {group: [] for group in (None, *self._others)}
        for row, rollout in enumerate(rollouts):
            found = [group for group in rollout_groups(rollout) if group in self._others]
            rows[found[0] if found else None].append(row)
        scored: dict[int, ScoredRollout] = {}
        for group, members in rows.items():
            teacher = self._default if group is None else self._others[group]
            row_of = {id(rollouts[row]): row for row in members}
            found_scores = teacher.score([rollouts[row] for row in members])
            scored |= {row_of[id(s.rollout)]: s for s in found_scores}
        return [scored[row] for row in sorted(scored)]

    def take_counts(self) -> Counter[str]:
        """What happened in all of them."""
        return sum((t.take_counts() for t in self._all()), Counter())

    def close(self) -> None:
        """Close all of them."""
        for teacher in self._all():
            teacher.close()

    def _all(self) -> list[Teacher]:
        return [self._default, *self._others.values()]
