"""A run in Trackio, which keeps runs in files of this machine."""

from collections.abc import Mapping, Sequence
from typing import Any

from marco_train.config.secrets import redacted
from marco_train.config.tracking import LoggingConfig
from marco_train.metrics import Metrics
from marco_train.tracking.samples import Sample


class TrackioRun:
    """Gives Trackio what a run measures."""

    name = "Trackio"

    def __init__(
        self, cfg: LoggingConfig, name: str, run_config: Mapping[str, Any], resumed: bool
    ) -> None:
        import trackio

        self._run: Any = trackio.init(
            project=cfg.project,
            name=name,
            config=redacted(run_config),
            resume="allow" if resumed else "never",
            embed=False,
            auto_log_gpu=False,
            auto_log_cpu=False,
        )

    def start(self, lines: Sequence[Mapping[str, Any]]) -> None:
        """Do nothing: Trackio writes as it goes, and shows the newest value of a step."""

    def log(self, step: int, metrics: Metrics) -> None:
        """Record a step."""
        self._run.log(metrics, step=step)

    def log_samples(self, step: int, samples: Sequence[Sample]) -> None:
        """Do nothing: samples are in `samples.jsonl`."""

    def close(self) -> None:
        """Write everything."""
        self._run.finish()
