"""Where the time of a step goes: matrix products, memory traffic, messages between ranks, Python.

    python scripts/bench/where.py --json where.json --shapes quickstart,vocabulary
    python scripts/bench/where.py --json where.json --only run --run <directory of a run>

The second reads a run that was made with `profile.steps`, on CPUs or GPUs. The first makes such
runs on CPUs: of experiment=quickstart_sft and quickstart_opd with random weights and rows, on one
rank and with experts over two. Every moment of a recorded step of the first rank counts as the
first of these that goes on: a matrix product, attention's included; any
other operator of torch, which moves memory; a message of gloo or NCCL, which may be a wait for
another rank; nothing of these, which is Python. Recording slows down Python and small operators, by
`recorded / step` in all. `bound` is what the products alone would allow: the rate of plain steps
over the products' share.
"""

import argparse
import gzip
import json
import os
import string
import tempfile
from collections.abc import Callable, Iterable, Sequence
from functools import partial
from itertools import product
from pathlib import Path
from random import Random
from statistics import median
from typing import Any

import torch
from harness import Bench, do_job, parser_of, run_job
from hydra import compose, initialize_config_dir
from our_side import OBJECTIVES, SHAPES, WARM_UPS, Step, make_inputs, read_log

from marco_train import distributed
from marco_train.config import to_run
from marco_train.config.paths import CONFIG_DIR
from marco_train.config.stage import StageKind
from marco_train.stages.opd import run_opd
from marco_train.stages.sft import run_sft

# Steps after the warm-up, first without a recording and then with one.
NUM_PLAIN, NUM_RECORDED = 4, 2
LAST = WARM_UPS + NUM_PLAIN + NUM_RECORDED
RUN = ["checkpoint=none", "resume=never", "optim.warmup_steps=0"]
RUN += [f"profile.steps={LAST - NUM_RECORDED + 1}-{LAST}"]
SFT = ["experiment=quickstart_sft", "stage.eval_every=null", "data.held_out=null"]
SFT += ["data.num_rows=null", f"stage.num_steps={LAST}"]
OPD = ["experiment=quickstart_opd", "~stage.cascade.second"]
OPD += [f"stage.cascade.first.num_steps={LAST}"]
CASES = {"sft": SFT, **{f"opd {name}": OPD + chosen for name, chosen in OBJECTIVES.items()}}
STAGES = {StageKind.sft: run_sft, StageKind.opd: run_opd}
ANSWER_LETTERS = (1, 50)
CLASSES = ("products", "traffic", "messages")  # in the order in which they count
# Of a CPU's operators, and of a GPU's kernels.
PRODUCTS = ("aten::mm", "aten::addmm", "aten::bmm", "aten::_grouped_mm", "aten::_scaled_dot")
PRODUCT_KERNELS = ("gemm", "cutlass", "nvjet", "flash", "fmha", "grouped_mm")
MESSAGES = ("gloo:", "nccl:", "ncclDevKernel")


def class_of(event: dict[str, Any], on_gpu: bool) -> str | None:
    """What an event of a trace is, or None: nothing that counts."""
    name, kind = event["name"], event.get("cat")
    if name.startswith(MESSAGES):
        return "messages"
    if on_gpu:
        if kind == "kernel" and any(part in name for part in PRODUCT_KERNELS):
            return "products"
        return "traffic" if kind in {"kernel", "gpu_memcpy", "gpu_memset"} else None
    if kind != "cpu_op" or not name.startswith("aten::"):
        return None
    return "products" if name.startswith(PRODUCTS) else "traffic"


def shares_by_class(events: Iterable[dict[str, Any]], begin: float, end: float) -> dict[str, float]:
    """Give each moment between two times of a trace to one class; returns the share of each."""
    events = [event for event in events if event.get("ph") == "X"]
    on_gpu = any(event.get("cat") == "kernel" for event in events)
    changes: list[tuple[float, int, str]] = []
    for event in events:
        first, last = max(begin, event["ts"]), min(end, event["ts"] + event["dur"])
        found = class_of(event, on_gpu)
        if found is not None and first < last:
            changes += [(first, 1, found), (last, -1, found)]
    spent, going_on, since = dict.fromkeys(CLASSES, 0.0), dict.fromkeys(CLASSES, 0), begin
    for time, change, name in sorted(changes):
        first_of_all = next((each for each in CLASSES if going_on[each]), None)
        if first_of_all is not None:
            spent[first_of_all] += (time - since) / (end - begin)
        going_on[name] += change
        since = time
    return spent


