"""AdamW, its schedule, and the losses of the routers."""

import math
from dataclasses import dataclass
from enum import Enum

from omegaconf import II, MISSING

from marco_train.errors import require, require_positive


class Schedule(Enum):
    """Shape of the learning rate after warm-up."""

    cosine = "cosine"
    linear = "linear"
    constant = "constant"


class BalanceScope(Enum):
    """Over which tokens the balance loss takes the experts' loads."""

    microbatch = "microbatch"
    global_batch = "global_batch"


@dataclass(kw_only=True)
class OptimConfig:
    """AdamW and its schedule."""

    learning_rate: float = MISSING
    """At its peak, after the warm-up."""
    min_learning_rate: float = II("optim.learning_rate")
    """Where cosine and linear end; the constant schedule has no other rate."""
    schedule: Schedule = Schedule.constant
    warmup_steps: int = 0
    """Updates over which the rate rises to `learning_rate`."""
    warmup_share: float | None = None
    """The same as a share of the run's updates, in place of `warmup_steps`. None: those say it."""
    beta1: float = 0.9  # Marco-MoE section 4.1
    """Share of the first moment that an update keeps."""
    beta2: float = 0.95  # Marco-MoE section 4.1
    """Share of the second moment that an update keeps."""
    eps: float = 1e-8
    """Added to the root of the second moment."""
    weight_decay: float = 0.0
    """On matrices; norms are not decayed."""
    clip_norm: float = 1.0
    """Bound on the global gradient norm."""
    # Both are off in the paper's framework unless asked for, and the paper states neither.
    balance_coefficient: float = 0.0
    """Of the load-balancing loss, summed over layers; see `losses/balance.py`. 0: off."""
    balance_scope: BalanceScope = BalanceScope.global_batch
    router_z_coefficient: float = 0.0
    """Of the router z-loss, summed over layers. 0: off."""
    max_skipped_in_a_row: int = 3
    """Updates in a row that may be left out, as their loss or gradient is not finite or a spike;
    one more ends the run."""
    spike_factor: float | None = None
    """An update is left out whose loss or gradient norm is over so many times its median over the
    last `spike_window` updates that were made; judged once there are as many, and in each phase of
    a cascade anew. None: off."""
    spike_window: int = 64
    """Updates whose median `spike_factor` is compared with."""

    def __post_init__(self) -> None:
        require_positive(
            "optim", learning_rate=self.learning_rate, eps=self.eps, clip_norm=self.clip_norm
        )
        require(self.warmup_steps >= 0, f"optim.warmup_steps is {self.warmup_steps}, below 0")
        if self.warmup_share is not None:
            require(
                0 <= self.warmup_share <= 1,
                f"optim.warmup_share is {self.warmup_share}, and must be a share from 0 to 1",
            )
            require(
                self.warmup_steps == 0,
                f"optim.warmup_share is {self.warmup_share} and optim.warmup_steps is "
                f"{self.warmup_steps}: give one of them, and null or 0 for the other",
            )
        require(
            self.max_skipped_in_a_row >= 0,
            f"optim.max_skipped_in_a_row is {self.max_skipped_in_a_row}, below 0",
        )
        require(
            self.spike_factor is None or 1 < self.spike_factor < float("inf"),
            f"optim.spike_factor is {self.spike_factor}, and must be above 1, or null for off",
        )
        require_positive("optim", spike_window=self.spike_window)
        for name, coefficient in (
            ("balance_coefficient", self.balance_coefficient),
            ("router_z_coefficient", self.router_z_coefficient),
        ):
            require(
                0 <= coefficient < float("inf"),
                f"optim.{name} is {coefficient}, and must be a number from 0 (off) upwards",
            )
        require(
            0 <= self.weight_decay < float("inf"),
            f"optim.weight_decay is {self.weight_decay}, and must be a number from 0 upwards",
        )
        for name, beta in (("beta1", self.beta1), ("beta2", self.beta2)):
            require(0 <= beta < 1, f"optim.{name} is {beta}, and must lie in [0, 1)")
        require(
            0 <= self.min_learning_rate <= self.learning_rate,
            f"optim.min_learning_rate {self.min_learning_rate} is above optim.learning_rate "
            f"{self.learning_rate}",
        )
        require(
            self.schedule is not Schedule.constant or self.min_learning_rate == self.learning_rate,
            "optim.schedule is constant, so optim.min_learning_rate "
            f"{self.min_learning_rate} must equal optim.learning_rate {self.learning_rate}",
        )
        require(
            self.schedule is Schedule.constant or self.min_learning_rate < self.learning_rate,
            f"optim.schedule is {self.schedule.value}, and optim.min_learning_rate "
            f"{self.min_learning_rate} is no less than optim.learning_rate: give where it ends, 0 "
            "or more, or choose optim.schedule=constant",
        )

    def num_warmup_steps(self, num_steps: int) -> int:
        """Updates of the warm-up in a run of `num_steps` updates."""
        if self.warmup_share is None:
            return self.warmup_steps
        return round(self.warmup_share * num_steps)

    def rate_at(self, step: int, num_steps: int) -> float:
        """Learning rate of an update, from 0, in a run of `num_steps` updates.

        Rises linearly over the warm-up of W updates, the first update being at 1 / W of the peak,
        then stays, or falls along half a cosine or a line to `min_learning_rate` at the last
        update, where it stays.
        """
        warmup = self.num_warmup_steps(num_steps)
        if step < warmup:
            return self.learning_rate * (step + 1) / warmup
        if self.schedule is Schedule.constant:
            return self.learning_rate
        progress = min(1.0, (step - warmup) / max(1, num_steps - 1 - warmup))
        left = 1 - progress
        if self.schedule is Schedule.cosine:
            left = (1 + math.cos(math.pi * progress)) / 2
        return self.min_learning_rate + (self.learning_rate - self.min_learning_rate) * left
