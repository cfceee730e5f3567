"""Console line, metrics.jsonl and W&B behind one `log(step, metrics)`; on the main rank only."""

import json
import socket
import struct
import sys
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any, TextIO
from urllib.parse import urlsplit
from urllib.request import getproxies
from uuid import uuid4

from tqdm import tqdm

from marco_train.config.run import LoggingBackend, LoggingConfig, WandbMode
from marco_train.config.secrets import redacted
from marco_train.files import replaces
from marco_train.metrics import Metrics, check_names

SECONDS_TO_CONNECT = 5.0


def log_line(text: str) -> None:
    """Print one line without secrets, past a progress bar if there is one."""
    tqdm.write(redacted(text), file=sys.stdout)
    sys.stdout.flush()


class Tracker:
    """Writes what a run measures."""

    def __init__(
        self,
        cfg: LoggingConfig,
        directory: Path,
        name: str,
        run_config: Mapping[str, Any],
        resumed: bool = False,
    ) -> None:
        self._every = cfg.console_every
        self._jsonl = directory / "metrics.jsonl"
        self._file: TextIO | None = None
        self._bar: Any = None
        self._wandb: Any = None
        self._lost_after: int | None = None
        self._warned: set[str] = set()
        if cfg.backend is LoggingBackend.wandb:
            run_id = _wandb_id(directory, resumed)
            # What is in these files is not recorded again; in online mode W&B has it.
            written = sorted(directory.glob(f"wandb/offline-run-*-{run_id}/run-{run_id}.wandb"))
            self._wandb = _open_wandb(cfg, directory, name, run_config, run_id)
            if self._wandb.settings.mode == WandbMode.offline.value:
                self._lost_after = _lost_after(written)
            # W&B cannot replace a step that is made again after a crash; this is what it sorts by.
            self._wandb.define_metric("*", step_metric="step")

    def start(self, first: int, until: int) -> None:
        """Announce the steps to come, and drop the lines of `metrics.jsonl` past `first`.

        Those steps were made after the last checkpoint and are made again.
        """
        kept = self._lines_until(first)
        with self._only_watching("metrics.jsonl"):
            with replaces(self._jsonl) as partial:
                partial.write_text("".join(line + "\n" for line in kept))
            self._file = self._jsonl.open("a")
        if self._lost_after is not None:
            for line in map(json.loads, kept):
                if line["step"] > self._lost_after:
                    self._record(line)
        if sys.stderr.isatty():
            self._bar = tqdm(total=until, initial=first, unit="step", dynamic_ncols=True)

    def _lines_until(self, step: int) -> list[str]:
        """Lines of an earlier launch up to a step; what a power cut tore is left out."""
        kept = []
        content = self._jsonl.read_bytes() if self._jsonl.is_file() else b""
        for line in content.decode(errors="replace").splitlines():
            try:
                if json.loads(line)["step"] <= step:
                    kept.append(line)
            except (ValueError, TypeError, LookupError):
                log_line(f"{self._jsonl}: left out a torn line")
        return kept

    def log(self, step: int, until: int, phase: str | None, metrics: Metrics, eta: float) -> None:
        """Record the metrics of the update that made `step` updates complete."""
        check_names(metrics)
        if self._file is not None:
            with self._only_watching("metrics.jsonl"):
                self._file.write(json.dumps({"step": step} | metrics) + "\n")
                self._file.flush()
        if self._wandb is not None:
            self._record({"step": step} | metrics)
        if self._bar is not None:
            self._bar.update(1)
        if step % self._every == 0 or step == until:
            log_line(step_line(step, until, phase, metrics, eta))

    def _record(self, line: Mapping[str, Any]) -> None:
        """Give W&B a step, under its own number unless W&B is past it, and have it counted."""
        with self._only_watching("W&B"):
            self._wandb.log(line, step=max(line["step"], self._wandb.step), commit=True)

    @contextmanager
    def _only_watching(self, what: str) -> Iterator[None]:
        """Let no run end because of what watches it: an error is said once, and passed over."""
        try:
            yield
        except Exception as error:  # W&B lists none that its process may end with
            if what not in self._warned:
                log_line(
                    f"{what} takes no metrics ({type(error).__name__}: {error}); the run goes on"
                )
            self._warned.add(what)

    def close(self) -> None:
        """Flush everything."""
        if self._file is not None:
            with self._only_watching("metrics.jsonl"):
                self._file.close()
        if self._bar is not None:
            self._bar.close()
        if self._wandb is not None:
            with self._only_watching("W&B"):
                self._wandb.finish()


