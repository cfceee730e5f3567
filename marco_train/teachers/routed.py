"""Several teachers at once: each rollout goes to the one for its category or language."""

from collections import Counter, deque
from collections.abc import Iterable, Mapping, Sequence

from marco_train.teachers.base import Submitted, Teacher
from marco_train.types import Rollout, ScoredRollout, rollout_groups


class RoutedTeacher(Teacher):
    """A default teacher, and others for some categories or languages.

    A rollout's category is looked up before its language. All are sampled before the first is
    scored.
    """

    def __init__(self, default: Teacher, others: Mapping[str, Teacher]) -> None:
        """Name the others by group, as `category_math` or `language_de`."""
        self._default = default
        self._others = others
        self.head = None  # an objective that needs one is not routed
        of_group = {group: teacher.identity for group, teacher in others.items()}
        self.identity = {"default": default.identity} | of_group

    def score(self, rollouts: Sequence[Rollout]) -> list[ScoredRollout]:
        """Score this rank's rollouts, in their order; every rank asks every teacher."""
        return self.collect(self.submit(rollouts))

    def submit(self, rollouts: Iterable[Rollout]) -> Submitted:
        """Give each rollout to its teacher."""
        members: dict[str | None, list[Rollout]] = {group: [] for group in (None, *self._others)}
        rollouts = list(rollouts)
        for rollout in rollouts:
            members[self._group(rollout)].append(rollout)
        asked: dict[str | None, Submitted] = {None: self._default.submit(members[None])}
        for group, teacher in self._others.items():
            asked |= {group: teacher.submit(members[group])}
        return Submitted(rollouts, asked)

    def collect(self, submitted: Submitted) -> list[ScoredRollout]:
        """Score this rank's rollouts, in their order; every rank asks every teacher."""
        asked = submitted.asked or self.submit(submitted.rollouts).asked
        scored = {
            group: deque((self._others[group] if group else self._default).collect(each))
            for group, each in asked.items()
        }
        found = []
        for rollout in submitted.rollouts:
            coming = scored[self._group(rollout)]
            if coming and coming[0].rollout is rollout:  # else it was left out
                found.append(coming.popleft())
        return found

    def _group(self, rollout: Rollout) -> str | None:
        """Whose teacher scores a rollout; None is the default's."""
        return next((group for group in rollout_groups(rollout) if group in self._others), None)

    def take_counts(self) -> Counter[str]:
        """What happened in all of them."""
        return sum((t.take_counts() for t in self._all()), Counter())

    def close(self) -> None:
        """Close all of them."""
        for teacher in self._all():
            teacher.close()

    def _all(self) -> list[Teacher]:
        return [self._default, *self._others.values()]
