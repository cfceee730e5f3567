"""Updates that are not made: their loss or gradient is not finite, or far over what was usual.

All ranks decide alike. Weights, masters and moments stay as they were; the step counts as made.
"""

import math
from collections import deque
from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass
from itertools import chain
from statistics import median
from typing import Any

import torch
from torch import Tensor

from marco_train.config.optim import OptimConfig
from marco_train.config.resume import ResumeChange
from marco_train.distributed import gather_objects, reduce_max, reduce_sums
from marco_train.metrics import Metrics
from marco_train.types import Microbatch

NON_FINITE = "optim/skipped_non_finite"
SPIKE = "optim/skipped_spike"


@dataclass(frozen=True)
class Skipped:
    """An update that was not made."""

    update: int
    metric: str
    """Which counts it."""
    reason: str
    samples: list[int]
    """Positions in the run's stream of samples, of all ranks: those of the microbatches at fault,
    or of the whole global batch where the fault is of no single one."""


class UpdateGuard:
    """Judges each update before the optimizer makes it; its state is part of a checkpoint."""

    name = "guard"

    def __init__(
        self, optim: OptimConfig, adamw: torch.optim.Optimizer, grad_norm: Callable[[], float]
    ) -> None:
        """Stand before an optimizer.

        Args:
            optim: Says what is a spike.
            adamw: Makes updates, once a parameter group or for all of them; shall not where the
                gradient is at fault.
            grad_norm: The global norm before clipping, known when `adamw` is asked for an update;
                below 0 where it is no number.
        """
        self._factor = optim.spike_factor
        self._grad_norm = grad_norm
        self._usual: deque[tuple[float, float]] = deque(maxlen=optim.spike_window)
        self.num_in_a_row = 0
        """Updates that were not made since the last that was."""
        self._losses: list[Tensor] = []
        self._samples: list[tuple[int, ...]] = []
        self._loss = 0.0
        self._fault: tuple[str, str] | None = None
        self._norm_is_judged = False
        adamw.register_step_pre_hook(self._withhold)

    def begin(self) -> None:
        """Forget the microbatches of the last update."""
        self._losses, self._samples = [], []
        self._fault, self._norm_is_judged = None, False

    def watch(self, loss: Tensor, microbatch: Microbatch) -> None:
        """Note the loss of a microbatch, this rank's part of the update's; stays on its device."""
        self._losses.append(loss.detach())
        self._samples.append(microbatch.samples)

    def judge_loss(self, metrics: Metrics) -> None:
        """Judge the losses, and what was measured on the way; every rank takes part."""
        losses = torch.stack(self._losses).double().tolist()
        bad = [not math.isfinite(loss) for loss in losses]
        num_bad, self._loss = reduce_sums([sum(bad), sum(losses)])
        wrong = [name for name, value in metrics.items() if not math.isfinite(value)]
        if num_bad or wrong:
            named = f" ({', '.join(wrong[:5])})" if wrong else ""
            self._fault = NON_FINITE, f"the loss is not finite{named}"
            if num_bad:
                self._samples = [s for s, is_bad in zip(self._samples, bad, strict=True) if is_bad]
        else:
            self._judge_spike("loss", self._loss, [loss for loss, _ in self._usual])

    def judge_gradient(self) -> float:
        """Judge the gradient, once an update; every rank takes part.

        Returns:
            Its global norm before clipping; not finite where it is no number.
        """
        norm = self._grad_norm()
        if not self._norm_is_judged:
            self._norm_is_judged = True
            if reduce_max(int(not 0 <= norm < math.inf)):
                reason = (
                    "the gradient's norm is not finite, and no loss of a microbatch is at fault"
                )
                self._fault = self._fault or (NON_FINITE, reason)
            else:
                self._judge_spike("gradient's norm", norm, [norm for _, norm in self._usual])
        return norm if norm >= 0 else math.inf

    def _judge_spike(self, what: str, value: float, usual: Sequence[float]) -> None:
        if (
            self._factor is None
            or self._fault is not None
            or len(usual) < (self._usual.maxlen or 0)
        ):
            return
        bound = self._factor * median(usual)
        if reduce_max(int(0 < bound < value)):
            self._fault = (
                SPIKE,
                (
                    f"the {what} is {value:.4g}, over optim.spike_factor {self._factor:g} times "
                    f"{median(usual):.4g}, its median over the last {len(usual)} updates"
                ),
            )

    @torch.no_grad()
    def _withhold(self, adamw: torch.optim.Optimizer, *_: Any) -> None:
        """Leave the optimizer nothing to update with, if the update is at fault."""
        self.judge_gradient()
        if self._fault is not None:
            for group in adamw.param_groups:
                for parameter in group["params"]:
                    parameter.grad = None

    def end(self, update: int) -> Skipped | None:
        """Count an update; every rank takes part.

        Args:
            update: Its number, from 0.

        Returns:
            What is known of it where it was not made.
        """
        norm = self.judge_gradient()
        if self._fault is None:
            self._usual.append((self._loss, norm))
            self.num_in_a_row = 0
            return None
        samples = sorted(set(chain.from_iterable(gather_objects([*chain(*self._samples)]))))
        self.num_in_a_row += 1
        return Skipped(update, *self._fault, samples)

    def forget(self) -> None:
        """Let what comes be of another size than what was usual: another teacher's losses are."""
        self._usual.clear()

    def state_at(self, step: int) -> dict[str, Any]:
        """What a checkpoint keeps: what spikes are told by, and the updates not made in a row."""
        return {"usual": [list(each) for each in self._usual], "num_in_a_row": self.num_in_a_row}

    def resume(
        self, step: int, state: dict[str, Any], allowed: Collection[ResumeChange] = ()
    ) -> None:
        """Go on at a step; older checkpoints know nothing of it."""
        self._usual.clear()
        self._usual.extend((loss, norm) for loss, norm in state.get("usual", []))
        self.num_in_a_row = state.get("num_in_a_row", 0)
