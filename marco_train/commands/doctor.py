"""Check a run without training it, and say everything that is wrong with it.

The checks are the run's own up to its first update: files and rows, the first batch, the weights in
memory, and for distillation a hand-over of weights to the sampler, the student's answers to the
run's first prompts and what every teacher says of them. Under torchrun they are made as the run
would be spread, and end with the first that finds a fault.
"""

import os
import sys
import time
from pathlib import Path

from hydra import compose, initialize_config_dir

from marco_train.commands.examination import Examination
from marco_train.config import TrainConfig, to_run
from marco_train.config.paths import CONFIG_DIR
from marco_train.config.resumption import check_resume, continuation, is_finished
from marco_train.config.stage import StageKind
from marco_train.errors import require
from marco_train.train import is_first_rank


def main() -> None:
    """Examine the run of a command line; ends with 1 where something is wrong with it."""
    start = time.perf_counter()
    faults = examine(sys.argv[1:])
    if faults:
        sys.exit("\n".join(f"error: {fault}" for fault in faults) if is_first_rank() else 1)
    if is_first_rank():
        print(f"all is well, {time.perf_counter() - start:.0f} s")


def examine(overrides: list[str]) -> list[str]:
    """Make all checks of a run; gives what is wrong, each in a sentence."""
    checks = Examination()
    cfg = checks.make("config", composed, overrides)
    if checks.faults:
        return checks.faults
    checks.make("output directory", check_output, cfg)
    checks.can_resume = not checks.faults
    # Heavy libraries are imported from here on.
    from marco_train import distributed
    from marco_train.commands import stage_checks

    distributed.start(cfg.parallel.timeout_seconds, deterministic=cfg.deterministic)
    match cfg.stage.kind:
        case StageKind.sft:
            stage_checks.check_sft(cfg, checks)
        case StageKind.opd:
            stage_checks.check_opd(cfg, checks)
        case StageKind.evaluate:
            stage_checks.check_evaluate(cfg, checks)
        case StageKind.benchmark:
            stage_checks.check_benchmark(cfg, checks)
    distributed.stop()
    return checks.faults


def composed(overrides: list[str]) -> TrainConfig:
    """Compose and check a config as the command line does."""
    with initialize_config_dir(version_base="1.3", config_dir=str(CONFIG_DIR)):
        return to_run(compose("train", overrides=overrides))


def check_output(cfg: TrainConfig) -> None:
    """Refuse a directory that cannot be written, and a resumption that the run would refuse.

    Raises:
        InputError: Says which.
    """
    directory = Path(cfg.output_dir).absolute()
    while not directory.exists():
        directory = directory.parent
    require(
        directory.is_dir() and os.access(directory, os.W_OK),
        f"output_dir is {cfg.output_dir!r}, and {directory} is no directory that can be written: "
        "choose another output_dir or root",
    )
    check_resume(cfg)
    if not is_finished(cfg):
        continuation(cfg)
