"""What a save holds beside the training state, in the host's memory."""

import ctypes
import gc
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from marco_train.checkpoint import (
    KINDS,
    BackgroundSaves,
    Piece,
    Retention,
    TrainingState,
    save_checkpoint,
)
from marco_train.distributed import peak_bytes
from tests.helpers.peaks import now
from tests.helpers.ranks import run_on_ranks

pytestmark = [pytest.mark.slow, pytest.mark.long]

MIB = 2**20
SIZES = [32 * MIB, 16 * MIB, 8 * MIB, 8 * MIB]
"""Of each parameter's masters, and of its two moments."""
LARGEST, STATE = 32 * MIB, 192 * MIB
ONE = Retention(keep_last=1)


def held_by(call: Callable[[], object]) -> int:
    """Most bytes held during a call, over those before it."""
    gc.collect()
    ctypes.CDLL("libc.so.6").malloc_trim(0)  # what the allocator keeps would hide growth
    Path("/proc/self/clear_refs").write_text("5")  # resets the peak
    before = now()
    call()
    return peak_bytes() - before


def save_in_turn(directory: Path) -> list[int]:
    pieces = [
        Piece(f"{n}", "float32", (size // 4,), 0, {kind: torch.ones(size // 4) for kind in KINDS})
        for n, size in enumerate(SIZES)
    ]
    state = TrainingState(pieces, 1)
    saves = BackgroundSaves(directory / "beside")

    def blocking() -> None:
        save_checkpoint(directory / "blocking", 1, state, {}, {}, ONE)

    def beside(step: int) -> None:
        saves.start(step, state, {}, {}, ONE)
        assert saves.publish(wait=True) == step

    blocking()  # what is imported and opened for the first time is no part of a save
    return [held_by(blocking), held_by(lambda: beside(1)), held_by(lambda: beside(2))]


def test_a_save_holds_no_copy_and_one_beside_training_a_single_one(tmp_path: Path) -> None:
    ((blocking, first, next_one),) = run_on_ranks(1, save_in_turn, tmp_path)
    assert blocking <= 1.1 * LARGEST
    assert STATE - MIB <= first <= STATE + 1.1 * LARGEST
    assert next_one <= 1.1 * LARGEST  # the copy's memory is used again
