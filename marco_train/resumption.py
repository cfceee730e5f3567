"""Whether a run is another's continuation: what may change, what was finished, what to go on from.

Imports no tensor library, as these are the first questions of a launch.
"""

import json
from dataclasses import asdict
from enum import Enum
from pathlib import Path
from typing import Any

from marco_train.config import EvaluateConfig, OPDConfig, TrainConfig
from marco_train.errors import InputError, require


def field_difference(old: Any, new: Any, where: str = "") -> list[str]:
    """Name the leaves in which two nested dictionaries differ, as `a.b: old -> new`."""
    if isinstance(old, dict) and isinstance(new, dict):
        found = []
        for key in sorted(old.keys() | new.keys(), key=str):
            path = f"{where}.{key}" if where else str(key)
            found += field_difference(old.get(key), new.get(key), path)
        return found
    return [] if old == new else [f"{where}: {old} -> {new}"]


MANIFEST = "manifest.json"
"""Written last into a checkpoint's directory: with it, the checkpoint is complete."""
FINISHED = "finished.json"
"""The note in a run's directory by which a second launch knows that nothing is left to do."""
# What may differ between a run and its resumption without changing what is learnt from whom.
FREE_TO_CHANGE = ("resume", "root", "output_dir", "logging", "checkpoint")
LENGTHS = ("num_steps", "max_steps", "eval_every", "num_eval_examples")


def plain_config(cfg: TrainConfig) -> dict[str, Any]:
    """Turn the config into JSON values."""

    def plain(value: Any) -> Any:
        if isinstance(value, dict):
            return {str(key): plain(item) for key, item in value.items()}
        return value.value if isinstance(value, Enum) else value

    return dict(plain(asdict(cfg)))


def identity(config: dict[str, Any]) -> dict[str, Any]:
    """Keep the part that a resumption may not change: not lengths, logs and places."""

    def without_lengths(value: Any) -> Any:
        if not isinstance(value, dict):
            return value
        return {key: without_lengths(item) for key, item in value.items() if key not in LENGTHS}

    kept = {key: value for key, value in config.items() if key not in FREE_TO_CHANGE}
    return dict(without_lengths(kept))


def check_resume(cfg: TrainConfig) -> None:
    """Refuse a `resume` that is neither auto, never nor a complete checkpoint.

    Raises:
        InputError: Lists the complete checkpoints of the run.
    """
    if cfg.resume in {"auto", "never"} or (Path(cfg.resume) / MANIFEST).is_file():
        return
    complete = sorted(str(p.parent) for p in Path(cfg.output_dir).glob(f"checkpoints/*/{MANIFEST}"))
    raise InputError(
        f"resume={cfg.resume} is no complete checkpoint, nor auto or never; complete ones: "
        f"{', '.join(complete) or 'none'}"
    )


def input_models(cfg: TrainConfig) -> list[Path]:
    """Directories of the models that a run starts from, learns from or measures."""
    paths = [] if cfg.model.path is None else [cfg.model.path]
    match cfg.stage:
        case OPDConfig():
            for phase in cfg.stage.cascade.values():
                paths += [t.path for t in (phase.teacher, *phase.teacher_of.values())]
        case EvaluateConfig():
            paths += [*cfg.stage.models.values(), *(t.path for t in cfg.stage.teachers.values())]
    return [Path(path) for path in paths]


def is_finished(cfg: TrainConfig) -> bool:
    """Whether this very run was finished before.

    Raises:
        InputError: The directory holds a finished run of another config, or of models that were
            made anew since.
    """
    note = Path(cfg.output_dir) / FINISHED
    if cfg.resume != "auto" or not note.is_file():
        return False
    for path in input_models(cfg):
        config = path / "config.json"
        require(
            not config.is_file() or config.stat().st_mtime <= note.stat().st_mtime,
            f"{cfg.output_dir} was finished before {path} was made anew; choose another root or "
            "output_dir, or resume=never to replace it",
        )
    now = {k: v for k, v in plain_config(cfg).items() if k not in FREE_TO_CHANGE}
    then = {k: v for k, v in json.loads(note.read_text())["config"].items() if k in now}
    changed = field_difference(then, now)
    require(
        not changed,
        f"{cfg.output_dir} holds a finished run of another config (then -> now): "
        f"{'; '.join(changed[:5])}; choose another root or output_dir, or resume=never to "
        "replace it",
    )
    return True
