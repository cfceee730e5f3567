"""Checkpoints without weights."""

import json
from pathlib import Path
from typing import Any

from marco_train.config import TrainConfig
from marco_train.config.resumption import describe


def planned_steps(cfg: TrainConfig) -> list[int]:
    """Steps of each phase, or of the run."""
    stage = cfg.stage
    asked = [p.num_steps for p in stage.cascade.values()] if cfg.stage.kind.value == "opd" else []
    return [stage.capped(steps) for steps in asked or [stage.num_steps]]


def leave_checkpoint(cfg: TrainConfig, step: int, **more: Any) -> Path:
    """What a launch looks at of a checkpoint."""
    path = Path(cfg.output_dir) / "checkpoints" / f"step_{step:06d}"
    path.mkdir(parents=True)
    spans = sum(planned_steps(cfg))
    state = describe(cfg) | {"num_updates": step, "schedule_steps": spans}
    state |= {"content": {}, "cascade": {"converged": {}}} | more
    (path / "state.json").write_text(json.dumps(state, indent=2, sort_keys=True))
    (path / "manifest.json").write_text("{}")
    return path
