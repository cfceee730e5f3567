"""torchrun, whose report is kept back where the ranks have said themselves why they ended.

    python -m marco_train.commands.launch <torchrun's options> -m marco_train.train <overrides>

`recipes/launch.sh` calls it. A rank that ends by a refusal, or is told to end, says so in a
sentence and leaves its status in the file $MARCO_TRAIN_EXIT_STATUS, with which this ends; pages of
torchrun's own would only hide the sentence. Of a rank that was killed, which could say nothing,
its report is printed.
"""

import atexit
import logging
import os
import sys
from collections.abc import Sequence
from pathlib import Path
from tempfile import NamedTemporaryFile

VARIABLE = "MARCO_TRAIN_EXIT_STATUS"


class HeldBack(logging.Filter):
    """Keeps what torchrun logs of its processes from a handler."""

    def __init__(self, handler: logging.Handler) -> None:
        super().__init__()
        self._handler = handler
        self._records: list[logging.LogRecord] = []
        handler.addFilter(self)

    def filter(self, record: logging.LogRecord) -> bool:
        """Keep a record, unless it is of something else."""
        if not record.name.startswith("torch.distributed.elastic"):
            return True
        self._records.append(record)
        return False

    def print(self) -> None:
        """Print what was kept."""
        for record in self._records:
            self._handler.emit(record)


def main(words: Sequence[str] | None = None) -> None:
    """Run torchrun; ends with the status of the ranks, or as torchrun does."""
    from torch.distributed import DistNetworkError
    from torch.distributed.elastic.multiprocessing.api import SignalException
    from torch.distributed.elastic.multiprocessing.errors import ChildFailedError
    from torch.distributed.run import main as torchrun

    if VARIABLE not in os.environ:
        with NamedTemporaryFile(delete=False) as file:
            os.environ[VARIABLE] = file.name
        atexit.register(Path(file.name).unlink, missing_ok=True)
    kept = [HeldBack(handler) for handler in logging.getLogger("torch.distributed").handlers]
    try:
        torchrun(list(sys.argv[1:] if words is None else words))
    except (ChildFailedError, SignalException):
        if status := status_of_ranks():
            sys.exit(status)
        for held in kept:
            held.print()
        raise
    except DistNetworkError as error:
        if "EADDRINUSE" not in str(error):
            raise
        sys.exit(
            f"error: the port that nodes meet at is in use on this one (MASTER_PORT): {error}; end "
            "what holds it, a launch that is left over maybe, or give every node another"
        )


def status_of_ranks() -> int:
    """With which a rank of this node ended by itself; 0 where none failed, or could say so."""
    file = Path(os.environ[VARIABLE])
    return int(file.read_text().strip() or 0) if file.is_file() else 0


if __name__ == "__main__":
    main()
