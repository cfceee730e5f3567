"""What the benches share: arguments, turns, peaks of memory, child processes, tables and JSON.

A bench is a script with parts, of which `--only` chooses some, and jobs, which it does in processes
of their own. Sides of a case take turns, round by round; a ratio is another side's time over that
of a base within a round. Figures are the median and the range over the rounds.
"""

import argparse
import ctypes
import gc
import json
import os
import platform
import re
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Collection, Iterable, Mapping
from dataclasses import dataclass, field
from datetime import UTC, datetime
from pathlib import Path
from statistics import median
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

MIB = 2**20
OURS = "ours"
WARM_UPS = {"cpu": 1, "cuda": 3}
REPEATS = {"cpu": 5, "cuda": 20}
# A group of one process leaves these behind, and a child would take them for a launch.
RANKS = ("RANK", "LOCAL_RANK", "WORLD_SIZE")


def some_of(allowed: Collection[str]) -> Callable[[str], list[str]]:
    """Type of an argument that chooses among names, joined by commas."""

    def read(text: str) -> list[str]:
        names = text.split(",")
        if unknown := [name for name in names if name not in allowed]:
            raise argparse.ArgumentTypeError(
                f"{', '.join(unknown)} is none of {', '.join(allowed)}"
            )
        return names

    return read


def parser_of(
    doc: str, parts: Collection[str], shapes: Collection[str], usual_shapes: list[str]
) -> argparse.ArgumentParser:
    """The options of every bench.

    Args:
        doc: Of the script; its first line describes it.
        parts: What `--only` chooses from.
        shapes: What `--shapes` chooses from.
        usual_shapes: Those taken where none is chosen.
    """
    parser = argparse.ArgumentParser(description=doc.partition("\n")[0])
    parser.add_argument("--json", type=Path, required=True, help="Write all numbers to this file.")
    parser.add_argument(
        "--only",
        type=some_of(parts),
        help=f"Run some of {','.join(parts)}; all that can run if absent.",
    )
    parser.add_argument(
        "--shapes",
        type=some_of(shapes),
        default=usual_shapes,
        help=f"Take some of {','.join(shapes)}; {','.join(usual_shapes)} if absent.",
    )
    parser.add_argument(
        "--repeats", type=int, help="Make so many rounds; 5 on a CPU and 20 on a GPU if absent."
    )
    return parser


@dataclass
class Bench:
    """Settings of a bench, and what it found."""

    args: argparse.Namespace
    device: torch.device
    tables: dict[str, list[dict[str, Any]]] = field(default_factory=dict)
    notes: dict[str, list[str]] = field(default_factory=dict)

    @property
    def repeats(self) -> int:
        """Rounds of a case."""
        return int(self.args.repeats or REPEATS[self.device.type])

    def in_turn(
        self, calls: Mapping[str, Callable[[], object]], clear: Callable[[], object] = int
    ) -> dict[str, list[float]]:
        """Time all calls once in each round, in seconds; `clear` runs untimed before each."""
        return in_turn(calls, self.repeats, self.device, clear)

    def add(self, part: str, cells: dict[str, Any], raw: object = None) -> None:
        """Take a row of a part's table, with the raw numbers behind it."""
        self.tables.setdefault(part, []).append(cells | {"raw": raw})
        texts = (f"{name} {show(value)}" for name, value in cells.items() if value is not None)
        print(f"{part}: {', '.join(texts)}", file=sys.stderr, flush=True)

    def note(self, part: str, *lines: str) -> None:
        """Take lines to stand under a part's table."""
        self.notes.setdefault(part, []).extend(lines)

    def run(self, parts: Mapping[str, Callable[[Any], None]]) -> None:
        """Run the parts asked for; write the numbers after each, and print tables at the end."""
        torch.manual_seed(0)
        for part in self.args.only or parts:
            parts[part](self)
            release(self.device)
            self._write()
        print(f"{machine(self.device)}, torch {torch.__version__}, {self.repeats} repeats")
        for part, rows in self.tables.items():
            print("", part, table(rows), *self.notes.get(part, []), sep="\n")

    def _write(self) -> None:
        about = {
            "date": datetime.now(UTC).isoformat(timespec="seconds"),
            "torch": torch.__version__,
            "machine": machine(self.device),
            "command": sys.argv,
            "repeats": self.repeats,
        }
        found = about | {"parts": self.tables, "notes": self.notes}
        self.args.json.write_text(json.dumps(found, indent=1))


def in_turn(
    calls: Mapping[str, Callable[[], object]],
    repeats: int,
    device: torch.device,
    clear: Callable[[], object] = int,
) -> dict[str, list[float]]:
    """Warm all calls up, then time each once in every round.

    Args:
        calls: What is timed, by its name.
        repeats: Rounds.
        device: What it computes on.
        clear: Runs untimed before each call.

    Returns:
        Seconds of each call, in the order of the rounds.
    """
    for call in calls.values():
        for _ in range(WARM_UPS[device.type]):
            clear()
            call()
    times: dict[str, list[float]] = {name: [] for name in calls}
    for _ in range(repeats):
        for name, call in calls.items():
            clear()
            times[name].append(timed(call, device))
    return times


