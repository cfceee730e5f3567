"""Steps of fine-tuning beside those of TRL's trainer.

    python scripts/bench/sft.py --json sft.json --trl-python venv-trl/bin/python [--rows 64]

All rows are one batch, so that every step has the same tokens; lengths are drawn from 16 to 1,024.
Ours is a run of experiment=sft on one rank, in float32 on a CPU. The loss of the first step is
compared over all sides; TRL's packed rows see each other where its attention is not flash
attention, and their loss is said and not compared. Sides take turns, a process each in every round;
tokens are those of the rows, whatever a side pads. The environment of --trl-python needs torch and
trl alone.
"""

import argparse
import json
import os
import tempfile
from dataclasses import replace
from functools import partial
from pathlib import Path
from random import Random
from statistics import fmean, median
from typing import Any

import torch
from harness import MIB, OURS, Bench, do_job, linux_bytes, parser_of, run_job, span
from our_side import make_tokenizer, read_log
from shapes import MEDIUM, MINI

from marco_train import distributed
from marco_train.config.compose import read_run
from marco_train.losses.chains import compile_chains
from marco_train.models import save_model
from marco_train.models.weights import random_model
from marco_train.stages.sft import run_sft

SHAPE = replace(MEDIUM, vocab_size=MINI.vocab_size, num_experts=32)
LENGTHS = (16, 1024)
COMPILED = "ours, compile_losses"
OUR_SIDES = {OURS: False, COMPILED: True}
PACKED = "TRL, packed"
THEIR_SIDES: dict[str, dict[str, Any]] = {
    PACKED: {"packing": True, "experts": "grouped_mm", "microbatch": 1, "recompute": False},
    "TRL, padded": {"packing": False, "experts": "grouped_mm", "microbatch": 4, "recompute": False},
    "TRL's defaults in float32": {
        **{"packing": False, "experts": None, "microbatch": 8, "recompute": True},
    },
}
TOLERANCE = 1e-4
WARM_UPS = 1


def train(model: str, rows: str, num_rows: int, steps: int, compiled: bool) -> dict[str, Any]:
    """Job: make a run of ours; what it logged of its steps, and the process's peak memory."""
    distributed.start()
    compile_chains(compiled)
    with tempfile.TemporaryDirectory() as directory:
        run_sft(
            read_run(
                [
                    *("experiment=sft", "parallel=one_rank", "checkpoint=none", "resume=never"),
                    *(f"model.path={model}", "model.dtype=float32", f"output_dir={directory}"),
                    *("data=own", f"data.path={rows}", f"stage.global_batch_size={num_rows}"),
                    *(f"stage.max_length={LENGTHS[1]}", f"stage.num_epochs={steps}"),
                    *(
                        "optim.schedule=constant",
                        "optim.min_learning_rate=1e-5",
                        "optim.warmup_share=null",
                    ),
                ]
            )
        )
        log = read_log(Path(directory))
    return {
        "seconds": [step["time/step"] for step in log],
        "loss": log[0]["loss/cross_entropy"],
        "peak": linux_bytes("VmHWM"),
    }


def make_inputs(directory: Path, num_rows: int) -> tuple[str, str, int]:
    """Write a model and rows of random tokens; their paths, and the tokens of all rows."""
    rng, tokenizer = Random(0), directory / "words"
    make_tokenizer(tokenizer)
    save_model(random_model(SHAPE, torch.float32, seed=0), directory / "model", tokenizer)
    lengths = [rng.randint(*LENGTHS) for _ in range(num_rows)]
    rows = [[rng.randrange(256) for _ in range(length)] for length in lengths]
    lines = [json.dumps({"input_ids": ids, "labels": ids}) for ids in rows]
    (directory / "rows.jsonl").write_text("\n".join(lines))
    return str(directory / "model"), str(directory / "rows.jsonl"), sum(lengths)


def bench_trl(bench: Bench) -> None:
    """Check and time all sides."""
    num_rows, steps = bench.args.rows, WARM_UPS + bench.args.steps
    theirs = partial(
        run_job, Path(__file__).with_name("trl_side.py"), "fine_tune", python=bench.args.trl_python
    )
    rounds: dict[str, list[dict[str, Any]]] = {}
    with tempfile.TemporaryDirectory() as directory:
        model, rows, num_tokens = make_inputs(Path(directory), num_rows)
        given = {"model": model, "rows": rows, "num_rows": num_rows, "steps": steps}
        for _ in range(bench.repeats):
            for side in bench.args.sides:
                if side in OUR_SIDES:
                    found = run_job(__file__, "train", given | {"compiled": OUR_SIDES[side]})
                else:
                    found = theirs({"setup": given | THEIR_SIDES[side]})
                rounds.setdefault(side, []).append(found)
    speeds = {
        side: [num_tokens / fmean(found["seconds"][WARM_UPS:]) for found in of_side]
        for side, of_side in rounds.items()
    }
    for side, of_side in rounds.items():
        cells: dict[str, Any] = {"side": side, "loss": of_side[0]["loss"]}
        if side != PACKED and abs(cells["loss"] / rounds[OURS][0]["loss"] - 1) > TOLERANCE:
            bench.add("trl", cells | {"note": "wrong"})
            continue
        ratios = [one / other for one, other in zip(speeds[OURS], speeds[side], strict=True)]
        cells |= {"tokens/s": median(speeds[side]), "tokens/s range": span(speeds[side])}
        cells |= {"ours / side": median(ratios), "ratio range": span(ratios)}
        cells["peak MiB"] = median(found["peak"] for found in of_side) / MIB
        bench.add("trl", cells, of_side)
    bench.note("trl", f"{num_rows} rows, {num_tokens} tokens a step; goal: 3 x TRL's best")
    bench.note("trl", *(f"{side}: {settings}" for side, settings in THEIR_SIDES.items()))


def main() -> None:
    """Run, print a table and write the numbers."""
    os.environ |= {"CUDA_VISIBLE_DEVICES": "", "TOKENIZERS_PARALLELISM": "false"}
    if do_job({"train": train}):
        return
    sides = [*OUR_SIDES, *THEIR_SIDES]
    parser: argparse.ArgumentParser = parser_of(__doc__ or "", ["trl"], ["medium"], ["medium"])
    parser.add_argument("--trl-python", type=Path, help="Run TRL in this interpreter.")
    parser.add_argument("--rows", type=int, default=64, help="Of a batch.")
    parser.add_argument("--steps", type=int, default=2, help="Time so many steps of a run.")
    parser.add_argument("--sides", type=lambda text: text.split(";"), default=sides, help="Some.")
    args = parser.parse_args()
    if args.trl_python is None:
        args.sides = [side for side in args.sides if side in OUR_SIDES]
    Bench(args, torch.device("cpu")).run({"trl": bench_trl})


if __name__ == "__main__":
    main()
