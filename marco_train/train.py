"""The entry point: compose the config, check it, run the stage it names.

    marco-train [train] experiment=<name> [key=value ...] [--config-dir DIR]
        [--cfg job [--resolve] | --check]
    torchrun ... -m marco_train.train experiment=<name> [key=value ...]

--config-dir DIR adds groups of your own, such as DIR/experiment/mine.yaml; --cfg job prints the run
instead of running it, and with --resolve what its values refer to. --check ends where the values
were compared with each other, before any file is looked for.
"""

import json
import os
import signal
import sys
import time
from collections.abc import Sequence
from contextlib import nullcontext, suppress
from pathlib import Path
from typing import NoReturn

from omegaconf import OmegaConf

from marco_train.config import TrainConfig
from marco_train.config.compose import compose, read_run, sweep_refusal
from marco_train.config.resumption import (
    check_resume,
    continuation,
    is_finished,
    lost_since_finished,
)
from marco_train.config.secrets import redacted
from marco_train.config.stage import StageKind
from marco_train.errors import (
    EXIT_STATUS,
    REFUSED,
    TRY_AGAIN_LATER,
    CheckpointError,
    DirectoryInUseError,
    InputError,
    RunInterrupted,
    ServersUnavailable,
    SkippedUpdatesError,
    require,
)
from marco_train.files import replaces
from marco_train.hub import read_settled

# Other ranks wait this long, so that rank 0 can print the error before torchrun ends the job.
SECONDS_TO_SAY_IT = 10


def main(words: Sequence[str] | None = None) -> None:
    """Run one stage, or print it; see `configs/experiment/`."""
    cfg = read(list(sys.argv[1:] if words is None else words))
    if cfg is None:
        return
    lost = lost_since_finished(cfg) if cfg.stage.leaves_files else None
    if is_first_rank() and lost is not None:
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
    except (InputError, SkippedUpdatesError) as error:
        note_exit(cfg, REFUSED if isinstance(error, InputError) else 1, str(error))
        if not is_first_rank():  # it may be another's too, and is said once then
            time.sleep(SECONDS_TO_SAY_IT)
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
        # torchrun ends this rank as soon as it sees another dead, and this one has to say so first.
        signal.signal(signal.SIGTERM, signal.SIG_IGN)
        lost = said_of_lost_ranks(error)
        if lost is not None:
            note_exit(cfg, 1, lost)
            sys.exit(f"error: {lost}")
        note_exit(cfg, 1, f"{type(error).__name__}: {error}")
        raise


def read(words: Sequence[str]) -> TrainConfig | None:
    """Read the run of a command line, and end where it is refused.

    Returns:
        None where nothing is to be run: it was finished before, or something is printed instead.
    """
    try:
        if {"--help", "-h"} & set(words):
            print(__doc__.strip())
            return None
        require(not {"--multirun", "-m"} & set(words), sweep_refusal(words))
        if {"--cfg", "-c"} & set(words):
            print_config(words)
            return None
        if "--check" in words:
            read_run([word for word in words if word != "--check"])
            return None
        cfg = read_settled(words)
        if not cfg.stage.leaves_files:  # a plan, whatever the directory holds
            return cfg
        check_resume(cfg)
        if not is_finished(cfg):
            continuation(cfg)  # refuses what it may not change, before anything is loaded
            return cfg
    except InputError as error:
        tell_recipe(REFUSED)
        refuse(error)
    if is_first_rank():
        print(f"{cfg.name}: already finished in {cfg.output_dir}", flush=True)
    return None


def print_config(words: Sequence[str]) -> None:
    """Print a run as YAML, without its checks.

    Raises:
        InputError: It cannot be composed, or something else than the job is asked for.
    """
    rest = [word for word in words if word not in {"--cfg", "-c", "--resolve", "job"}]
    require("job" in words, "--cfg prints the job: write --cfg job")
    print(OmegaConf.to_yaml(compose(rest), resolve="--resolve" in words), end="")


def refuse(error: Exception) -> NoReturn:
    """End with what is the same on every rank; one says it, before the launcher ends the others."""
    tell_torchrun(str(error))
    if not is_first_rank():
        time.sleep(SECONDS_TO_SAY_IT)
    sys.exit(f"error: {redacted(str(error))}" if is_first_rank() else 1)


