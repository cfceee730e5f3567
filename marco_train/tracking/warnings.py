"""What a person should not overlook among a run's metrics, said once and not at every step."""

from collections.abc import Mapping

from marco_train.metrics import Metrics

# By metric: whether its values add up over the steps, and what is said.
WATCHED: Mapping[str, tuple[bool, str]] = {
    "moe/dead_experts": (False, "{count} experts, over all layers, got no token of a step"),
    "data/dropped_too_long": (True, "{count} rows over the length limit were dropped so far"),
    "data/dropped_no_loss": (True, "{count} rows without a token to learn were dropped so far"),
    "data/dropped_special": (True, "{count} rows with control tokens were dropped so far"),
    "data/dropped_empty": (True, "{count} rows with an empty answer were dropped so far"),
    "data/dropped_malformed": (True, "{count} rows at fault were dropped so far"),
    "teacher/rejected": (True, "{count} rollouts without a usable score were left out so far"),
    "teacher/cache_corrupt": (True, "{count} broken scores of the cache were made anew so far"),
}


class Watch:
    """Says that something went wrong, and again whenever there is twice as much of it."""

    def __init__(self) -> None:
        self._counts: dict[str, float] = {}
        self._said: dict[str, float] = {}

    def sentences(self, metrics: Metrics) -> list[str]:
        """Look at the metrics of a step; gives what is new."""
        found = []
        for name, (adds_up, sentence) in WATCHED.items():
            count = metrics.get(name, 0.0) + (self._counts.get(name, 0.0) if adds_up else 0.0)
            self._counts[name] = count
            if count > 0 and count >= 2 * self._said.get(name, 0.0):
                self._said[name] = count
                found.append(f"{sentence.format(count=f'{count:,.0f}')} ({name})")
        return found
