"""How a command is told to read a model: arguments that several of them take."""

import argparse

from marco_train.config.model import ChatTemplate, DType


def add_model_arguments(parser: argparse.ArgumentParser) -> None:
    """Let a command be told the type of a model's weights, and its chat template."""
    parser.add_argument(
        "--dtype",
        choices=[kind.value for kind in DType],
        default=DType.bfloat16.value,
        help="of the weights (bfloat16)",
    )
    parser.add_argument(
        "--chat-template",
        choices=[template.value for template in ChatTemplate],
        default=ChatTemplate.tokenizer.value,
        help="the tokenizer's own (default), or ours",
    )
