"""Ranks that wait for servers wait for each other in short turns, whatever a server's patience."""

import asyncio
from datetime import timedelta
from functools import partial

import pytest
import torch.distributed as dist

from marco_train import distributed
from marco_train.config.servers import TeacherServersConfig
from marco_train.errors import ServersUnavailable
from marco_train.inference import pool
from marco_train.inference.pool import Server, ServerPool
from tests.helpers.ranks import run_on_ranks

# A rank that waits longer than this for another one ends; far less than servers take below.
RANKS_WAIT = 2.0


async def nothing(server: Server) -> None:
    """A health check that passes."""


async def answer(seconds: float, server: Server) -> float:
    await asyncio.sleep(seconds)
    return seconds


def waited_for(seconds: list[list[float]], give_up_after: float) -> tuple[list[float], int] | str:
    """Ask for this rank's answers; with how often the run was saved, or what was said at the end.

    Args:
        seconds: By rank, when each of its answers comes.
        give_up_after: Seconds without any.
    """
    pool.TURN_SECONDS = 0.2
    group = dist.new_group(backend="gloo", timeout=timedelta(seconds=RANKS_WAIT))
    distributed.Groups.agreements = group
    saves: list[None] = []

    def save_early() -> bool:
        distributed.barrier()  # as whoever saves: every rank is here
        saves.append(None)
        return True

    bounds = {"save_after_seconds": 1.5, "give_up_after_seconds": give_up_after}
    cfg = TeacherServersConfig(urls=["http://nowhere:1"], **bounds)  # type: ignore[arg-type]
    asked = ServerPool(cfg, "teacher", nothing, save_early)
    mine = [asked.submit(partial(answer, each)) for each in seconds[distributed.rank()]]
    try:
        return sorted(future.result() for future in asked.as_answered(mine)), len(saves)
    except ServersUnavailable as error:
        return str(error)
    finally:
        asked.close()


@pytest.mark.long
def test_a_rank_without_requests_outwaits_answers_that_trickle_to_another() -> None:
    trickle = [0.5 * number for number in range(1, 11)]
    assert run_on_ranks(2, waited_for, [[], trickle], 60.0) == [([], 0), (trickle, 0)]


def test_servers_may_be_away_for_longer_than_ranks_wait_for_each_other() -> None:
    assert run_on_ranks(2, waited_for, [[0.1], [5.0]], 60.0) == [([0.1], 1), ([5.0], 1)]


@pytest.mark.parametrize("alone", [0, 1])
def test_all_ranks_give_up_together(alone: int) -> None:
    seconds = [[0.1], [0.1]]
    seconds[alone] = [60.0]
    said = run_on_ranks(2, waited_for, seconds, 4.0)
    assert all(each.startswith("no answer for ") for each in said), said
    assert "1 of 1 requests of this rank are open" in said[alone]
