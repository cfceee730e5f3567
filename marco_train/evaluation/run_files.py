"""What the directory of a run tells, while it goes on and after its end; without a tensor library.

A file that is missing or torn tells what it can.
"""

import json
from array import array
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from marco_train.config.resumption import FINISHED
from marco_train.config.secrets import redacted
from marco_train.errors import EXIT_STATUS, InputError
from marco_train.evaluation.html import Series

# Files of which one at least makes a directory a run's.
TELLING = ("config.json", "metrics.jsonl", "evaluation.json")


@dataclass
class RunFiles:
    """A run as its files have it."""

    directory: Path
    config: dict[str, Any] = field(default_factory=dict)
    header: dict[str, Any] = field(default_factory=dict)
    """What the run said of itself at its start."""
    columns: dict[str, tuple["array[float]", "array[float]"]] = field(default_factory=dict)
    """Steps and values of each metric."""
    num_torn: int = 0
    """Lines of metrics that cannot be read."""
    samples: list[dict[str, Any]] = field(default_factory=list)
    warnings: list[dict[str, Any]] = field(default_factory=list)
    faults: list[dict[str, Any]] = field(default_factory=list)
    """Rows that were not used."""
    evaluation: dict[str, Any] = field(default_factory=dict)
    signatures: dict[str, Any] = field(default_factory=dict)
    exit_status: dict[str, Any] = field(default_factory=dict)
    finished: dict[str, Any] = field(default_factory=dict)
    """What its end noted: `content` has the digests of what it read, by field."""
    is_finished: bool = False

    @property
    def last_step(self) -> int:
        """Last step that was logged; 0 before the first."""
        return int(max((steps[-1] for steps, _ in self.columns.values()), default=0))

    def series(self, metric: str, name: str) -> Series | None:
        """A metric as a curve of a name. None: it was never logged."""
        if metric not in self.columns:
            return None
        return Series(name, *self.columns[metric])

    def parts(self, metric: str, kind: str) -> list[Series]:
        """The curves of a metric by parts of one kind, as `category_`; the most used first."""
        prefix = f"{metric}/{kind}"
        found = [
            Series(name.removeprefix(prefix), *columns)
            for name, columns in self.columns.items()
            if name.startswith(prefix)
        ]
        return sorted(found, key=lambda series: -self.share(f"{kind}{series.name}"))

    def share(self, group: str) -> float:
        """Share of the sequences that were of a group, as `category_math`, up to the last step."""
        column = self.columns.get(f"data/share/{group}")
        return column[1][-1] if column is not None else 0.0


def read_run(directory: Path) -> RunFiles:
    """Read all that a run has written so far.

    Raises:
        InputError: The directory is none of a run.
    """
    if not directory.is_dir():
        raise InputError(f"there is no directory {str(directory)!r}: give the output_dir of a run")
    if not any((directory / name).is_file() for name in TELLING):
        raise InputError(
            f"{str(directory)!r} holds no run, as none of {', '.join(TELLING)} is there: give the "
            "output_dir of one"
        )
    found = RunFiles(
        directory,
        config=redacted(read_object(directory / "config.json")),
        header=read_object(directory / "header.json"),
        samples=list(_read_lines(directory / "samples.jsonl")),
        warnings=list(_read_lines(directory / "warnings.jsonl")),
        faults=list(_read_lines(directory / "quarantine.jsonl")),
        evaluation=read_object(directory / "evaluation.json"),
        signatures=read_object(directory / "signatures.json"),
        exit_status=read_object(directory / EXIT_STATUS),
        finished=read_object(directory / FINISHED),
        is_finished=(directory / FINISHED).is_file(),
    )
    _read_metrics(directory / "metrics.jsonl", found)
    return found


def read_object(file: Path) -> dict[str, Any]:
    """A JSON object; empty where there is none or it is torn."""
    try:
        content = json.loads(file.read_bytes().decode(errors="replace"))
    except (OSError, ValueError, RecursionError):
        return {}
    return content if isinstance(content, dict) else {}


def _read_lines(file: Path) -> Iterator[dict[str, Any]]:
    """Objects of a file of JSON lines; what is torn is left out."""
    for found in _parsed_lines(file):
        if found is not None:
            yield found


def _parsed_lines(file: Path) -> Iterator[dict[str, Any] | None]:
    """Each line's object; None where it is torn."""
    if not file.is_file():
        return
    with file.open("rb") as lines:
        for line in lines:
            try:
                found = json.loads(line.decode(errors="replace"))
            except (ValueError, RecursionError):
                found = None
            yield found if isinstance(found, dict) else None


def _read_metrics(file: Path, found: RunFiles) -> None:
    """Sort the numbers of all steps into columns."""
    columns = found.columns
    for line in _parsed_lines(file):
        step = _number((line or {}).get("step"))
        if line is None or step is None:
            found.num_torn += 1
            continue
        for name, value in line.items():
            number = value if type(value) is float else _number(value)
            if number is None or name == "step":
                continue
            if name not in columns:
                columns[name] = (array("d"), array("d"))
            steps, values = columns[name]
            steps.append(step)
            values.append(number)


def _number(value: Any) -> float | None:
    """A number, which may be none that is finite."""
    if type(value) is float:
        return value
    return float(value) if type(value) is int and abs(value) < 1e300 else None


def flattened(config: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, str]]:
    """Each field of a config with its dotted name."""
    for name, value in config.items():
        if isinstance(value, Mapping) and value:
            yield from flattened(value, f"{prefix}{name}.")
        else:
            yield f"{prefix}{name}", json.dumps(value, ensure_ascii=False)