def recorded_steps(run: Path) -> list[dict[str, float]]:
    """Share of each class in each recorded step of the first rank."""
    trace = json.loads(gzip.decompress((run / "profile" / "rank_0.json.gz").read_bytes()))
    events = trace["traceEvents"]
    steps = [
        event
        for event in events
        if event.get("cat") == "user_annotation" and event["name"].startswith("step ")
    ]
    return [shares_by_class(events, step["ts"], step["ts"] + step["dur"]) for step in steps]


def train(case: str, overrides: list[str]) -> None:
    """Job: make a run."""
    distributed.start()
    with initialize_config_dir(version_base="1.3", config_dir=str(CONFIG_DIR)):
        cfg = to_run(compose("train", overrides=[*RUN, *CASES[case], *overrides]))
    STAGES[cfg.stage.kind](cfg)


def make_rows(file: Path) -> None:
    """Write conversations of one random answer to each random prompt of `make_inputs`."""
    rng, rows = Random(1), []
    for line in file.read_text().splitlines():
        asked = json.loads(line)["messages"]
        answer = "".join(rng.choices(string.ascii_letters, k=rng.randint(*ANSWER_LETTERS)))
        rows.append({"messages": [*asked, {"role": "assistant", "content": answer}]})
    file.write_text("\n".join(map(json.dumps, rows)))


def bench_case(bench: Bench, case: str) -> None:
    """Take apart the steps of one stage and objective, at every shape and number of ranks."""
    for shape, ranks in product(bench.args.shapes, bench.args.ranks):
        with tempfile.TemporaryDirectory() as directory:
            inputs = make_inputs(Path(directory), shape, bench.args)
            make_rows(Path(directory) / "prompts.jsonl")
            run = Path(directory) / "run"
            inputs += [f"output_dir={run}", f"parallel.expert_parallel_size={ranks}"]
            inputs += bench.args.overrides
            if case == "sft":
                inputs = [each for each in inputs if not each.startswith("stage.")]
            run_job(__file__, "train", {"case": case, "overrides": inputs}, ranks=ranks)
            logged, recorded = read_log(run)[WARM_UPS:], recorded_steps(run)
        cells: dict[str, Any] = {"shape": shape, "ranks": ranks}
        cells |= columns(logged[:NUM_PLAIN], recorded)
        slowed = median(step["time/step"] for step in logged[NUM_PLAIN:])
        cells["recorded / step"] = 1e3 * slowed / cells["step ms"]
        bench.add(case, cells, {"steps": logged, "shares": recorded})


def columns(plain: Sequence[Step], recorded: Sequence[dict[str, float]]) -> dict[str, Any]:
    """Columns of the shares of recorded steps, and of the rate of plain ones."""
    shares = {name: median(step[name] for step in recorded) for name in CLASSES}
    shares["Python"] = 1 - sum(shares.values())
    rate = median(step["data/num_tokens"] / step["time/step"] for step in plain)
    cells = {"step ms": 1e3 * median(step["time/step"] for step in plain)}
    cells |= {f"{name} %": 100 * share for name, share in shares.items()}
    return cells | {"tokens/s": rate, "bound tokens/s": rate / shares["products"]}


def bench_run(bench: Bench) -> None:
    """Take apart the recorded steps of a run that was made before."""
    logged, recorded = read_log(bench.args.run), recorded_steps(bench.args.run)
    bench.add("run", columns(logged, recorded), {"steps": logged, "shares": recorded})


PARTS: dict[str, Callable[[Bench], None]] = {
    **{case: partial(bench_case, case=case) for case in CASES},
    "run": bench_run,
}


def parse_arguments() -> argparse.Namespace:
    """Read the command line."""
    parser = parser_of(__doc__ or "", PARTS, SHAPES, usual_shapes=["quickstart", "vocabulary"])
    parser.add_argument(
        "--ranks", type=int, nargs="+", default=[1, 2], help="Launch so many; 1 and 2 if absent."
    )
    parser.add_argument(
        "--overrides", type=str.split, default=[], help="Of the runs, as key=value key=value."
    )
    parser.add_argument("--run", type=Path, help="Read this run, for --only run.")
    args = parser.parse_args()
    args.only = args.only or (["run"] if args.run else list(CASES))
    if "run" in args.only and args.run is None:
        parser.error("--only: run needs --run")
    args.student = args.teacher = args.prompts = None
    return args


def main() -> None:
    """Run the parts asked for; print tables and write the numbers."""
    os.environ |= {"CUDA_VISIBLE_DEVICES": "", "TOKENIZERS_PARALLELISM": "false"}
    if not do_job({"train": train}):
        Bench(parse_arguments(), torch.device("cpu")).run(PARTS)


if __name__ == "__main__":
    main()
