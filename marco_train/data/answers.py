"""Where the answers of a chat stand, in the text of a template that does not mark them.

An answer begins where the prompt for it ends, and ends with the stop token behind it. A template
may render a turn otherwise once others follow it, as Qwen3's leaves out the thinking of earlier
answers; so an answer is found only where the whole text begins with its prompt.
"""

import re
from collections.abc import Callable, Sequence

from marco_train.models.chat_template import Rendered
from marco_train.types import Message

Render = Callable[[int, bool], Rendered]
"""Renders the first turns of a chat, so many of them; True opens an answer behind them."""

NOT_FOUND = (0, 0)


def find_answers(
    render: Render, stops: re.Pattern[str], text: str, messages: Sequence[Message]
) -> list[tuple[int, int]]:
    """Find the answers of a chat in its text.

    Args:
        render: Of the chat.
        stops: Finds the texts of the tokens that end a turn, which no turn holds.
        text: Of all turns, with or without an answer opened behind them.
        messages: The turns.

    Returns:
        First character and end of each answer, its stop token included. `NOT_FOUND` for one to
        which the text does not lead as sampling would, and for one without a stop token.
    """
    found = []
    for place, message in enumerate(messages):
        if message.role != "assistant":
            continue
        prompt, said = said_last(render, stops, place)
        begin = len(prompt)
        stop = stops.search(text, begin)
        if not prompt or not said or not text.startswith(prompt) or stop is None:
            found.append(NOT_FOUND)
        elif text.startswith(said, begin):
            found.append((begin, begin + len(said)))
        else:  # before other turns it is written otherwise: without its thinking
            shown = text[begin : stop.end()]
            found.append((begin, stop.end()) if said.endswith(shown.lstrip()) else NOT_FOUND)
    return found


def said_last(render: Render, stops: re.Pattern[str], place: int) -> tuple[str, str]:
    """Render a chat up to an answer.

    Args:
        render: Of the chat.
        stops: Finds the texts of the tokens that end a turn.
        place: Of the answer among the turns.

    Returns:
        The prompt for the answer, and what a model would say to it, its stop token included. Both
        are empty where nothing stands before the answer, or the text does not begin with the
        prompt; the latter where no stop token ends it.
    """
    if place == 0:
        return "", ""
    prompt, text = render(place, True).text, render(place + 1, False).text
    if not text.startswith(prompt):
        return "", ""
    stop = stops.search(text, len(prompt))  # at which sampling ends, whatever is written behind it
    return prompt, text[len(prompt) : stop.end()] if stop is not None else ""
