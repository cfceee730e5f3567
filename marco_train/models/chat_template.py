"""Turns of a chat to token ids, through the chat template of the student or of a teacher."""

import re
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from typing import Any

from jinja2 import TemplateError

from marco_train.errors import InputError, require
from marco_train.types import Message

# What a template can raise on the turns of a row, beside its own refusals: it adds text to numbers,
# asks for an item that is not there, or divides; and what a tokenizer raises on its text.
FAULTS = (TemplateError, TypeError, ValueError, LookupError, ArithmeticError, AttributeError)


def apply_template(
    tokenizer: Any, messages: Sequence[Message], template_kwargs: Mapping[str, Any], **options: bool
) -> dict[str, list[int]]:
    """Render turns with a tokenizer's template.

    Args:
        tokenizer: Of transformers, with its template.
        messages: The turns.
        template_kwargs: Arguments of the template itself; see `ModelConfig.chat_template_kwargs`.
        options: Arguments of transformers' `apply_chat_template`.

    Returns:
        `input_ids`, and what the options ask for.

    Raises:
        InputError: The template refuses these turns, or cannot render them.
    """
    turns = [asdict(message) for message in messages]
    try:
        rendered = tokenizer.apply_chat_template(
            turns, return_dict=True, **options, **template_kwargs
        )
    except FAULTS as error:
        said = str(error).splitlines() or [""]
        raise InputError(
            f"the chat template cannot render it ({type(error).__name__}: {said[0]})"
        ) from error
    return dict(rendered)


def check_template_kwargs(templates: Sequence[str], template_kwargs: Mapping[str, Any]) -> None:
    """Refuse arguments that none of a run's templates reads: they would change nothing.

    Raises:
        InputError: Names the first of them.
    """
    for name in template_kwargs:
        word = re.compile(rf"\b{re.escape(name)}\b")
        require(
            any(word.search(template) for template in templates),
            f"model.chat_template_kwargs has {name!r}, which no chat template of this run reads: "
            "correct the name, take it out, or choose the template that reads it with "
            "model.chat_template",
        )
