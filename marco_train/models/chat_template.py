"""Turns of a chat to token ids, through the chat template of the student or of a teacher.

A template writes text, and a tokenizer may join the end of one turn's header with the first
characters of an answer into one token. A model never samples such a token: it is asked with the
header's tokens and answers with its own. So text is cut where an answer begins and ends.
"""

import json
import re
from bisect import bisect_right
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from typing import Any

from jinja2 import TemplateError

from marco_train.errors import InputError, require
from marco_train.types import Message

# What a template can raise on the turns of a row, beside its own refusals: it adds text to numbers,
# asks for an item that is not there, or divides; and what a tokenizer raises on its text.
FAULTS = (TemplateError, TypeError, ValueError, LookupError, ArithmeticError, AttributeError)
# Opens a stretch that is the assistant's.
MARK = re.compile(r"\{%-?\s*generation\s*-?%\}")


@dataclass(frozen=True)
class Rendered:
    """The text of a chat."""

    text: str
    answers: tuple[tuple[int, int], ...] | None
    """First character and end of each stretch that is the assistant's. None: the template marks
    none, as it has no {% generation %}."""


def render_turns(
    tokenizer: Any,
    messages: Sequence[Message],
    template_kwargs: Mapping[str, Any],
    tools: Sequence[Mapping[str, Any]] = (),
    *,
    open_answer: bool = False,
) -> Rendered:
    """Render turns with a tokenizer's template.

    Arguments of a call that are JSON text stay as they are written, unless the template takes
    objects alone: it would quote the text once more, or could not render it.

    Args:
        tokenizer: Of transformers, with its template or templates.
        messages: The turns.
        template_kwargs: Arguments of the template itself; see `ModelConfig.chat_template_kwargs`.
        tools: Functions that the assistant may call.
        open_answer: Whether to open the turn of an answer at the end.

    Raises:
        InputError: The template refuses these turns, or cannot render them.
    """
    require(bool(messages), "there is no turn before the answer")
    turns = [message.as_turn() for message in messages]
    written = [text for turn in turns for text in _written_arguments(turn)]
    if not written:
        return _rendered(tokenizer, turns, template_kwargs, tools, open_answer)
    parsed = [_with_parsed_arguments(turn) for turn in turns]
    try:
        found = _rendered(tokenizer, turns, template_kwargs, tools, open_answer)
    except InputError:
        return _rendered(tokenizer, parsed, template_kwargs, tools, open_answer)
    if any(json.dumps(text, ensure_ascii=False) in found.text for text in written):
        return _rendered(tokenizer, parsed, template_kwargs, tools, open_answer)
    return found


def _written_arguments(turn: Mapping[str, Any]) -> list[str]:
    """Arguments of a turn's calls that are text."""
    calls = (call["function"].get("arguments") for call in turn.get("tool_calls", ()))
    return [arguments for arguments in calls if isinstance(arguments, str)]


def _with_parsed_arguments(turn: Mapping[str, Any]) -> dict[str, Any]:
    """The turn with objects for arguments that are JSON of one."""
    if not _written_arguments(turn):
        return dict(turn)
    calls = []
    for call in turn["tool_calls"]:
        arguments = call["function"].get("arguments")
        with suppress(ValueError, RecursionError, TypeError):
            found = json.loads(arguments)
            arguments = found if isinstance(found, dict) else arguments
        calls.append({**call, "function": {**call["function"], "arguments": arguments}})
    return {**turn, "tool_calls": calls}


def _rendered(
    tokenizer: Any,
    turns: Sequence[Mapping[str, Any]],
    template_kwargs: Mapping[str, Any],
    tools: Sequence[Mapping[str, Any]],
    open_answer: bool,
) -> Rendered:
    from transformers.utils.chat_template_utils import render_jinja_template

    given = [dict(tool) for tool in tools] or None
    try:
        template = tokenizer.get_chat_template(None, given)
        is_marked = MARK.search(template) is not None
        (text,), answers = render_jinja_template(
            conversations=[list(turns)],
            tools=given,
            chat_template=template,
            return_assistant_tokens_mask=is_marked,
            add_generation_prompt=open_answer,
            **{**tokenizer.special_tokens_map, **template_kwargs},
        )
    except FAULTS as error:
        said = str(error).splitlines() or [""]
        raise InputError(
            f"the chat template cannot render it ({type(error).__name__}: {said[0]})"
        ) from error
    return Rendered(text, tuple(answers[0]) if is_marked else None)


class Encoder:
    """Text to token ids, with the place of each token in the text."""

    def __init__(self, tokenizer: Any) -> None:
        """Take the rules of a tokenizer of transformers."""
        from tokenizers import Tokenizer

        content = json.loads(tokenizer.backend_tokenizer.to_str())
        self._tokenizer = Tokenizer.from_str(json.dumps(_with_white_space(content)))
        self._tokenizer.no_truncation()
        self._tokenizer.no_padding()

    def encode(self, text: str, cuts: Sequence[int] = ()) -> tuple[list[int], list[int]]:
        """Encode a text as a whole, or in pieces where a token would lie across a cut.

        Args:
            text: Written by a template.
            cuts: Characters before which a token has to begin.

        Returns:
            Token ids, and the character where each of them begins.
        """
        encoded = self._tokenizer.encode(text, add_special_tokens=False)
        starts = [start for start, _ in encoded.offsets]
        cut = next((cut for cut in sorted(cuts) if _is_inside(cut, starts, encoded.offsets)), None)
        if cut is None:
            return encoded.ids, starts
        ids, starts = self.encode(text[:cut], [c for c in cuts if c < cut])
        ids_after, starts_after = self.encode(text[cut:], [c - cut for c in cuts if c > cut])
        return ids + ids_after, starts + [start + cut for start in starts_after]


def _is_inside(cut: int, starts: list[int], offsets: Sequence[tuple[int, int]]) -> bool:
    """Whether a token begins before a character and ends behind it."""
    last = bisect_right(starts, cut) - 1
    # Several tokens of one character begin and end alike.
    return last >= 0 and any(
        start < cut < end for start, end in offsets[max(0, last - 1) : last + 1]
    )


def _with_white_space(rules: Any) -> Any:
    """Let tokens begin at their white space; where they are said to begin changes no id."""
    if isinstance(rules, dict):
        return {
            key: False if key == "trim_offsets" else _with_white_space(value)
            for key, value in rules.items()
        }
    return [_with_white_space(rule) for rule in rules] if isinstance(rules, list) else rules


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
