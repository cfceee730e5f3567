"""How long a stage's sequences become, and which models have positions for them."""

from marco_train.config.benchmark import BenchmarkConfig
from marco_train.config.evaluate import EvaluateConfig
from marco_train.config.opd import OPDConfig
from marco_train.config.sft import SFTConfig
from marco_train.config.stage import StageConfig
from marco_train.errors import InputError


def longest_sequence(stage: StageConfig) -> int:
    """Tokens of the longest sequence that a stage lets through."""
    match stage:
        case SFTConfig():
            return stage.max_length
        case OPDConfig() | EvaluateConfig() | BenchmarkConfig():
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
