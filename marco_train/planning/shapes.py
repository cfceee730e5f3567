"""The shapes of the models of a run, which may not be on this machine yet."""

from dataclasses import asdict
from pathlib import Path
from typing import Any

from omegaconf import OmegaConf

from marco_train.config import TrainConfig
from marco_train.config.architecture import ArchitectureConfig, read_architecture
from marco_train.config.paths import CONFIG_DIR
from marco_train.errors import InputError

# Models of the hub whose shapes stand in configs/model/, by the beginning of their names.
KNOWN = {
    "Marco-Mini": "marco_mini",
    "Marco-Nano": "marco_nano",
    "Qwen3-0.6B": "qwen3_0_6b",
    "Qwen3-4B": "qwen3_4b",
    "Qwen3-30B-A3B": "qwen3_30b_a3b",
}


def student_shape(cfg: TrainConfig) -> ArchitectureConfig:
    """The student's, from the config or from its files.

    Raises:
        InputError: Neither says it.
    """
    if cfg.model.architecture is not None:
        return cfg.model.architecture
    assert cfg.model.path is not None
    return teacher_architecture(cfg.model.path)


def teacher_architecture(path: str) -> ArchitectureConfig:
    """The shape of a model in a directory, or of a known one that is not here.

    Raises:
        InputError: Neither.
    """
    if (Path(path) / "config.json").is_file():
        return read_architecture(path)
    for name, group in KNOWN.items():
        if Path(path).name.startswith(name):
            return _shape_in_configs(group)
    names = ", ".join(f"{name}*" for name in KNOWN)
    raise InputError(
        f"the shape of {path!r} is not known: there is no {path}/config.json, and known without it "
        f"are models named {names}; give a directory with its config.json, or model=<group> with "
        "an architecture"
    )


def _shape_in_configs(group: str) -> ArchitectureConfig:
    file = CONFIG_DIR / "model" / f"{group}.yaml"
    found: Any = OmegaConf.to_container(OmegaConf.load(file))
    fields: dict[str, Any] = {}
    for parent in found.get("defaults", []):
        if parent != "_self_":
            fields |= asdict(_shape_in_configs(parent))
    return ArchitectureConfig(**fields | found["architecture"])
