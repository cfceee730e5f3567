"""A run on W&B: offline or online, one id for all launches, nothing lost where one was killed."""

import socket
import struct
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit
from urllib.request import getproxies
from uuid import uuid4

from marco_train.config.secrets import redacted
from marco_train.config.tracking import LoggingConfig, WandbMode
from marco_train.metrics import Metrics
from marco_train.tracking.console import log_line
from marco_train.tracking.samples import Sample

SECONDS_TO_CONNECT = 5.0
# Of which the least is what counts, in W&B's table of runs.
BETTER_LOWER = ("loss/cross_entropy", "eval/cross_entropy", "kl/reverse", "eval/reverse_kl")


class WandbRun:
    """Gives W&B what a run measures and says."""

    name = "W&B"

    def __init__(
        self,
        cfg: LoggingConfig,
        directory: Path,
        name: str,
        run_config: Mapping[str, Any],
        resumed: bool,
    ) -> None:
        run_id = _wandb_id(directory, resumed)
        # What is in these files is not recorded again; in online mode W&B has it.
        written = sorted(directory.glob(f"wandb/offline-run-*-{run_id}/run-{run_id}.wandb"))
        self._run = _open_wandb(cfg, directory, name, run_config, run_id)
        offline = self._run.settings.mode == WandbMode.offline.value
        self._lost_after = lost_after(written) if offline else None
        # W&B cannot replace a step that is made again after a crash; this is what it sorts by.
        self._run.define_metric("*", step_metric="step")
        for metric in BETTER_LOWER:
            self._run.define_metric(metric, step_metric="step", summary="min,last")
        self._run.define_metric("eval/score", step_metric="step", summary="max,last")

    def start(self, lines: Sequence[Mapping[str, Any]]) -> None:
        """Record again what a killed launch did not write, of the lines of all launches."""
        if self._lost_after is not None:
            for line in lines:
                if line["step"] > self._lost_after:
                    self._log(line)

    def log(self, step: int, metrics: Metrics) -> None:
        """Record a step."""
        self._log({"step": step} | metrics)

    def _log(self, line: Mapping[str, Any]) -> None:
        """Record a step under its own number, unless W&B is past it, and have it counted."""
        self._run.log(line, step=max(line["step"], self._run.step), commit=True)

    def log_samples(self, step: int, samples: Sequence[Sample]) -> None:
        """Add a table of samples to a step that is logged next, and one of a suite's answers."""
        import wandb

        facts = ["step", "category", "language", "prompt"]
        trained = wandb.Table(columns=[*facts, "response", "kl"])
        asked = wandb.Table(columns=[*facts, "response", "answer", "reference", "right"])
        for sample in samples:
            row = [step, *(sample.facts[name] for name in facts[1:])]
            if sample.is_answer:
                judged = [sample.facts[name] for name in ("answer", "reference", "right")]
                asked.add_data(*row, sample.response, *judged)
            else:
                response = wandb.Html(sample.html, inject=False)
                trained.add_data(*row, response, sample.mean_kl)
        tables = {"samples": trained, "eval/samples": asked}
        filled = {name: table for name, table in tables.items() if table.data}
        self._run.log(filled, step=max(step, self._run.step), commit=False)

    def close(self) -> None:
        """Write everything."""
        self._run.finish()


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
            config=redacted(run_config),
            group=cfg.group or str(run_config.get("root", "")) or None,
            job_type=str(run_config.get("stage", {}).get("kind", "")) or None,
            tags=tags_of(cfg, run_config),
            mode=mode.value,
            resume="allow",
            id=run_id,
            # Neither the command line, which may hold secrets, nor code.
            settings=wandb.Settings(x_disable_meta=True, disable_git=True, save_code=False),
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


def tags_of(cfg: LoggingConfig, run_config: Mapping[str, Any]) -> list[str]:
    """What runs are found by: the stage, its objective, and what the config adds."""
    stage = run_config.get("stage", {})
    found = [stage.get("kind"), stage.get("objective"), *cfg.tags]
    return list(dict.fromkeys(str(tag) for tag in found if tag))


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


def lost_after(files: list[Path]) -> int | None:
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