def note_exit(
    cfg: TrainConfig,
    code: int,
    reason: str,
    step: int | None = None,
    checkpoint: str | None = None,
    speaks: bool | None = None,
) -> None:
    """Leave exit_status.json, and tell the recipe that launched this.

    Args:
        cfg: The run.
        code: The exit status of a recipe; torchrun's, and that of a process that is refused, is 1.
        reason: What it ends by.
        step: Updates made, where it was told to end.
        checkpoint: Where they are saved.
        speaks: Whether this rank tells of the run. None: the first does.
    """
    tell_recipe(code)
    if code:
        tell_torchrun(reason)
    if (is_first_rank() if speaks is None else speaks) and Path(cfg.output_dir).is_dir():
        status = {
            "code": code,
            "reason": redacted(reason),
            "step": step,
            "checkpoint": checkpoint,
        }
        with replaces(Path(cfg.output_dir) / EXIT_STATUS) as partial:
            partial.write_text(json.dumps(status, indent=2))


def tell_recipe(code: int) -> None:
    """Tell the recipe that launched this how it ends: torchrun itself ends with 1."""
    told = os.environ.get("MARCO_TRAIN_EXIT_STATUS")  # a file of the recipe on this node
    if told and os.environ.get("LOCAL_RANK", "0") == "0":
        Path(told).write_text(str(code))


def tell_torchrun(reason: str) -> None:
    """Leave the sentence of the first rank, with which torchrun's own report ends."""
    told = os.environ.get("TORCHELASTIC_ERROR_FILE")
    if told and is_first_rank():
        facts = {"timestamp": str(int(time.time()))}
        said = {"message": f"error: {redacted(reason)}", "extraInfo": facts}
        with suppress(OSError):
            Path(told).write_text(json.dumps({"message": said}))


def said_of_lost_ranks(error: BaseException) -> str | None:
    """Say which ranks are gone where an error is that of a collective; None: it is another's."""
    if "torch" not in sys.modules or not isinstance(error, RuntimeError):
        return None
    from marco_train.watch import said_of_lost_ranks

    return said_of_lost_ranks()


def is_first_rank() -> bool:
    """Whether this process speaks for a launch; known before the ranks have met."""
    return os.environ.get("RANK", "0") == "0"


def run_stage(cfg: TrainConfig) -> None:
    """Join the other ranks and run the stage; heavy libraries are imported from here on."""
    from marco_train import distributed, interruption
    from marco_train.errors import HUNG
    from marco_train.losses.chains import compile_chains
    from marco_train.run import directory_held
    from marco_train.watch import watched

    def on_hang(said: str, speaks: bool) -> None:
        note_exit(cfg, HUNG, said, speaks=speaks)

    distributed.start(cfg.parallel.timeout_seconds, deterministic=cfg.deterministic)
    compile_chains(cfg.compile_losses)
    # Others have no state to save, and nothing in them would look at what it is asked.
    trains = cfg.stage.kind in (StageKind.sft, StageKind.opd)
    with (
        watched(cfg.parallel.hang_seconds, on_hang),
        interruption.listening() if trains else nullcontext(),
        directory_held(cfg) if cfg.stage.leaves_files else nullcontext(),
    ):
        run_kind(cfg)
    if cfg.logging.report and cfg.stage.kind is not StageKind.benchmark and distributed.is_main():
        write_report(Path(cfg.output_dir))
    if cfg.export.card and trains and distributed.is_main():
        write_model_card(Path(cfg.output_dir))
    distributed.stop()


def write_report(directory: Path) -> None:
    """Make the page of a run at its end, which no fault of the page may spoil."""
    from marco_train.evaluation.run_page import REPORT, write_run_page
    from marco_train.tracking import log_line

    try:
        write_run_page(directory, directory / REPORT)
        log_line(f"report: {directory / REPORT}")
    except Exception as error:
        log_line(f"no {REPORT} ({type(error).__name__}: {error}); the run itself is whole")


def write_model_card(directory: Path) -> None:
    """Put the card beside the exported model, which no fault of the card may spoil."""
    from marco_train.evaluation.model_card import write_card
    from marco_train.tracking import log_line

    try:
        log_line(f"card: {write_card(directory)}")
    except Exception as error:
        log_line(f"no card ({type(error).__name__}: {error}); the run itself is whole")


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
        case StageKind.benchmark:
            from marco_train.stages.benchmark import run_benchmark

            run_benchmark(cfg)


if __name__ == "__main__":
    main()
