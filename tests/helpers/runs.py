"""Short runs: what configures them, a crash in the middle, and what they leave."""

import json
import os
from pathlib import Path

from marco_train.config import TrainConfig
from marco_train.stages.opd import run_opd
from marco_train.stages.sft import run_sft
from tests.helpers.faults import Fault, FaultError, install
from tests.helpers.world import World

STAGES = {"sft": run_sft, "opd": run_opd}


def overrides(stage: str, world: World, out: Path, experts_over: int) -> list[str]:
    """Of six updates, with a checkpoint after three."""
    common = [
        f"root={world.root}",
        f"output_dir={out}",
        "stage.global_batch_size=6",
        "data.max_tokens_per_microbatch=128",
        "checkpoint.save_every=3",
        "checkpoint.keep_last=5",
        "checkpoint.keep_phase_ends=false",
        "optim.warmup_steps=2",
        f"parallel.expert_parallel_size={experts_over}",
        "logging.console_every=100",
    ]
    if stage == "sft":
        return [*common, "stage.num_steps=6", "stage.eval_every=2", "stage.num_eval_examples=8"]
    # The cascade switches at update 4: after the resumption, in its second phase by the end.
    return [
        *common,
        "stage.cascade.first.num_steps=4",
        "stage.cascade.second.num_steps=2",
        "stage.max_response_length=8",
    ]


def run(cfg: TrainConfig, stage: str, crash_at: int | None) -> None:
    """Run on a rank, until it crashes after so many updates."""
    if crash_at is not None:
        install([Fault("train_step", "raise", step=crash_at)])  # in this process, which ends then
    try:
        STAGES[stage](cfg)
    except FaultError:
        assert crash_at is not None


def losses(out: Path) -> list[dict[str, float]]:
    """The metrics of each step but the times."""
    lines = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
    return [
        {
            k: v
            for k, v in line.items()
            if not k.startswith(("time/", "perf/", "memory/", "rollout/sync"))
        }
        for line in lines
    ]


def distil(cfg: TrainConfig, *listening: int) -> None:
    """Run on a rank, which as a fork must not keep the servers' ports open."""
    for each in listening:
        os.close(each)
    run_opd(cfg)


def learnt(out: Path) -> tuple[list[dict[str, float]], bytes]:
    """The metrics of each step that no outage may change, and the exported weights."""
    steps = [
        {k: v for k, v in step.items() if not k.startswith("teacher/")} for step in losses(out)
    ]
    return steps, (out / "export" / "model.safetensors").read_bytes()


def num_steps_of(out: Path) -> int:
    """Steps that a run has made."""
    file = out / "metrics.jsonl"
    return len(file.read_text().splitlines()) if file.is_file() else 0


def saved_steps(out: Path) -> list[int]:
    """Steps after which there is a checkpoint."""
    return [int(file.parent.name[-6:]) for file in out.glob("checkpoints/step_*/manifest.json")]
