"""Whether an answer is right, judged in a process that may be killed."""

import json
import os
import select
import subprocess
import sys
import time
from decimal import Decimal, InvalidOperation
from functools import lru_cache
from pathlib import Path

WORKER = Path(__file__).with_name("judge_worker.py")
SECONDS = 20.0  # for an answer; the process has shorter limits of its own
SECONDS_TO_START = 120.0


class VerifierError(RuntimeError):
    """A verifier could not judge an answer, which counts as wrong; the report counts these."""


class Judge:
    """Asks a worker process, which is started with the first question and again where it died."""

    def __init__(self, seconds: float = SECONDS, worker: Path = WORKER) -> None:
        self._seconds = seconds
        self._worker = worker
        self._process: subprocess.Popen[bytes] | None = None

    def is_right(self, by: str, gold: str, answer: str) -> bool:
        """Whether an answer fits the reference.

        Args:
            by: `math`, whether both are equal; `regex`, a pattern that is found in the answer; or
                `json_schema`, which the answer satisfies as JSON.
            gold: The reference.
            answer: As it was read.

        Raises:
            VerifierError: It could not be judged: it took too long or too much memory.
        """
        fresh = self._process is None
        process = self._started()
        assert process.stdin is not None
        try:
            process.stdin.write(
                json.dumps({"by": by, "gold": gold, "answer": answer}).encode() + b"\n"
            )
            process.stdin.flush()
            line = self._line(process, SECONDS_TO_START if fresh else self._seconds)
        except (OSError, TimeoutError) as error:
            self.close()
            raise VerifierError(f"{error} on {answer[:60]!r}") from error
        said = json.loads(line)
        if "error" in said:
            raise VerifierError(f"{said['error']} on {answer[:60]!r}")
        return bool(said["right"])

    def close(self) -> None:
        """End the process."""
        if self._process is not None:
            self._process.kill()
            self._process.communicate()
        self._process = None

    def _started(self) -> subprocess.Popen[bytes]:
        if self._process is None:
            self._process = subprocess.Popen(
                [sys.executable, "-P", str(self._worker)],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=subprocess.DEVNULL,
            )
        return self._process

    @staticmethod
    def _line(process: subprocess.Popen[bytes], seconds: float) -> bytes:
        """Read a line of the process.

        Raises:
            TimeoutError: It took longer.
            OSError: It died.
        """
        assert process.stdout is not None
        end, found = time.monotonic() + seconds, b""
        while not found.endswith(b"\n"):
            ready, _, _ = select.select([process.stdout], [], [], max(0.0, end - time.monotonic()))
            if not ready:
                raise TimeoutError(f"no answer within {seconds:.0f} s")
            part = os.read(process.stdout.fileno(), 2**16)
            if not part:
                raise OSError("the process died")
            found += part
        return found


@lru_cache(maxsize=1)
def judge() -> Judge:
    """The judge of this process."""
    return Judge()


def same_number(gold: str, answer: str) -> bool | None:
    """Whether two decimals are equal; None: one of them is no decimal."""
    try:
        return Decimal(gold) == Decimal(answer)
    except InvalidOperation:
        return None
