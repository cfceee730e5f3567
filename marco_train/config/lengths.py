"""How long a stage's sequences become, and which models have positions for them."""

from pathlib import Path

from omegaconf import DictConfig, OmegaConf, open_dict

from marco_train.config.architecture import read_config, text_config
from marco_train.config.benchmark import BenchmarkConfig
from marco_train.config.evaluate import EvaluateConfig
from marco_train.config.opd import OPDConfig
from marco_train.config.sft import SFTConfig
from marco_train.config.stage import StageConfig
from marco_train.config.trained import AnsweredStage
from marco_train.errors import InputError

MAX_LENGTH = 4096
"""Tokens of the longest sequence where a run gives no length and its model has the positions."""


def fill_lengths(composed: DictConfig) -> DictConfig:
    """Give a run without a length as many tokens as its model has positions, 4096 at most.

    Prompts and responses of a distillation get half of them each, or what the other one leaves.

    Args:
        composed: As Hydra composed it; it is not changed.

    Raises:
        InputError: config.json under `model.path` cannot be read.
    """
    lacks = [name for name in LENGTHS if _lacks(composed.stage, name)]
    if not lacks or composed.stage.kind.value == "evaluate":
        return composed
    filled = composed.copy()
    whole = min(MAX_LENGTH, _positions(composed) or MAX_LENGTH)
    with open_dict(filled.stage):
        if lacks == ["max_length"]:
            filled.stage.max_length = whole
            return filled
        given = [filled.stage[name] for name in LENGTHS[1:] if name not in lacks]
        for name in lacks:
            filled.stage[name] = max(1, whole - given[0] if given else whole // 2)
    return filled


LENGTHS = ("max_length", "max_prompt_length", "max_response_length")


def _lacks(stage: DictConfig, name: str) -> bool:
    return name in list(stage) and OmegaConf.is_missing(stage, name)


def _positions(composed: DictConfig) -> int | None:
    """Positions of the student, from its shape or its files; None: neither is there."""
    model = composed.model
    if model.architecture is not None:
        return int(model.architecture.max_position_embeddings)
    if OmegaConf.is_missing(model, "path") or model.path is None:
        return None
    return positions_of(Path(model.path))


def positions_of(directory: Path) -> int | None:
    """Positions of a model, by its config.json; None: there is none, or it does not say.

    Raises:
        InputError: config.json cannot be read.
    """
    if not (directory / "config.json").is_file():
        return None
    found = text_config(read_config(str(directory))).get("max_position_embeddings")
    return found if isinstance(found, int) and found > 0 else None


def longest_sequence(stage: StageConfig | AnsweredStage) -> int:
    """Tokens of the longest sequence that a stage lets through."""
    match stage:
        case SFTConfig():
            return stage.max_length
        case OPDConfig() | EvaluateConfig() | BenchmarkConfig() | AnsweredStage():
            return stage.max_prompt_length + stage.max_response_length
    raise TypeError(f"no such stage: {type(stage).__name__}")


def check_positions(
    stage: StageConfig, positions: int | None, owner: str, num_extra: int = 0
) -> None:
    """Refuse a model that has fewer positions than the longest sequence of a stage needs.

    Args:
        stage: What is to be run.
        positions: Tokens of the longest sequence that the model can take. None: it does not say.
        owner: What the message calls the model.
        num_extra: Tokens that are made after a sequence, though nobody asks for them.
    """
    longest = longest_sequence(stage)
    if positions is None or longest + num_extra <= positions:
        return
    extra = f" and {num_extra} more to score them" if num_extra else ""
    lengths = "stage.max_prompt_length + stage.max_response_length"
    if isinstance(stage, SFTConfig):
        lengths = "stage.max_length"
    raise InputError(
        f"the stage allows sequences of {longest} tokens{extra}, and {owner} has {positions} "
        f"positions: bring {lengths} down to {positions - num_extra} or less, or take a model of "
        "more positions"
    )