def _open_wandb(
    cfg: LoggingConfig, directory: Path, name: str, run_config: Mapping[str, Any], run_id: str
) -> Any:
    """Begin or go on with a run of W&B; offline, and said so, where W&B cannot be reached."""
    import wandb

    mode = cfg.mode

    def begin() -> Any:
        return wandb.init(
            project=cfg.project,
            name=name,
            dir=str(directory),
            config=dict(run_config),
            mode=mode.value,
            resume="allow",
            id=run_id,
            # It would hold the command line, with whatever key was given there.
            settings=wandb.Settings(x_disable_meta=True),
        )

    try:
        if mode is WandbMode.online:
            _connect(wandb.setup().settings.base_url)
        return begin()
    except (OSError, wandb.errors.Error) as error:
        if mode is WandbMode.offline:
            raise
        log_line(
            f"W&B is not reached ({error}): the run is recorded offline, under {directory}/wandb; "
            "send it later with `wandb sync`"
        )
        mode = WandbMode.offline
        return begin()


def _connect(url: str) -> None:
    """Find out in seconds whether a server listens; W&B itself takes minutes. Not over a proxy.

    Raises:
        OSError: None does.
    """
    address = urlsplit(url)
    if not getproxies().get(address.scheme):
        port = address.port or {"http": 80}.get(address.scheme, 443)
        socket.create_connection((address.hostname or "", port), SECONDS_TO_CONNECT).close()


def _wandb_id(directory: Path, resumed: bool) -> str:
    """One id for a run and its resumptions, another for a run that starts over."""
    file = directory / "wandb_id"
    if not (resumed and file.is_file()):
        file.write_text(uuid4().hex[:12])
    return file.read_text()


def _lost_after(files: list[Path]) -> int | None:
    """Last step in what offline launches wrote, where the latest was killed; None: it was not.

    W&B writes 32 KiB at a time, and what a killed launch had not written is lost to it.
    """
    steps, ended = [0], True
    for file in files:
        ended = False
        for record in _wandb_records(file):
            ended |= record.HasField("exit")
            steps.append(record.history.step.num)  # 0 of any other record
    return None if ended else max(steps)


def _wandb_records(file: Path) -> Iterator[Any]:
    """Read a file of W&B up to where it is torn.

    After 7 bytes a log of LevelDB: blocks of 32 KiB with fragments of records, each headed by its
    checksum, length and type (1: whole, 2: first, 3: middle, 4: last); no header crosses a block.
    https://github.com/google/leveldb/blob/main/doc/log_format.md
    """
    from google.protobuf.message import DecodeError
    from wandb.proto.wandb_internal_pb2 import Record

    content, place, block, header = file.read_bytes(), 7, 2**15, struct.Struct("<IHB")
    fragments = b""
    while place + header.size <= len(content):
        if block - place % block < header.size:
            place += block - place % block
            continue
        _, length, kind = header.unpack_from(content, place)
        place += header.size + length
        fragments += content[place - length : place]
        if kind in {1, 4}:
            record = Record()
            try:
                record.ParseFromString(fragments)
            except DecodeError:
                return
            fragments = b""
            yield record


def step_line(step: int, until: int, phase: str | None, metrics: Metrics, eta: float) -> str:
    """Format one step for a reader."""
    parts = [f"step {step}/{until}"]
    if phase is not None:
        parts.append(f"phase {phase}")
    for label, name, form in (
        ("loss", "loss/cross_entropy", ".3f"),
        ("held-out", "eval/cross_entropy", ".3f"),
        ("kl", "kl/reverse", ".3f"),
        ("grad", "optim/grad_norm", ".2f"),
        ("lr", "optim/lr", ".1e"),
        ("length", "rollout/response_length", ".1f"),
    ):
        if name in metrics:
            parts.append(f"{label} {metrics[name]:{form}}")
    if "perf/tokens_per_second" in metrics:
        parts.append(f"{metrics['perf/tokens_per_second'] / 1e3:.1f}k tok/s")
    timers = [
        f"{name} {format_seconds(metrics[f'time/{name}'])}"
        for name in ("sync", "sample", "score", "train")
        if f"time/{name}" in metrics
    ]
    if timers:
        parts.append(" ".join(timers))
    parts.append(f"eta {format_eta(eta)}")
    return " | ".join(parts)


def format_seconds(seconds: float) -> str:
    """Milliseconds below one second."""
    return f"{seconds * 1e3:.0f}ms" if seconds < 1 else f"{seconds:.1f}s"


def format_eta(seconds: float) -> str:
    """Hours, minutes and seconds without leading zeros."""
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    if hours:
        return f"{hours}h{minutes:02d}m"
    return f"{minutes}m{rest:02d}s" if minutes else f"{rest}s"