def timed(call: Callable[[], object], device: torch.device) -> float:
    """Seconds that a call takes on the device."""
    if device.type == "cpu":
        began = time.perf_counter()
        call()
        return time.perf_counter() - began
    start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))  # type: ignore[no-untyped-call]
    torch.cuda.synchronize()
    start.record()
    call()
    end.record()
    end.synchronize()
    return float(start.elapsed_time(end)) / 1e3


def linux_bytes(name: str, file: str = "/proc/self/status") -> int:
    """Read a size of this process, or of the machine, as Linux counts it."""
    found = re.search(rf"{name}:\s+(\d+) kB", Path(file).read_text())
    assert found is not None
    return int(found[1]) * 1024


def peak_bytes(call: Callable[[], object], device: torch.device) -> int:
    """Most memory held during a call, over what was held just before it."""
    gc.collect()
    if device.type == "cuda":
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        call()
        torch.cuda.synchronize()
        return torch.cuda.max_memory_allocated() - before
    # What the allocator keeps for later would hide growth.
    ctypes.CDLL("libc.so.6").malloc_trim(0)
    Path("/proc/self/clear_refs").write_text("5")  # resets the high-water mark
    before = linux_bytes("VmRSS")
    call()
    return linux_bytes("VmHWM") - before


def free_bytes(device: torch.device) -> int:
    """Memory that the device could still give."""
    if device.type == "cuda":
        return torch.cuda.mem_get_info()[0]
    return linux_bytes("MemAvailable", "/proc/meminfo")


def release(device: torch.device) -> None:
    """Give unused memory back."""
    gc.collect()
    if device.type == "cuda":
        torch.cuda.empty_cache()


def run_job(
    script: str | Path,
    job: str,
    arguments: Mapping[str, Any],
    *,
    python: str | Path = sys.executable,
    ranks: int = 1,
    settings: Mapping[str, str] | None = None,
) -> Any:
    """Do a job in a fresh process, or in several under torchrun.

    Args:
        script: Ends with `do_job`.
        job: Its name there.
        arguments: Of the job; JSON.
        python: Interpreter.
        ranks: Processes; each does the job.
        settings: Environment variables, beside this process's own.

    Returns:
        What the job returned on the first rank.
    """
    inherited = {name: value for name, value in os.environ.items() if name not in RANKS}
    launcher = ["-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={ranks}"]
    with tempfile.TemporaryDirectory() as directory:
        given, found = Path(directory) / "given.json", Path(directory) / "found.json"
        given.write_text(json.dumps(arguments))
        command = [python, *(launcher if ranks > 1 else []), script, "--job", job, given, found]
        environment = inherited | dict(settings or {})
        subprocess.run([*map(str, command)], env=environment, stdout=sys.stderr, check=True)
        return json.loads(found.read_text())


def do_job(jobs: Mapping[str, Callable[..., Any]]) -> bool:
    """Do the job that `run_job` started this process for; False if it did not."""
    if sys.argv[1:2] != ["--job"]:
        return False
    job, given, found = sys.argv[2:]
    torch.manual_seed(0)
    result = jobs[job](**json.loads(Path(given).read_text()))
    if os.environ.get("RANK", "0") == "0":
        Path(found).write_text(json.dumps(result))
    if dist.is_initialized():
        dist.destroy_process_group()
    return True


def largest_errors(
    names: Iterable[str], oracle: str, results: Callable[[str], list[Tensor]]
) -> dict[str, float]:
    """Largest relative error ||x - y|| / ||y|| of each side's tensors against the oracle's."""
    wanted = results(oracle)

    def error(x: Tensor, y: Tensor) -> float:
        return float((x.float() - y.float()).norm() / y.float().norm())

    return {
        name: max(error(x, y) for x, y in zip(results(name), wanted, strict=True)) for name in names
    }


def span(values: Iterable[float]) -> str:
    """Smallest and largest value."""
    values = list(values)
    return f"{show(min(values))}-{show(max(values))}"


def compared(times: Mapping[str, list[float]], name: str, base: str = OURS) -> dict[str, Any]:
    """Columns of a side's seconds, alone and over those of `base` in the same rounds."""
    own = times[name]
    cells: dict[str, Any] = {"ms": 1e3 * median(own), "ms range": span(1e3 * t for t in own)}
    if base in times:
        ratios = [t / reference for t, reference in zip(own, times[base], strict=True)]
        cells |= {f"time / {base}": median(ratios), "ratio range": span(ratios)}
    return cells


def show(value: object) -> str:
    """Three figures of a number, all of a large one."""
    if not isinstance(value, float):
        return "" if value is None else str(value)
    if abs(value) >= 1000:
        return f"{value:,.0f}"
    return f"{value:.1e}" if 0 < abs(value) < 1e-3 else f"{value:.3g}"


def table(rows: list[dict[str, Any]]) -> str:
    """Aligned columns of all keys but the raw numbers."""
    names = list(dict.fromkeys(name for row in rows for name in row if name != "raw"))
    lines = [names, *([show(row.get(name)) for name in names] for row in rows)]
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    aligned = (
        [text.rjust(width) for text, width in zip(line, widths, strict=True)] for line in lines
    )
    return "\n".join("  ".join(line) for line in aligned)


def machine(device: torch.device) -> str:
    """What computes."""
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    found = re.search(r"model name\s*: (.+)", Path("/proc/cpuinfo").read_text())
    name = platform.processor() if found is None else found[1]
    return f"{name}, {torch.get_num_threads()} threads"
