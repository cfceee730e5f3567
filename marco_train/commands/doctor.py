"""Check a run without training it, and say everything that is wrong with it.

The checks are the run's own up to its first update: files and rows, the first batch, the weights in
memory, and for distillation a hand-over of weights to the sampler, the student's answers to the
run's first prompts and what every teacher says of them. Under torchrun they are made as the run
would be spread, and what one rank finds is said for all.
"""

import sys
import time
from collections.abc import Sequence
from pathlib import Path
from tempfile import TemporaryFile

from marco_train.commands.examination import Examination
from marco_train.config import TrainConfig
from marco_train.config.compose import compose, read_words
from marco_train.config.resumption import check_resume, continuation, is_finished
from marco_train.config.stage import StageKind
from marco_train.errors import InputError
from marco_train.hub import read_settled
from marco_train.train import is_first_rank, tell_torchrun

USAGE = """usage: marco-train doctor experiment=<name> [key=value ...] [--config-dir DIR]

Makes all of a run up to its first update, but for the optimizer, and says everything that is wrong.
Ends with 0 where nothing is. Under torchrun the run is spread as it would be."""


def main(words: Sequence[str] | None = None) -> None:
    """Examine the run of a command line; ends with 1 where something is wrong with it."""
    start = time.perf_counter()
    words = sys.argv[1:] if words is None else words
    if {"--help", "-h"} & set(words):
        print(USAGE)
        return
    faults = examine(words)
    if faults:
        tell_torchrun("; ".join(faults))
        sys.exit("\n".join(f"error: {fault}" for fault in faults) if is_first_rank() else 1)
    if is_first_rank():
        print(f"all is well, {time.perf_counter() - start:.0f} s")


def examine(words: Sequence[str]) -> list[str]:
    """Make all checks of a run; gives what is wrong, each in a sentence."""
    checks = Examination()
    cfg = checks.make("config", read_settled, words)
    if checks.faults:
        return faults_of_words(words) or checks.faults
    if cfg.stage.leaves_files:
        checks.make("output directory", check_output, cfg)
    # Heavy libraries are imported from here on.
    from marco_train import distributed
    from marco_train.commands import stage_checks
    from marco_train.commands.machine import check_machine
    from marco_train.losses.chains import compile_chains

    distributed.start(cfg.parallel.timeout_seconds, deterministic=cfg.deterministic)
    checks.meet(cfg.parallel.timeout_seconds)
    checks.can_resume = not checks.faults
    if cfg.compile_losses:
        checks.make("compiler of losses", compile_chains, cfg.compile_losses)
    check_machine(cfg, checks)
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


def faults_of_words(words: Sequence[str]) -> list[str]:
    """What is wrong with each word of a command line, beside the choices of all others."""
    try:
        overrides, directory = read_words(words)
    except InputError:
        return []  # of what has no key
    own = [] if directory is None else ["--config-dir", str(directory)]
    fields = [word for word in overrides if "." in word.partition("=")[0] and "@" not in word]
    choices = [word for word in overrides if word not in fields]
    found = []
    for word in [None, *fields]:
        try:
            compose([*own, *choices, *([] if word is None else [word])])
        except InputError as error:
            found.append(str(error))
            if word is None:
                break  # and of every word, with it
    return found


def check_output(cfg: TrainConfig) -> None:
    """Refuse a directory that cannot be written, and a resumption that the run would refuse.

    Raises:
        InputError: Says which.
    """
    directory = Path(cfg.output_dir).absolute()
    while not directory.exists():
        directory = directory.parent
    try:
        # Tried, as rights alone do not tell: root has them all, also where nothing can be written.
        TemporaryFile(dir=directory).close()
    except OSError as error:
        raise InputError(
            f"output_dir is {cfg.output_dir!r}, and {directory} is no directory that can be "
            f"written ({error.strerror}): choose another output_dir or root"
        ) from error
    check_resume(cfg)
    if not is_finished(cfg):
        continuation(cfg)
