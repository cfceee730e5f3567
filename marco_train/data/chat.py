"""Conversations to token ids, once, through a chat template; nothing tokenises text after this."""

import re
from pathlib import Path
from typing import Any

from marco_train.config import ChatTemplate, LossTokens
from marco_train.errors import InputError
from marco_train.types import Conversation, Example

GENERATION = re.compile(r"\{%-?\s*generation\s*-?%\}")
CHATML = Path(__file__).with_name("chat_template.jinja")

# transformers' tokenizer classes carry no types.
Tokenizer = Any


def load_tokenizer(path: str, template: ChatTemplate) -> Tokenizer:
    """Open a tokenizer with a chat template that marks the assistant's tokens.

    Raises:
        InputError: There is no tokenizer at the path, or its template marks nothing.
    """
    if not (Path(path) / "tokenizer.json").is_file():
        raise InputError(f"model.tokenizer: no tokenizer.json in {path!r}")
    # Takes a second to import, and AutoTokenizer three; a wrong path is refused before.
    from transformers import PreTrainedTokenizerFast

    tokenizer = PreTrainedTokenizerFast.from_pretrained(path)
    if template is ChatTemplate.chatml:
        tokenizer.chat_template = CHATML.read_text()
    if not GENERATION.search(tokenizer.chat_template or ""):
        raise InputError(
            f"the chat template of {path!r} does not mark the assistant's tokens with "
            "{% generation %}, so the loss mask would be empty; set model.chat_template=chatml"
        )
    return tokenizer


def holds_control_tokens(tokenizer: Tokenizer, conversation: Conversation) -> bool:
    """Whether a message's text spells a control token, which would end its turn early."""
    control = tokenizer.all_special_tokens
    return any(token in m.content for m in conversation.messages for token in control)


def render_example(
    tokenizer: Tokenizer, conversation: Conversation, loss_tokens: LossTokens
) -> Example:
    """Render a whole conversation; the mask covers the assistant's words and its stop token."""
    rendered = tokenizer.apply_chat_template(
        _messages(conversation), return_dict=True, return_assistant_tokens_mask=True
    )
    input_ids: list[int] = rendered["input_ids"]
    if loss_tokens is LossTokens.all:
        return Example(input_ids, [True] * len(input_ids))
    return Example(input_ids, [mark == 1 for mark in rendered["assistant_masks"]])


def render_prompt(tokenizer: Tokenizer, conversation: Conversation) -> list[int]:
    """Render what stands before the last assistant turn and open that turn."""
    messages = _messages(conversation)
    while messages and messages[-1]["role"] == "assistant":
        messages.pop()
    ids: list[int] = tokenizer.apply_chat_template(
        messages, add_generation_prompt=True, return_dict=True
    )["input_ids"]
    return ids


def _messages(conversation: Conversation) -> list[dict[str, str]]:
    return [{"role": m.role, "content": m.content} for m in conversation.messages]
