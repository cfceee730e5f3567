"""What a stage makes of a row: its tokens, or the metric that counts it as dropped."""

from dataclasses import dataclass
from typing import Any

from marco_train.config.data import DataConfig, Thinking
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

    @staticmethod
    def of(
        tokenizer: Tokenizer, data: DataConfig, loss_tokens: LossTokens, max_length: int
    ) -> "ExampleRenderer":
        """Take what a run's config says of its data."""
        return ExampleRenderer(
            tokenizer, loss_tokens, max_length, data.thinking, data.keep_empty_answers
        )

    def identity(self) -> list[Any]:
        """All that the tokens are a function of beside the row, as JSON."""
        options = [self.loss_tokens.value, self.max_length, self.thinking.value]
        return ["sft", self.tokenizer.digests(), *options, self.keep_empty_answers]

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
            return "data/dropped_too_long"
        if not any(example.loss_mask[1:]):
            return "data/dropped_no_loss"
        return example


@dataclass(frozen=True)
class PromptRenderer:
    """Makes the prompt of a row, of which nothing is learnt."""

    tokenizer: Tokenizer
    max_length: int
    thinking: Thinking

    def identity(self) -> list[Any]:
        """All that the tokens are a function of beside the row, as JSON."""
        return ["prompt", self.tokenizer.digests(), self.max_length, self.thinking.value]

    def __call__(self, row: UsableRow) -> Example | str:
        """Make the tokens of a prompt; names the metric that counts it, where it is dropped.

        Raises:
            InputError: The row is at fault.
        """
        conversation = self.prepared(row)
        if holds_control_tokens(self.tokenizer, conversation):
            return "data/dropped_special"
        if conversation.messages[0].role == "assistant":
            return "data/dropped_no_loss"
        input_ids = render_prompt(self.tokenizer, conversation)
        if len(input_ids) > self.max_length:
            return "data/dropped_too_long"
        return Example(input_ids, [False] * len(input_ids))

    def prepared(self, row: UsableRow) -> Conversation:
        """The conversation with the thinking that its prompt shows.

        Raises:
            InputError: The row is none.
        """
        if not isinstance(row, Conversation):
            raise InputError("the row has no turns, so nothing can be asked")
        return with_thinking(self.tokenizer, row, self.thinking)


def is_empty(message: Message) -> bool:
    """Whether a turn is an answer to be learnt that says and calls nothing."""
    said = message.content or message.reasoning_content
    return (
        message.role == "assistant"
        and message.is_learnt
        and not message.tool_calls
        and not said.strip()
    )
