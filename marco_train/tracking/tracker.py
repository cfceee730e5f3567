"""Console, files and backends behind one `log(step, metrics)`; on the main rank only."""

import json
import sys
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Protocol, TextIO

from tqdm import tqdm

from marco_train.config.tracking import LoggingBackend, LoggingConfig
from marco_train.files import replaces
from marco_train.metrics import Metrics, check_names
from marco_train.tracking.console import log_line, step_line
from marco_train.tracking.samples import Sample
from marco_train.tracking.tensorboard_run import TensorboardRun
from marco_train.tracking.trackio_run import TrackioRun
from marco_train.tracking.wandb_run import WandbRun
from marco_train.tracking.warnings import Watch

METRICS, SAMPLES, WARNINGS = "metrics.jsonl", "samples.jsonl", "warnings.jsonl"


class Backend(Protocol):
    """A service or a format that records runs."""

    name: str

    def start(self, lines: Sequence[Mapping[str, Any]]) -> None:
        """Begin after these lines of metrics, of earlier launches."""

    def log(self, step: int, metrics: Metrics) -> None:
        """Record a step."""

    def log_samples(self, step: int, samples: Sequence[Sample]) -> None:
        """Record samples of a step that is logged next."""

    def close(self) -> None:
        """Write everything."""


class Tracker:
    """Writes what a run measures and says."""

    def __init__(
        self,
        cfg: LoggingConfig,
        directory: Path,
        name: str,
        run_config: Mapping[str, Any],
        resumed: bool = False,
    ) -> None:
        self._cfg = cfg
        self._directory = directory
        self._files: dict[str, TextIO] = {}
        self._bar: Any = None
        self._failed: set[str] = set()
        self._watch = Watch(run_config)
        self._backends: list[Backend] = []
        for backend in dict.fromkeys(cfg.backends):
            match backend:
                case LoggingBackend.wandb:
                    opened: Backend = WandbRun(cfg, directory, name, run_config, resumed)
                case LoggingBackend.tensorboard:
                    opened = TensorboardRun(directory)
                case LoggingBackend.trackio:
                    opened = TrackioRun(cfg, name, run_config, resumed)
            self._backends.append(opened)

    def start(self, first: int, until: int) -> None:
        """Announce the steps to come, and drop what the files tell of steps past `first`.

        Those steps were made after the last checkpoint and are made again.
        """
        kept: dict[str, list[str]] = {}
        for name in (METRICS, SAMPLES, WARNINGS):
            file = self._directory / name
            kept[name] = _lines_until(first, file)
            with self._only_watching(name):
                if name == METRICS or file.is_file():
                    with replaces(file) as partial:
                        partial.write_text("".join(line + "\n" for line in kept[name]))
                self._files[name] = file.open("a")
        lines = list(map(json.loads, kept[METRICS]))
        for backend in self._backends:
            with self._only_watching(backend.name):
                backend.start(lines)
        if sys.stderr.isatty():
            self._bar = tqdm(total=until, initial=first, unit="step", dynamic_ncols=True)

    def log(self, step: int, until: int, phase: str | None, metrics: Metrics, eta: float) -> None:
        """Record the metrics of the update that made `step` updates complete."""
        check_names(metrics)
        self._write(METRICS, {"step": step} | metrics)
        for backend in self._backends:
            with self._only_watching(backend.name):
                backend.log(step, metrics)
        if self._bar is not None:
            self._bar.update(1)
        is_held_out = any(name.startswith("eval/") for name in metrics)
        if step % self._cfg.console_every == 0 or step == until or is_held_out:
            log_line(step_line(step, until, phase, metrics, eta))
        for sentence in self._watch.sentences(metrics):
            log_line(f"warning at step {step}: {sentence}")
            self._write(WARNINGS, {"step": step, "text": sentence})

    def log_samples(self, step: int, samples: Sequence[Sample]) -> None:
        """Record responses of a step, whose metrics are logged next."""
        for sample in samples:
            self._write(SAMPLES, sample.facts)
            if self._cfg.console_samples:
                for line in sample_lines(step, sample):
                    log_line(line)
        for backend in self._backends:
            with self._only_watching(backend.name):
                backend.log_samples(step, samples)

    def _write(self, name: str, line: Mapping[str, Any]) -> None:
        if name in self._files:
            with self._only_watching(name):
                self._files[name].write(json.dumps(line) + "\n")
                self._files[name].flush()

    @contextmanager
    def _only_watching(self, what: str) -> Iterator[None]:
        """Let no run end because of what watches it: an error is said once, and passed over."""
        try:
            yield
        except Exception as error:  # W&B lists none that its process may end with
            if what not in self._failed:
                log_line(
                    f"{what} takes no metrics ({type(error).__name__}: {error}); the run goes on"
                )
            self._failed.add(what)

    def close(self) -> None:
        """Flush everything."""
        for name, file in self._files.items():
            with self._only_watching(name):
                file.close()
        if self._bar is not None:
            self._bar.close()
        for backend in self._backends:
            with self._only_watching(backend.name):
                backend.close()


def _lines_until(step: int, file: Path) -> list[str]:
    """Lines of an earlier launch up to a step; what a power cut tore is left out."""
    kept = []
    content = file.read_bytes() if file.is_file() else b""
    for line in content.decode(errors="replace").splitlines():
        try:
            if json.loads(line)["step"] <= step:
                kept.append(line)
        except (ValueError, TypeError, LookupError):
            log_line(f"{file}: left out a torn line")
    return kept


def sample_lines(step: int, sample: Sample) -> list[str]:
    """A prompt and its response for a terminal, which obeys nothing that they say."""
    facts, mean = sample.facts, sample.mean_kl
    groups = ", ".join(facts[name] for name in ("category", "language") if facts[name])
    kl = "" if mean is None else f", {mean:.3f} nats a token"
    texts = {"prompt": facts["prompt"], "response": sample.response}
    return [f"sample of step {step}: {groups}{kl}"] + [
        f"  {name:9}" + "".join(c if c.isprintable() else "·" for c in text.replace("\n", "⏎"))
        for name, text in texts.items()
    ]
