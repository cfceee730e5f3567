"""The entry point: compose the config, check it, run the stage it names."""

import json
import os
import sys
import time
from contextlib import nullcontext
from pathlib import Path
from typing import NoReturn

import hydra
from omegaconf import DictConfig, MissingMandatoryValue

from marco_train.config import TrainConfig, to_run
from marco_train.config.resumption import (
    check_resume,
    continuation,
    is_finished,
    lost_since_finished,
)
from marco_train.config.run import CONFIG_DIR, register_schemas
from marco_train.config.stage import StageKind
from marco_train.errors import (
    EXIT_STATUS,
    TRY_AGAIN_LATER,
    CheckpointError,
    DirectoryInUseError,
    InputError,
    RunInterrupted,
    ServersUnavailable,
)
from marco_train.files import replaces

# Other ranks wait this long, so that rank 0 can print the error before torchrun ends the job.
SECONDS_TO_SAY_IT = 10

register_schemas()


@hydra.main(version_base="1.3", config_path=str(CONFIG_DIR), config_name="train")
def main(composed: DictConfig) -> None:
    """Run one stage; see `configs/experiment/`."""
    try:
        cfg = to_run(composed)
        check_resume(cfg)
        finished = is_finished(cfg)
        if not finished:
            continuation(cfg)  # refuses what it may not change, before anything is loaded
    except (InputError, MissingMandatoryValue) as error:
        refuse(error)
    if finished:
        if is_first_rank():
            print(f"{cfg.name}: already finished in {cfg.output_dir}", flush=True)
        return
    if is_first_rank() and (lost := lost_since_finished(cfg)) is not None:
        print(f"{cfg.name}: {lost}; finishing again from the last checkpoint", flush=True)
    run_to_its_end(cfg)


def run_to_its_end(cfg: TrainConfig) -> None:
    """Run a stage, and end this process with the status that says how it went."""
    try:
        run_stage(cfg)
        note_exit(cfg, 0, "finished")
    except DirectoryInUseError as error:  # its exit_status.json is the other launch's to write
        refuse(error)
    except CheckpointError as error:
        note_exit(cfg, 1, str(error))
        refuse(error)
    except InputError as error:
        note_exit(cfg, 1, str(error))
        sys.exit(f"error: {error}")
    except ServersUnavailable as error:  # the same on every rank
        note_exit(cfg, TRY_AGAIN_LATER, str(error))
        if is_first_rank():
            print(f"error: {error}; nothing is lost: launch it again later", file=sys.stderr)
        sys.exit(TRY_AGAIN_LATER)
    except RunInterrupted as error:  # the same on every rank
        note_exit(cfg, error.code, error.reason, error.step, error.checkpoint)
        if is_first_rank():
            print(error, flush=True)
        sys.exit(error.code)
    except BaseException as error:
        note_exit(cfg, 1, f"{type(error).__name__}: {error}")
        raise


def refuse(error: Exception) -> NoReturn:
    """End with what is the same on every rank; one says it, before the launcher ends the others."""
    if not is_first_rank():
        time.sleep(SECONDS_TO_SAY_IT)
    sys.exit(f"error: {in_one_line(error)}" if is_first_rank() else 1)


def note_exit(
    cfg: TrainConfig,
    code: int,
    reason: str,
    step: int | None = None,
    checkpoint: str | None = None,
) -> None:
    """Leave exit_status.json, and tell the recipe that launched this: torchrun itself ends with 1.

    Args:
        cfg: The run.
        code: The exit status of this process.
        reason: What it ends by.
        step: Updates made, where it was told to end.
        checkpoint: Where they are saved.
    """
    told = os.environ.get("MARCO_TRAIN_EXIT_STATUS")  # a file of the recipe on this node
    if told and os.environ.get("LOCAL_RANK", "0") == "0":
        Path(told).write_text(str(code))
    if is_first_rank() and Path(cfg.output_dir).is_dir():
        status = {"code": code, "reason": reason, "step": step, "checkpoint": checkpoint}
        with replaces(Path(cfg.output_dir) / EXIT_STATUS) as partial:
            partial.write_text(json.dumps(status, indent=2))


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
    from marco_train.run import directory_held

    distributed.start(cfg.parallel.timeout_seconds, deterministic=cfg.deterministic)
    # An evaluation has no state to save, and nothing in it would look at what it is asked.
    trains = cfg.stage.kind is not StageKind.evaluate
    with interruption.listening() if trains else nullcontext(), directory_held(cfg):
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
