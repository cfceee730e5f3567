"""What a stage makes of a row: its tokens, or the metric that counts it as dropped."""

from bisect import bisect_left
from dataclasses import dataclass, replace
from typing import Any

from marco_train.config.data import DataConfig, Overlong, Thinking
from marco_train.config.sft import LossTokens
from marco_train.data.chat import (
    Tokenizer,
    holds_control_tokens,
    render_prompt,
    render_row,
    with_thinking,
)
from marco_train.errors import InputError
from marco_train.types import Conversation, Example, Message, TokenRow, UsableRow

PREFERENCE = (
    "the row holds answers that are rated, and SFT would learn a rejected one as if it were "
    "right: choose it with data.sources.<name>.columns.messages=chosen, or with .response=chosen "
    "beside a prompt"
)


@dataclass(frozen=True)
class ExampleRenderer:
    """Makes what SFT learns from a row."""

    tokenizer: Tokenizer
    loss_tokens: LossTokens
    max_length: int
    thinking: Thinking
    keep_empty_answers: bool
    overlong: Overlong

    @staticmethod
    def of(
        tokenizer: Tokenizer, data: DataConfig, loss_tokens: LossTokens, max_length: int
    ) -> "ExampleRenderer":
        """Take what a run's config says of its data."""
        return ExampleRenderer(
            tokenizer,
            loss_tokens,
            max_length,
            data.thinking,
            data.keep_empty_answers,
            data.overlong,
        )

    @property
    def limit(self) -> str:
        """The key that bounds the length of a row, with its value in tokens."""
        return f"stage.max_length={self.max_length}"

    def identity(self) -> list[Any]:
        """All that the tokens are a function of beside the row, as JSON."""
        options: list[Any] = [self.loss_tokens.value, self.max_length, self.thinking.value]
        options += [self.keep_empty_answers, self.overlong.value]
        return ["sft", self.tokenizer.digests(), *options]

    def __call__(self, row: UsableRow) -> Example | str:
        """Make the tokens of a row; names the metric that counts it, where it is dropped.

        Raises:
            InputError: The row is at fault.
        """
        if isinstance(row, Conversation):
            if row.is_preference:
                raise InputError(PREFERENCE)
            row = with_thinking(self.tokenizer, row, self.thinking)
            if not self.keep_empty_answers and any(map(is_empty, row.messages)):
                return "data/dropped_empty"
        if not isinstance(row, TokenRow) and holds_control_tokens(self.tokenizer, row):
            return "data/dropped_special"
        example = render_row(self.tokenizer, row, self.loss_tokens)
        if len(example.input_ids) > self.max_length:
            ids, mask = example.input_ids[: self.max_length], example.loss_mask[: self.max_length]
            if self.overlong is Overlong.drop or not any(mask[1:]):
                return "data/dropped_too_long"
            return Example(ids, mask, is_truncated=True)
        if not any(example.loss_mask[1:]):
            return "data/dropped_no_loss"
        return example


@dataclass(frozen=True)
class PromptRenderer:
    """Makes the prompt of a row, of which nothing is learnt."""

    tokenizer: Tokenizer
    max_length: int
    thinking: Thinking
    overlong: Overlong

    @property
    def limit(self) -> str:
        """The key that bounds the length of a prompt, with its value in tokens."""
        return f"stage.max_prompt_length={self.max_length}"

    def identity(self) -> list[Any]:
        """All that the tokens are a function of beside the row, as JSON."""
        options = [self.max_length, self.thinking.value, self.overlong.value]
        return ["prompt", self.tokenizer.digests(), *options]

    def __call__(self, row: UsableRow) -> Example | str:
        """Make the tokens of a prompt; names the metric that counts it, where it is dropped.

        Raises:
            InputError: The row is at fault.
        """
        conversation = self._thought(row)
        if holds_control_tokens(self.tokenizer, conversation):
            return "data/dropped_special"
        if conversation.messages[0].role == "assistant":
            return "data/dropped_no_loss"
        shown, input_ids = self._fitted(conversation)
        if len(input_ids) > self.max_length:
            return "data/dropped_too_long"
        return Example(input_ids, [False] * len(input_ids), shown is not conversation)

    def prepared(self, row: UsableRow) -> Conversation:
        """The conversation with the turns and the thinking that its prompt shows.

        Raises:
            InputError: The row is none.
        """
        return self._fitted(self._thought(row))[0]

    def _fitted(self, conversation: Conversation) -> tuple[Conversation, list[int]]:
        """Leave out as few of the oldest turns as the limit takes, up to the last question."""
        input_ids = render_prompt(self.tokenizer, conversation)
        if self.overlong is Overlong.drop or len(input_ids) <= self.max_length:
            return conversation, input_ids
        shorter = shortened(conversation)
        if not shorter:
            return conversation, input_ids

        def fits(candidate: Conversation) -> bool:
            return len(render_prompt(self.tokenizer, candidate)) <= self.max_length

        found = shorter[bisect_left(shorter[:-1], True, key=fits)]
        return found, render_prompt(self.tokenizer, found)

    def _thought(self, row: UsableRow) -> Conversation:
        if not isinstance(row, Conversation):
            raise InputError("the row has no turns, so nothing can be asked")
        return with_thinking(self.tokenizer, row, self.thinking)


def shortened(conversation: Conversation) -> list[Conversation]:
    """The conversation without its oldest turns, from each later question on, the longest first.

    The system turn and all that follows the last question stay, so that what is left is a chat.
    """
    messages, asked = conversation.messages, conversation.asked
    num_kept = 1 if messages[0].role == "system" else 0
    questions = [place for place, message in enumerate(asked) if message.role == "user"]
    return [
        replace(conversation, messages=messages[:num_kept] + messages[place:])
        for place in questions
        if place > num_kept
    ]


def is_empty(message: Message) -> bool:
    """Whether a turn is an answer to be learnt that says and calls nothing."""
    said = message.content or message.reasoning_content
    return (
        message.role == "assistant"
        and message.is_learnt
        and not message.tool_calls
        and not said.strip()
    )
