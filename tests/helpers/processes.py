"""The command line in a process of its own, and waiting for others."""

import faulthandler
import logging
import os
import signal
import subprocess
import sys
import time
import traceback
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from runpy import run_path
from typing import NoReturn
from uuid import uuid4

from marco_train import train

REPOSITORY = Path(__file__).parents[2]
# What tells a process which rank it is: of none that a test starts.
OF_RANKS = ("RANK", "LOCAL_RANK", "WORLD_SIZE")
# Signals that torchrun handles, which a process that it starts does not.
OF_TORCHRUN = (signal.SIGTERM, signal.SIGHUP, signal.SIGQUIT)


def launch(*overrides: str) -> subprocess.CompletedProcess[str]:
    """Run the command line to its end in a process of its own, of one rank."""
    return _to_its_end(train.main, overrides, {})


def run_script(script: str, *words: str, **environment: str) -> subprocess.CompletedProcess[str]:
    """Run a program of `scripts/` to its end in a process of its own."""
    file = REPOSITORY / "scripts" / script

    def main() -> None:
        sys.path.insert(0, str(file.parent))
        run_path(str(file), run_name="__main__")

    return _to_its_end(main, words, environment)


def _to_its_end(
    main: Callable[[], object], words: Sequence[str], environment: dict[str, str]
) -> subprocess.CompletedProcess[str]:
    process = fork(main, words, environment=environment, stderr=subprocess.PIPE)
    output, errors = process.communicate()
    return subprocess.CompletedProcess(words, process.returncode, output, errors)


def fork(
    main: Callable[[], object],
    words: Sequence[str],
    num_ranks: int = 1,
    environment: Mapping[str, str] | None = None,
    stderr: int = subprocess.STDOUT,
) -> subprocess.Popen[str]:
    """Run what a module's `main` does in a forked process, with torchrun's agent over several.

    It is `python -m <module> <words>`, or torchrun of that, without what each process would need
    to import all that this one has: more time than all else that a short run does.

    Args:
        main: What every rank does.
        words: Its command line.
        num_ranks: One is without torchrun.
        environment: Variables that it finds, beside this process's.
        stderr: Where its errors go, as for `subprocess`. By default to its output.

    Returns:
        The process, in a session of its own, with its output in a pipe.
    """

    def child() -> NoReturn:
        faulthandler.disable()  # pytest's
        os.closerange(3, 4096)  # Popen waits until it can hear nothing more through one of these
        for name in OF_RANKS:
            os.environ.pop(name, None)
        os.environ.update(environment or {})
        speak_through_pipes()
        sys.argv = ["forked", *words]
        os._exit(status_of(main if num_ranks == 1 else lambda: elastic_launch(main, num_ranks)))

    return subprocess.Popen(
        ["forked"],  # which no process comes to be
        preexec_fn=child,  # noqa: PLW1509 - forked ranks are never many threads'
        cwd=REPOSITORY,
        stdout=subprocess.PIPE,
        stderr=stderr,
        text=True,
        start_new_session=True,
        restore_signals=False,  # as for a program, which the interpreter shields from SIGPIPE
    )


def speak_through_pipes() -> None:
    """Write output and errors where a new process does; pytest caught those of this one."""
    encoding = os.environ.get("PYTHONIOENCODING")
    sys.stdout, sys.stderr = (os.fdopen(fd, "w", 1, encoding, closefd=False) for fd in (1, 2))
    vars(sys).update(__stdout__=sys.stdout, __stderr__=sys.stderr)
    logging.root.handlers.clear()
    for name in logging.root.manager.loggerDict:
        for handler in logging.getLogger(name).handlers:
            if type(handler) is logging.StreamHandler:  # pytest's own are of other types
                handler.setStream(sys.stderr)


def status_of(main: Callable[[], object]) -> int:
    """Exit status of a program, which says what it ends by as the interpreter would."""
    try:
        main()
        return 0
    except SystemExit as end:
        if isinstance(end.code, str):
            print(end.code, file=sys.stderr)
        return end.code if isinstance(end.code, int) else int(end.code is not None)
    except BaseException:
        traceback.print_exc()
        return 1
    finally:
        sys.stdout.flush()
        sys.stderr.flush()


def elastic_launch(main: Callable[[], object], num_ranks: int) -> None:
    """Be torchrun, with ranks that are forked."""
    from torch.distributed.elastic.multiprocessing.errors import record
    from torch.distributed.launcher.api import elastic_launch as torchrun
    from torch.distributed.run import config_from_args, parse_args

    def rank() -> None:
        for each in OF_TORCHRUN:
            signal.signal(each, signal.SIG_DFL)
        signal.signal(signal.SIGINT, signal.default_int_handler)
        if status := status_of(main):
            os._exit(status)  # before torch says the same once more

    alone = ["--rdzv-backend=c10d", "--rdzv-endpoint=localhost:0", f"--rdzv-id={uuid4()}"]
    words = [*alone, f"--nproc-per-node={num_ranks}", "-m", "forked"]
    config, *_ = config_from_args(parse_args(words))
    config.start_method = "fork"
    record(torchrun(config, rank).__call__)()


def soon(condition: Callable[[], bool]) -> None:
    """Wait until it holds, a minute at most."""
    deadline = time.monotonic() + 60
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.01)
