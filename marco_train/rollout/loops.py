"""Responses that end in a loop."""

from collections.abc import Sequence

from marco_train.distributed import reduce_sums
from marco_train.errors import require
from marco_train.metrics import Metrics
from marco_train.types import FinishReason, Rollout, ScoredRollout

MIN_REPEATS = 4
MIN_LOOP_TOKENS = 32  # four equal words end a chorus, and a row of a table


def ends_in_loop(rollout: Rollout) -> bool:
    """Whether a response repeats itself to its end.

    It does if, for some n, its last tokens are one n-gram of token ids over and over: 4 times or
    more, the first of them perhaps cut short, and 32 tokens or more in all. A stop token is not
    looked at. A loop that the response has left again does not count.
    """
    is_stopped = rollout.finish_reason is FinishReason.stop
    return is_loop_at_end(rollout.response_ids[: -1 if is_stopped else None])


def is_loop_at_end(units: Sequence[object]) -> bool:
    """Whether the last of some units, tokens or words, are one n-gram over and over."""
    return any(
        length >= MIN_LOOP_TOKENS and length >= MIN_REPEATS * (length - border)
        for length, border in enumerate(_borders(units[::-1]), 1)
    )


def _borders(ids: Sequence[object]) -> list[int]:
    """Of each beginning, the length of its longest proper part that both begins and ends it.

    The prefix function of Knuth, Morris and Pratt: its length less this is its shortest period.
    """
    borders = [0] * len(ids)
    for place in range(1, len(ids)):
        known = borders[place - 1]
        while known and ids[place] != ids[known]:
            known = borders[known - 1]
        borders[place] = known + (ids[place] == ids[known])
    return borders


def without_loops(
    scored: list[ScoredRollout], step: int, *, are_dropped: bool
) -> tuple[list[ScoredRollout], Metrics]:
    """Leave out this rank's responses that end in a loop, if they are dropped; all ranks take part.

    Returns:
        The others, and how many were left out over all ranks.

    Raises:
        InputError: All responses of the step that were scored end in a loop.
    """
    if not are_dropped:
        return scored, {}
    kept = [each for each in scored if not ends_in_loop(each.rollout)]
    num_kept, num_dropped = reduce_sums([len(kept), len(scored) - len(kept)])
    require(
        num_kept > 0 or num_dropped == 0,
        f"step {step}: all {num_dropped:.0f} responses end in a loop, and stage.drop_repetitive "
        "leaves them out, so nothing is left to learn: the policy has collapsed. Go on from an "
        "earlier checkpoint with resume=<path>, or have loops corrected too, with "
        "stage.drop_repetitive=false on_resume.allow=[objective]",
    )
    return kept, {"rollout/dropped_repetitive": num_dropped}
