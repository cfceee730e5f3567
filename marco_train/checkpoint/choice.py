"""Which checkpoint a run goes on from: the newest whose every file is what was written.

    newest -> all files digested, shared by the ranks -> sound | damaged -> the one before it

A damaged one is set aside once a sound one is found, so that whoever looks for the newest finds
that. Where none is sound nothing is moved, and the run is refused.
"""

from pathlib import Path

from marco_train.checkpoint.store import set_aside_damaged, verify
from marco_train.config import TrainConfig
from marco_train.config.resumption import (
    check_resume,
    checkpoints_of,
    complete_checkpoints,
    refuse_all,
    refuse_damaged,
)
from marco_train.distributed import barrier, gather_objects, is_main, sharing_errors
from marco_train.errors import InputError
from marco_train.tracking import log_line


def settle_checkpoint(cfg: TrainConfig, may_move: bool) -> None:
    """Verify the checkpoint that a run goes on from; all ranks take part.

    Args:
        cfg: The run, which trains.
        may_move: Whether damaged checkpoints are set aside, or only told of.

    Raises:
        InputError: The one that was asked for cannot be used, or all of them are damaged.
    """
    if cfg.resume == "never":
        return
    if cfg.resume != "auto":
        check_resume(cfg)
        refuse_damaged(Path(cfg.resume), verify(Path(cfg.resume)), cfg)
        return
    damaged: list[tuple[Path, str]] = []
    # One file system may lag behind another.
    for found in gather_objects([str(p) for p in complete_checkpoints(checkpoints_of(cfg))])[0]:
        path = Path(found)
        fault = verify(path)
        if fault is None:
            break
        damaged.append((path, fault))
    else:
        refuse_all([fault for _, fault in damaged], cfg)
        return
    with sharing_errors(InputError, OSError):
        if is_main():
            for passed, fault in damaged:
                where = set_aside_damaged(passed) if may_move else "nowhere yet: a run would do so"
                log_line(f"{fault}: passed over, for {path}; {passed.name} is set aside: {where}")
    barrier()
