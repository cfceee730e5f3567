"""What checkpoints hold, some without weights, and models with other ones."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from xxhash import xxh3_128_hexdigest

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


def optimizer_state(path: Path) -> dict[str, Tensor]:
    """Masters and moments of every parameter in a checkpoint, with all experts, joined by hand.

    Found in the files of all ranks, by what the index says of their pieces.
    """
    found = {}
    index = json.loads((path / "index.json").read_text())
    files = {file.name: load_file(file) for file in path.glob("rank_*.safetensors")}
    for name, entry in index["parameters"].items():
        for kind in ("master", "exp_avg", "exp_avg_sq"):
            parts = [files[piece["file"]][f"{kind}.{name}"] for piece in entry["pieces"]]
            sizes = [piece["stop"] - piece["start"] for piece in entry["pieces"]]
            assert [len(part) for part in parts] == sizes
            found[f"{kind}.{name}"] = torch.cat(parts).view(entry["shape"])
    return found


def same_state(one: Path, other: Path) -> None:
    """Compare masters and moments of two checkpoints, bit for bit."""
    mine, theirs = optimizer_state(one), optimizer_state(other)
    assert mine.keys() == theirs.keys()
    assert any(name.startswith("exp_avg_sq.") and t.any() for name, t in mine.items())
    for name, tensor in mine.items():
        assert torch.equal(tensor, theirs[name]), name


def same_generators(one: Path, other: Path) -> None:
    """Compare the generators of all ranks of two checkpoints."""
    files = sorted(file.name for file in one.glob("rank_*.safetensors"))
    assert files and files == sorted(file.name for file in other.glob("rank_*.safetensors"))
    for file in files:
        mine, theirs = load_file(one / file), load_file(other / file)
        names = [name for name in mine if name.startswith("generator.")]
        assert names
        for name in names:
            assert torch.equal(mine[name], theirs[name]), (file, name)


def edit_state(path: Path, change: Callable[[dict[str, Any]], None]) -> None:
    """Change what a checkpoint says of a run as if it had been saved so."""
    state = json.loads((path / "state.json").read_text())
    change(state)
    write_state(path, state)


def write_state(path: Path, state: dict[str, Any]) -> None:
    """Put a state into a checkpoint, as if it had been saved with it."""
    text = json.dumps(state, indent=2, sort_keys=True).encode()
    (path / "state.json").write_bytes(text)
    manifest = path / "manifest.json"
    known = json.loads(manifest.read_text()) if manifest.is_file() else {"files": {}}
    known["files"]["state.json"] = {"bytes": len(text), "digest": xxh3_128_hexdigest(text)}
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
