"""The entry point: compose the config, check it, run the stage it names."""

import os
import sys
import time

import hydra
from omegaconf import DictConfig, MissingMandatoryValue

from marco_train.config import TrainConfig, to_run
from marco_train.config.resumption import check_resume, continuation, is_finished
from marco_train.config.run import CONFIG_DIR, register_schemas
from marco_train.config.stage import StageKind
from marco_train.errors import InputError, ServersUnavailable

# The exit status by which schedulers know that a run may be queued again (EX_TEMPFAIL).
TRY_AGAIN_LATER = 75
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
        # The same on every rank of a launch; one says it, before the launcher ends the others.
        if not is_first_rank():
            time.sleep(SECONDS_TO_SAY_IT)
        sys.exit(f"error: {in_one_line(error)}" if is_first_rank() else 1)
    if finished:
        if is_first_rank():
            print(f"{cfg.name}: already finished in {cfg.output_dir}", flush=True)
        return
    try:
        run_stage(cfg)
    except InputError as error:
        sys.exit(f"error: {error}")
    except ServersUnavailable as error:  # the same on every rank
        if is_first_rank():
            print(f"error: {error}; nothing is lost: launch it again later", file=sys.stderr)
        sys.exit(TRY_AGAIN_LATER)


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
    from marco_train import distributed

    distributed.start(cfg.parallel.timeout_seconds)
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
    distributed.stop()


if __name__ == "__main__":
    main()
