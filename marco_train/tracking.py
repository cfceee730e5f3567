"""Console line, metrics.jsonl and W&B behind one `log(step, metrics)`; on the main rank only."""

import json
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any, TextIO
from uuid import uuid4

from tqdm import tqdm

from marco_train.config import LoggingBackend, LoggingConfig
from marco_train.metrics import Metrics, check_names


def say(text: str) -> None:
    """Print one line, past a progress bar if there is one."""
    tqdm.write(text, file=sys.stdout)
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
        if cfg.backend is LoggingBackend.wandb:
            import wandb

            self._wandb = wandb.init(
                project=cfg.project,
                name=name,
                dir=str(directory),
                config=dict(run_config),
                mode=cfg.mode.value,
                resume="allow",
                id=_wandb_id(directory, resumed),
            )
            # Steps made again after a crash replace nothing: W&B orders by this, not by arrival.
            self._wandb.define_metric("*", step_metric="step")

    def start(self, first: int, until: int) -> None:
        """Announce the steps to come; lines of `metrics.jsonl` past `first` are from a lost run."""
        rewritten = self._jsonl.with_suffix(".partial")
        rewritten.write_text("".join(line + "\n" for line in self._lines_until(first)))
        rewritten.replace(self._jsonl)
        self._file = self._jsonl.open("a")
        if sys.stderr.isatty():
            self._bar = tqdm(total=until, initial=first, unit="step", dynamic_ncols=True)

    def _lines_until(self, step: int) -> list[str]:
        """Lines of an earlier launch up to a step; what a power cut tore is left out."""
        kept = []
        for line in self._jsonl.read_text().splitlines() if self._jsonl.is_file() else []:
            try:
                if json.loads(line)["step"] <= step:
                    kept.append(line)
            except json.JSONDecodeError:
                say(f"{self._jsonl}: left out a torn line")
        return kept

    def log(self, step: int, until: int, phase: str | None, metrics: Metrics, eta: float) -> None:
        """Record the metrics of the update that made `step` updates complete."""
        check_names(metrics)
        assert self._file is not None
        self._file.write(json.dumps({"step": step} | metrics) + "\n")
        self._file.flush()
        if self._wandb is not None:
            self._wandb.log(metrics | {"step": step})
        if self._bar is not None:
            self._bar.update(1)
        if step % self._every == 0 or step == until:
            say(step_line(step, until, phase, metrics, eta))

    def close(self) -> None:
        """Flush everything."""
        if self._file is not None:
            self._file.close()
        if self._bar is not None:
            self._bar.close()
        if self._wandb is not None:
            self._wandb.finish()


def _wandb_id(directory: Path, resumed: bool) -> str:
    """One id for a run and its resumptions, another for a run that starts over."""
    file = directory / "wandb_id"
    if not (resumed and file.is_file()):
        file.write_text(uuid4().hex[:12])
    return file.read_text()


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
