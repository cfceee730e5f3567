"""A run in TensorBoard's files, under `<output_dir>/tensorboard`."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from marco_train.metrics import Metrics
from marco_train.tracking.samples import Sample


class TensorboardRun:
    """Writes scalars and samples."""

    name = "TensorBoard"

    def __init__(self, directory: Path) -> None:
        from torch.utils.tensorboard import SummaryWriter

        self._directory = directory / "tensorboard"
        self._open: Any = SummaryWriter
        self._writer: Any = None

    def start(self, lines: Sequence[Mapping[str, Any]]) -> None:
        """Go on after the last of the steps that stand; later ones are made again."""
        first = lines[-1]["step"] + 1 if lines else 0
        self._writer = self._open(str(self._directory), purge_step=first)

    def log(self, step: int, metrics: Metrics) -> None:
        """Record a step."""
        for name, value in metrics.items():
            self._writer.add_scalar(name, value, step)

    def log_samples(self, step: int, samples: Sequence[Sample]) -> None:
        """Record samples as text."""
        for number, sample in enumerate(samples):
            # Four spaces: Markdown takes what follows as it is.
            text = f"{sample.facts['prompt']}\n{sample.response}".replace("\n", "\n    ")
            self._writer.add_text(f"samples/{number}", f"    {text}", step)

    def close(self) -> None:
        """Write everything."""
        self._writer.close()
