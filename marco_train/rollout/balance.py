"""Rollouts dealt out anew, so that no rank has many more tokens to learn from than another.

A rank samples the responses to its own prompts, and responses differ in length many times over. In
an update all ranks make as many passes as the one with most tokens: the others would wait for it.
"""

from collections.abc import Sequence

from marco_train.distributed import exchange_objects, gather_objects, rank, world_size
from marco_train.types import ScoredRollout

Move = tuple[int, int, int]
"""The rank that gives, the rank that takes, and the place of a rollout among the giver's."""

# Of the mean: what a rank may have more than it. Less is not worth a message.
TOLERANCE = 0.01


def balance_ranks(scored: Sequence[ScoredRollout]) -> list[ScoredRollout]:
    """Give rollouts of this rank to ranks with fewer tokens, or take some; all ranks take part.

    Returns:
        This rank's from now on.
    """
    if world_size() == 1:
        return list(scored)
    moves = choose_moves(gather_objects([len(each.rollout.input_ids) for each in scored]))
    given: dict[int, list[int]] = {}
    senders = set()
    for giver, taker, place in moves:
        if giver == rank():
            given.setdefault(taker, []).append(place)
        if taker == rank():
            senders.add(giver)
    outgoing = {taker: [scored[place] for place in places] for taker, places in given.items()}
    taken = exchange_objects(outgoing, sorted(senders))
    gone = {place for places in given.values() for place in places}
    kept = [each for place, each in enumerate(scored) if place not in gone]
    return kept + [each for giver in sorted(senders) for each in taken[giver]]


def choose_moves(lengths: Sequence[Sequence[int]]) -> list[Move]:
    """Choose which rollouts change ranks; the same on every rank.

    Again and again the rank with most tokens gives one to the rank with fewest: the one that leaves
    the two most alike.

    Args:
        lengths: Tokens of each rank's rollouts.
    """
    held = [[(home, place) for place in range(len(of))] for home, of in enumerate(lengths)]
    loads = [sum(of) for of in lengths]
    most = sum(loads) / len(loads) * (1 + TOLERANCE)
    while max(loads) > most:
        full, free = loads.index(max(loads)), loads.index(min(loads))
        gap = loads[full] - loads[free]
        fitting = [
            (abs(gap - 2 * size), home, place)
            for home, place in held[full]
            if 0 < (size := lengths[home][place]) < gap
        ]
        if not fitting:
            break
        _, home, place = min(fitting)
        held[full].remove((home, place))
        held[free].append((home, place))
        loads[full] -= lengths[home][place]
        loads[free] += lengths[home][place]
    return sorted(
        (home, taker, place) for taker, of in enumerate(held) for home, place in of if home != taker
    )
