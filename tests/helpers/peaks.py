"""What a run holds at most: `python -m tests.helpers.peaks <file> <overrides>`; with torchrun too.

Each rank writes <file>.<rank>: the peak of its memory over that after its imports, in bytes.
"""

import importlib
import os
import resource
import sys
from pathlib import Path

# Whatever a run imports late, so that no import counts as its memory.
LATE = (
    "deepspeed",
    "marco_train.engine.policy",
    "marco_train.rollout.native",
    "marco_train.stages.opd",
    "marco_train.stages.sft",
    "marco_train.teachers.native",
    "datasets",
    "tokenizers",
    "torch.distributed",
    "transformers",
)


def now() -> int:
    """Bytes of this process in memory."""
    pages = int(Path("/proc/self/statm").read_text().split()[1])
    return pages * resource.getpagesize()


def main() -> None:
    """Run what the overrides say, and write the peak."""
    from marco_train.config.compose import read_run
    from marco_train.train import run_stage

    file, *overrides = sys.argv[1:]
    cfg = read_run(overrides)
    for module in LATE:
        importlib.import_module(module)
    before = now()
    run_stage(cfg)
    # Of this process: what getrusage tells is at least what its parent held when it began.
    status = Path("/proc/self/status").read_text()
    (peak_kib,) = (line.split()[1] for line in status.splitlines() if line.startswith("VmHWM:"))
    peak = int(peak_kib) * 1024
    Path(f"{file}.{os.environ.get('RANK', '0')}").write_text(str(peak - before))


if __name__ == "__main__":
    main()
