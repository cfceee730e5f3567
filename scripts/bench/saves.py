"""What a checkpoint costs: saving, digesting, the stall of a save beside training, and loading.

    python scripts/bench/saves.py --gigabytes 1 --repeats 3 --directory /tmp

One process that updates all parameters, without a model: a state is masters and two moments. Sides
take turns, round by round; figures are medians and ranges over the rounds.
"""

import argparse
import json
import tempfile
import threading
import time
from collections.abc import Callable
from pathlib import Path
from statistics import median
from unittest.mock import patch

import torch
from harness import MIB, peak_bytes
from torch import Tensor
from xxhash import xxh3_128

from marco_train import safetensors_io
from marco_train.checkpoint import (
    KINDS,
    BackgroundSaves,
    Piece,
    Retention,
    Snapshot,
    StoredState,
    TrainingState,
    save_checkpoint,
)
from marco_train.checkpoint.shards import INDEX, build_index, write_shard
from marco_train.files import digest_of

CPU = torch.device("cpu")
NUM_PARAMETERS = 24


def make_state(gigabytes: float) -> TrainingState:
    """Parameters of one size each."""
    size = int(gigabytes * 1e9) // (12 * NUM_PARAMETERS)
    pieces = [
        Piece(f"{n}", "bfloat16", (size,), 0, {kind: torch.randn(size) for kind in KINDS})
        for n in range(NUM_PARAMETERS)
    ]
    return TrainingState(pieces, 1)


def part_of(state: TrainingState, number: int, num_parts: int) -> TrainingState:
    """What one of several ranks would update of it."""
    pieces = []
    for piece in state.pieces:
        bounds = [piece.stop * n // num_parts for n in (number, number + 1)]
        tensors = {kind: t[slice(*bounds)] for kind, t in piece.tensors.items()}
        pieces.append(Piece(piece.parameter, piece.dtype, piece.shape, bounds[0], tensors))
    return TrainingState(pieces, state.optimizer_steps)


def seconds(call: Callable[[], object]) -> float:
    """That a call takes."""
    start = time.perf_counter()
    call()
    return time.perf_counter() - start


def write_as(directory: Path, state: TrainingState, num_ranks: int) -> Path:
    """The tensors of a checkpoint of so many ranks."""
    path = directory / f"of_{num_ranks}"
    path.mkdir()
    shards = [write_shard(path, n, part_of(state, n, num_ranks), {}) for n in range(num_ranks)]
    (path / INDEX).write_text(json.dumps(build_index(shards)))
    return path


def load(path: Path, state: TrainingState) -> None:
    """Verify what a checkpoint holds, and read it into its places."""
    for file in path.iterdir():
        digest_of(file)
    stored = StoredState(path)
    for piece in state.pieces:
        stored.fill(piece)


class NoDigest:
    """Takes the place of a digest."""

    def update(self, content: memoryview) -> None:
        """Look at nothing."""

    def hexdigest(self) -> str:
        """Of nothing."""
        return ""


def digesting(directory: Path, state: TrainingState) -> float:
    """Seconds of a core that a shard takes to write beyond one that is not digested."""
    worked = []
    for digest in (xxh3_128, NoDigest):
        with patch.object(safetensors_io, "xxh3_128", digest):
            before = time.thread_time()
            write_shard(directory, 0, state, {})
            worked.append(time.thread_time() - before)
    return worked[0] - worked[1]


class Training:
    """Products of matrices in place of gradients, and updates that change nothing."""

    def __init__(self, lock: threading.Lock) -> None:
        self._matrix: Tensor = torch.randn(1024, 1024)
        self._lock = lock

    def step(self) -> float:
        """Seconds that the update waits, after those of the gradients."""
        for _ in range(20):
            self._matrix @ self._matrix

        def update() -> None:
            with self._lock:
                pass

        return seconds(update)


ONE = Retention(keep_last=1)


def stall(
    saves: BackgroundSaves, step: int, state: TrainingState, training: Training
) -> tuple[float, float]:
    """Seconds that training waits for a save beside it, from its start to its appearance.

    The second number is how much longer training takes until then: both share cores and memory.
    """
    calm = seconds(training.step)
    started = time.perf_counter()
    waited = seconds(lambda: saves.start(step, state, {}, {}, ONE))
    published: list[int | None] = [None]

    def ask() -> None:
        published[0] = saves.publish(wait=False)

    num_steps = 0
    while published[0] is None:
        waited += training.step()
        num_steps += 1
        waited += seconds(ask)
    return waited, time.perf_counter() - started - num_steps * calm


def main() -> None:
    """Measure, and print."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--gigabytes", type=float, default=1.0, help="Of state, 10^9 bytes.")
    parser.add_argument("--repeats", type=int, default=3, help="Rounds.")
    parser.add_argument("--directory", type=Path, help="On the disk to write to.")
    args = parser.parse_args()
    torch.set_num_threads(1)
    state = make_state(args.gigabytes)
    training, copies = Training(state.lock), list[Snapshot]()
    copied = peak_bytes(lambda: copies.append(Snapshot(state)), CPU)
    largest = state.pieces[0].tensors[KINDS[0]].nbytes
    with tempfile.TemporaryDirectory(dir=args.directory) as name:
        directory = Path(name)
        found: dict[str, list[float]] = {}

        def take(what: str, value: float) -> None:
            found.setdefault(what, []).append(value)

        saves = BackgroundSaves(directory / "beside")
        one, four = (write_as(directory, state, num_ranks) for num_ranks in (1, 4))
        for number in range(args.repeats + 1):

            def save() -> None:
                save_checkpoint(directory / "blocking", number, state, {}, {}, ONE)  # noqa: B023

            blocking = seconds(save)
            waited, slowed = stall(saves, number, state, training)
            copying = seconds(lambda: copies[0].take(state))
            digests = digesting(directory, state)
            plain, elastic = (seconds(lambda: load(p, state)) for p in (one, four))  # noqa: B023
            if number == 0:
                continue  # memory is new, and files are read from the disk
            take("blocking save, s", blocking)
            take("stall of a save beside training, s", waited)
            take("stall / blocking save", waited / blocking)
            take("training is longer by, s", slowed)
            take("a step of it, s", seconds(training.step))
            take("copying alone, s", copying)
            take("copying alone / blocking save", copying / blocking)
            take("digesting, s of a core", digests)
            take("digesting / blocking save", digests / blocking)
            take("load by one rank of one rank's, s", plain)
            take("load by one rank of four ranks' / of one's", elastic / plain)
            take("peak of a blocking save / largest tensor", peak_bytes(save, CPU) / largest)
    print(f"{args.gigabytes:g} GB in {NUM_PARAMETERS} parameters; largest {largest / MIB:.0f} MiB")
    for what, values in found.items():
        print(f"{what}: {median(values):.3g} ({min(values):.3g}-{max(values):.3g})")
    print(f"a snapshot / the state: {copied / (args.gigabytes * 1e9):.3g}")


if __name__ == "__main__":
    main()
