"""What a person should not overlook among a run's metrics, said once and not at every step."""

from collections.abc import Mapping
from typing import Any

from marco_train.metrics import Metrics

DROPPED = " were dropped in this launch"
# By metric: whether its values add up over the steps, and what is said above 0, or above a bound.
WATCHED: Mapping[str, tuple[bool, str]] = {
    "moe/dead_experts": (False, "{count:,.0f} experts, over all layers, got no token of a step"),
    # A row is dropped again each time it is drawn, and which one it is no metric says.
    "data/dropped_too_long": (True, "{count:,.0f} draws of rows over {limit}" + DROPPED),
    "data/dropped_no_loss": (True, "{count:,.0f} draws of rows without a token to learn" + DROPPED),
    "data/dropped_special": (True, "{count:,.0f} draws of rows with control tokens" + DROPPED),
    "data/dropped_empty": (True, "{count:,.0f} draws of rows with an empty answer" + DROPPED),
    "data/dropped_malformed": (True, "{count:,.0f} draws of rows at fault" + DROPPED),
    "teacher/rejected": (True, "{count:,.0f} rollouts without a usable score were left out so far"),
    "teacher/cache_corrupt": (
        True,
        "{count:,.0f} broken scores of the cache were made anew so far",
    ),
    "kl/sampler_mismatch": (
        False,
        "log-probabilities of sampler and policy differ by {count:.2g} nats a token in the mean",
    ),
}
# What bfloat16 alone may do is no fault. `stage.max_sampler_mismatch` ends a run.
BOUNDS: Mapping[str, float] = {"kl/sampler_mismatch": 0.1}


class Watch:
    """Says that something went wrong, and again whenever there is twice as much of it."""

    def __init__(self, run_config: Mapping[str, Any]) -> None:
        stage = run_config.get("stage", {})
        named = (key for key in ("max_length", "max_prompt_length") if key in stage)
        key = next(named, None)
        self._limit = "the length limit" if key is None else f"stage.{key}={stage[key]}"
        self._counts: dict[str, float] = {}
        self._said: dict[str, float] = {}

    def sentences(self, metrics: Metrics) -> list[str]:
        """Look at the metrics of a step; gives what is new."""
        found = []
        for name, (adds_up, sentence) in WATCHED.items():
            count = metrics.get(name, 0.0) + (self._counts.get(name, 0.0) if adds_up else 0.0)
            self._counts[name] = count
            if count > BOUNDS.get(name, 0.0) and count >= 2 * self._said.get(name, 0.0):
                self._said[name] = count
                found.append(f"{sentence.format(count=count, limit=self._limit)} ({name})")
        return found
