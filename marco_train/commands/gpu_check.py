"""Check the package on one device: ten checks, each alone; a table and JSON of what was measured.

Needs no network, no launcher and no vLLM; on one GPU at full size it takes less than 8 minutes.
"""

import argparse
import json
import os
import signal
import sys
import time
import traceback
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

# Seconds that a check may take; all of them take less than 8 minutes.
SECONDS = {
    "training": 110,
    "memory": 95,
    "noise": 40,
    "head": 30,
    "attention": 20,
    "profile": 30,
    "hand_over": 30,
    "determinism": 30,
    "sampler": 30,
    "tests": 60,
}
GPU_ONLY = {"tests"}


@dataclass
class Outcome:
    """What one check found; the fields are those of the JSON."""

    name: str
    ok: bool = False
    seconds: float = 0.0
    figures: dict[str, Any] = field(default_factory=dict)
    error: str | None = None


def main(arguments: Sequence[str] | None = None) -> None:
    """Run the checks of a command line; ends with 1 where one failed."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--device", choices=["cuda", "cpu"], default="cuda")
    parser.add_argument("--tiny", action="store_true", help="small sizes, to try the checks")
    parser.add_argument("--only", help=f"some of {','.join(SECONDS)}; all that the device can")
    parser.add_argument("--json", type=Path, help="write everything found to this file")
    args = parser.parse_args(arguments)
    known = [name for name in SECONDS if args.device == "cuda" or name not in GPU_ONLY]
    names = args.only.split(",") if args.only else known
    if unknown := [name for name in names if name not in known]:
        parser.error(f"--only: {', '.join(unknown)} is none of {', '.join(known)}")
    if args.device == "cpu":
        os.environ["CUDA_VISIBLE_DEVICES"] = ""
    # Heavy libraries are imported from here on.
    import torch

    from marco_train import distributed
    from marco_train.commands.measurements import CHECKS, Bench

    if args.device == "cuda" and not torch.cuda.is_available():
        sys.exit("error: torch finds no GPU here; --device cpu --tiny tries the checks without one")
    distributed.start()
    bench = Bench(distributed.device(), args.tiny)
    if bench.is_cuda:
        # One process sees more types and modes than a run; past the limit chains are not compiled.
        torch._dynamo.config.recompile_limit = 64
    named = torch.cuda.get_device_name() if bench.is_cuda else "cpu"
    outcomes = []
    for name in names:
        outcomes.append(run_check(name, partial(CHECKS[name], bench)))
        bench.release()
        show(outcomes[-1])
        if args.json:
            about = {"device": named, "torch": torch.__version__}
            checks = [asdict(outcome) for outcome in outcomes]
            args.json.write_text(json.dumps(about | {"checks": checks}, indent=1))
    distributed.stop()
    failed = [outcome.name for outcome in outcomes if not outcome.ok]
    print(
        f"{named}, torch {torch.__version__}: {len(outcomes) - len(failed)} of {len(outcomes)} fine"
    )
    if failed:
        sys.exit(f"error: {', '.join(failed)} failed")


def run_check(name: str, check: Callable[[dict[str, Any]], None]) -> Outcome:
    """Make one check within its time; whatever it raises becomes its row, with what it found."""
    outcome, start = Outcome(name), time.perf_counter()
    try:
        with time_limit(SECONDS[name]):
            check(outcome.figures)
        outcome.ok = True
    except Exception as error:
        outcome.error = describe(error)
        error.__traceback__ = None  # its frames hold tensors
    outcome.seconds = time.perf_counter() - start
    return outcome


def describe(error: Exception) -> str:
    """What was raised, and where."""
    frame = traceback.extract_tb(error.__traceback__)[-1]
    where = f"{Path(frame.filename).name}:{frame.lineno}"
    return f"{type(error).__name__}: {error} ({where})"


@contextmanager
def time_limit(seconds: int) -> Iterator[None]:
    """Raise TimeoutError in the body after some seconds, unless it waits for a device."""

    def stop(*_: object) -> None:
        raise TimeoutError(f"not done after {seconds} s")

    before = signal.signal(signal.SIGALRM, stop)
    signal.alarm(seconds)
    try:
        yield
    finally:
        signal.alarm(0)
        signal.signal(signal.SIGALRM, before)


def show(outcome: Outcome) -> None:
    """Print a check and its figures, one a line."""
    state = "fine" if outcome.ok else f"FAILED: {outcome.error}"
    print(f"{outcome.name:12} {outcome.seconds:6.1f} s  {state}", flush=True)
    for name, value in outcome.figures.items():
        number = f"{value:.4g}" if isinstance(value, float) else value
        print(f"    {name:60} {number:>12}")


if __name__ == "__main__":
    main()
