"""Checkpoints without weights, and models with other ones."""

import json
from collections.abc import Callable
from hashlib import sha256
from pathlib import Path
from typing import Any

from safetensors.torch import load_file, save_file
from torch import Tensor

from marco_train.config import TrainConfig
from marco_train.config.resumption import describe


def planned_steps(cfg: TrainConfig) -> list[int]:
    """Steps of each phase, or of the run."""
    stage = cfg.stage
    asked = [p.num_steps for p in stage.cascade.values()] if cfg.stage.kind.value == "opd" else []
    return [stage.capped(steps) for steps in asked or [stage.num_steps or 6]]


def leave_checkpoint(cfg: TrainConfig, step: int, **more: Any) -> Path:
    """What a launch looks at of a checkpoint."""
    path = Path(cfg.output_dir) / "checkpoints" / f"step_{step:06d}"
    path.mkdir(parents=True)
    spans = sum(planned_steps(cfg))
    state = describe(cfg) | {"num_updates": step, "schedule_steps": spans}
    state |= {"content": {}, "cascade": {"converged": {}}, "kept": []} | more
    write_state(path, state)
    return path


def write_state(path: Path, state: dict[str, Any]) -> None:
    """Put a state into a checkpoint, as if it had been saved with it."""
    text = json.dumps(state, indent=2, sort_keys=True)
    (path / "state.json").write_text(text)
    entry = {"bytes": len(text.encode()), "sha256": sha256(text.encode()).hexdigest()}
    manifest = path / "manifest.json"
    known = json.loads(manifest.read_text()) if manifest.is_file() else {"files": {}}
    known["files"]["state.json"] = entry
    manifest.write_text(json.dumps(known))


Weights = dict[str, Tensor]
AN_EXPERT = "model.layers.1.mlp.experts.3.up_proj.weight"


def changed(path: Path, change: Callable[[Weights], Weights]) -> None:
    """Put other weights into a checkpoint of one file."""
    weights = change(load_file(path / "model.safetensors"))
    save_file(weights, path / "model.safetensors", metadata={"format": "pt"})


def with_value(name: str, value: float) -> Callable[[Weights], Weights]:
    """Give the last element of a weight another value."""

    def change(weights: Weights) -> Weights:
        weights[name].view(-1)[-1] = value
        return weights

    return change


def another_template(path: Path) -> None:
    """Put another chat template into a model's directory."""
    (path / "chat_template.jinja").write_text("{{ messages }}")
