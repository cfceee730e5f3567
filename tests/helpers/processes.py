"""The command line in a process of its own, and waiting for others."""

import os
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

REPOSITORY = Path(__file__).parents[2]


def launch(*overrides: str) -> subprocess.CompletedProcess[str]:
    """Run the command line in a process of its own."""
    return subprocess.run(
        [sys.executable, "-m", "marco_train.train", *overrides],
        capture_output=True,
        text=True,
        check=False,
        cwd=REPOSITORY,
        env={k: v for k, v in os.environ.items() if k not in {"RANK", "WORLD_SIZE"}},
    )


def soon(condition: Callable[[], bool]) -> None:
    """Wait until it holds, a minute at most."""
    deadline = time.monotonic() + 60
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.01)
