"""Why a run ends before its time, in one sentence for whoever started it.

RunError
    InputError: what a user gave cannot be used
        DirectoryInUseError: another launch works in the run's directory
    CheckpointError: a checkpoint could not be written
    ServersUnavailable: servers are away, and the run can be resumed (exit status 75)
    RunInterrupted: the run was told to end, is saved, and can be resumed (exit status 143 or 75)
    WeightSyncError: policy and sampler disagree after a sync
    RolloutMismatchError: the sampler does not sample from the policy
    SkippedUpdatesError: too many updates in a row could not be made
    StaleRolloutError: a rollout is of other weights than those that were to sample it
    AnswerError: of a server, to one request
        UnusableAnswerError: it is asked again
        UntrustedServerError: it serves what it should, and its numbers are not the known ones
        RejectedError: no answer could be used, as often as it was asked
"""

import math

# Exit statuses of a recipe. What a user gave cannot be used, nor could it the next time.
REFUSED = 2
# A scheduler may queue a run again (EX_TEMPFAIL).
TRY_AGAIN_LATER = 75
# A rank did not get on (EX_SOFTWARE).
HUNG = 70
# It was told to end, as a shell says of a process that SIGTERM ended.
TOLD_TO_END = 143
# The file in a run's directory that tells of the last launch's.
EXIT_STATUS = "exit_status.json"


class RunError(Exception):
    """Whatever this package raises for a reader."""


class InputError(RunError, ValueError):
    """What a user gave cannot be used; the message says what, the bound, and the fix."""


class DirectoryInUseError(InputError):
    """Another launch works in the run's directory; nothing of it was touched."""


class CheckpointError(RunError):
    """A checkpoint could not be written; those before it are intact."""


class ServersUnavailable(RunError):  # noqa: N818
    """A server the run depends on is unreachable. State is saved; the run can be resumed."""


class RunInterrupted(RunError):  # noqa: N818
    """The run was told to end before its time. State is saved, where it could be."""

    def __init__(
        self, message: str, reason: str, code: int, step: int, checkpoint: str | None
    ) -> None:
        """Say what told it to, with the exit status, the updates made and the last checkpoint."""
        super().__init__(message)
        self.reason = reason
        self.code = code
        self.step = step
        self.checkpoint = checkpoint


class WeightSyncError(RunError):
    """Sampler and policy disagree after a sync; nothing may be sampled."""


class RolloutMismatchError(RunError):
    """The sampler does not sample from the policy."""


class SkippedUpdatesError(RunError):
    """More updates in a row than may be were left out; the message names the rows of the last."""


class StaleRolloutError(RunError):
    """A rollout is of other weights than those that were to sample it."""


class AnswerError(RunError):
    """What a server answered to one request."""


class UnusableAnswerError(AnswerError):
    """A server answered with something else than what it was asked for."""


class UntrustedServerError(AnswerError):
    """A server's numbers are not those known of it; it is passed over, and checked anew later."""


class RejectedError(AnswerError):
    """No answer to a request could be used, as often as it was made."""


def require(condition: bool, message: str) -> None:
    """Raise `InputError(message)` unless the condition holds."""
    if not condition:
        raise InputError(message)


def require_positive(owner: str, **values: float | None) -> None:
    """Refuse zero, negative and non-finite values; None means off and passes."""
    for name, value in values.items():
        require(
            value is None or (math.isfinite(value) and value > 0),
            f"{owner}.{name} is {value}, and must be greater than 0",
        )
