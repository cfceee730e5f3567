"""The entry point: compose the config, check it, run the stage it names."""

import json
import os
import sys
import time
from contextlib import nullcontext
from pathlib import Path

import hydra
from omegaconf import DictConfig, MissingMandatoryValue

from marco_train.config import TrainConfig, to_run
from marco_train.config.resumption import check_resume, continuation, is_finished
from marco_train.config.run import CONFIG_DIR, register_schemas
from marco_train.config.secrets import redacted
from marco_train.config.stage import StageKind
from marco_train.errors import (
    EXIT_STATUS,
    TRY_AGAIN_LATER,
    InputError,
    RunInterrupted,
    ServersUnavailable,
    SkippedUpdatesError,
)
from marco_train.files import replaces

# Other ranks wait this long, so that rank 0 can print the error before torchrun ends the job.
SECONDS_TO_SAY_IT = 10

register_schemas()


def main() -> None:
    """Run one stage; see `configs/experiment/`."""
    # Hydra would make what its own node names so, before anything here is asked.
    targets = [given for given in sys.argv[1:] if "_target_" in given]
    if targets:
        sys.exit(f"error: {targets[0]}: no config names code to run; leave _target_ out")
    run_composed()


@hydra.main(version_base="1.3", config_path=str(CONFIG_DIR), config_name="train")
def run_composed(composed: DictConfig) -> None:
    """Run the stage of what Hydra composed of the command line."""
    try:
        cfg = to_run(composed)
        check_resume(cfg)
        finished = is_finished(cfg)
        if not finished:
            continuation(cfg)  # refuses what it may not change, before anything is loaded
    except (InputError, MissingMandatoryValue) as error:
        # The same on every rank of a launch; one says it, before the launcher ends the others.
        if not is_first_rank():
            time.sleep(SECONDS_TO_SAY_IT)
        sys.exit(f"error: {redacted(in_one_line(error))}" if is_first_rank() else 1)
    if finished:
        if is_first_rank():
            print(f"{cfg.name}: already finished in {cfg.output_dir}", flush=True)
        return
    try:
        run_stage(cfg)
        note_exit(cfg, 0, "finished")
    except (InputError, SkippedUpdatesError) as error:
        note_exit(cfg, 1, str(error))
        sys.exit(f"error: {redacted(str(error))}")
    except ServersUnavailable as error:  # the same on every rank
        note_exit(cfg, TRY_AGAIN_LATER, str(error))
        if is_first_rank():
            said = redacted(str(error))
            print(f"error: {said}; nothing is lost: launch it again later", file=sys.stderr)
        sys.exit(TRY_AGAIN_LATER)
    except RunInterrupted as error:  # the same on every rank
        note_exit(cfg, error.code, error.reason, error.step, error.checkpoint)
        if is_first_rank():
            print(error, flush=True)
        sys.exit(error.code)
    except BaseException as error:
        lost = said_of_lost_ranks(error)
        if lost is not None:
            note_exit(cfg, 1, lost)
            sys.exit(f"error: {lost}")
        note_exit(cfg, 1, f"{type(error).__name__}: {error}")
        raise


def note_exit(
    cfg: TrainConfig,
    code: int,
    reason: str,
    step: int | None = None,
    checkpoint: str | None = None,
    speaks: bool | None = None,
) -> None:
    """Leave exit_status.json, and tell the recipe that launched this: torchrun itself ends with 1.

    Args:
        cfg: The run.
        code: The exit status of this process.
        reason: What it ends by.
        step: Updates made, where it was told to end.
        checkpoint: Where they are saved.
        speaks: Whether this rank tells of the run. None: the first does.
    """
    told = os.environ.get("MARCO_TRAIN_EXIT_STATUS")  # a file of the recipe on this node
    if told and os.environ.get("LOCAL_RANK", "0") == "0":
        Path(told).write_text(str(code))
    if (is_first_rank() if speaks is None else speaks) and Path(cfg.output_dir).is_dir():
        status = {
            "code": code,
            "reason": redacted(reason),
            "step": step,
            "checkpoint": checkpoint,
        }
        with replaces(Path(cfg.output_dir) / EXIT_STATUS) as partial:
            partial.write_text(json.dumps(status, indent=2))


def said_of_lost_ranks(error: BaseException) -> str | None:
    """Say which ranks are gone where an error is that of a collective; None: it is another's."""
    if "torch" not in sys.modules or not isinstance(error, RuntimeError):
        return None
    from marco_train.watch import said_of_lost_ranks

    return said_of_lost_ranks()


def is_first_rank() -> bool:
    """Whether this process speaks for a launch; known before the ranks have met."""
    return os.environ.get("RANK", "0") == "0"


def in_one_line(error: Exception) -> str:
    """Say what is wrong without OmegaConf's trail of keys."""
    if isinstance(error, MissingMandatoryValue):
        key = error.full_key or "name"
        return f"{key} has no value: choose a run with experiment=<name>, or give {key}=<value>"
    return str(error)


def run_stage(cfg: TrainConfig) -> None:
    """Join the other ranks and run the stage; heavy libraries are imported from here on."""
    from marco_train import distributed, interruption
    from marco_train.errors import HUNG
    from marco_train.watch import watched

    def on_hang(said: str, speaks: bool) -> None:
        note_exit(cfg, HUNG, said, speaks=speaks)

    distributed.start(cfg.parallel.timeout_seconds, deterministic=cfg.deterministic)
    # An evaluation has no state to save, and nothing in it would look at what it is asked.
    trains = cfg.stage.kind is not StageKind.evaluate
    with (
        watched(cfg.parallel.hang_seconds, on_hang),
        interruption.listening() if trains else nullcontext(),
    ):
        run_kind(cfg)
    distributed.stop()


def run_kind(cfg: TrainConfig) -> None:
    """Run the stage that the config names."""
    match cfg.stage.kind:
        case StageKind.sft:
            from marco_train.stages.sft import run_sft

            run_sft(cfg)
        case StageKind.opd:
            from marco_train.stages.opd import run_opd

            run_opd(cfg)
        case StageKind.evaluate:
            from marco_train.stages.evaluate import run_evaluate

            run_evaluate(cfg)


if __name__ == "__main__":
    main()
