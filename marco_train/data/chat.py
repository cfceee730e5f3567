"""Conversations to token ids, once, through a chat template; nothing tokenises text after this."""

import json
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from hashlib import sha256
from itertools import groupby
from pathlib import Path
from typing import Any

from marco_train.config.model import ChatTemplate, ModelConfig
from marco_train.config.sft import LossTokens
from marco_train.errors import InputError, require
from marco_train.models.chat_template import apply_template
from marco_train.models.hf_io import stop_token_ids
from marco_train.models.tokenizer_files import load_fast_tokenizer, tokenizer_digest
from marco_train.types import Conversation, Example, Message

CHATML = Path(__file__).with_name("chat_template.jinja")


@dataclass(frozen=True)
class Tokenizer:
    """A tokenizer with the template, and its arguments, that a run renders its chats with."""

    path: str
    of_transformers: Any  # their classes carry no types
    chat_template: str
    template_kwargs: Mapping[str, Any]

    def render(self, messages: Sequence[Message], **options: bool) -> dict[str, list[int]]:
        """Render turns; see `apply_template`."""
        return apply_template(self.of_transformers, messages, self.template_kwargs, **options)

    def decode(self, ids: Sequence[int], skip_special_tokens: bool = False) -> str:
        """Give the text of token ids."""
        return str(self.of_transformers.decode(ids, skip_special_tokens=skip_special_tokens))

    @cached_property
    def control_tokens(self) -> list[str]:
        """Texts that become one token and end a turn or open one."""
        added = self.of_transformers.added_tokens_decoder.values()
        special = {token.content for token in added if token.special}
        return sorted(special | set(self.of_transformers.all_special_tokens))

    def digests(self) -> dict[str, str]:
        """Digest what decides the ids of a chat: the tokenizer, and the template in use."""
        template = json.dumps([self.chat_template, dict(self.template_kwargs)], sort_keys=True)
        return {
            "tokenizer": tokenizer_digest(self.path, "model.tokenizer"),
            "template": sha256(template.encode()).hexdigest(),
        }


def load_tokenizer(cfg: ModelConfig) -> Tokenizer:
    """Open the run's tokenizer with its chat template.

    Raises:
        InputError: There is no tokenizer at the path, or it has no template.
    """
    path = cfg.tokenizer
    if not (Path(path) / "tokenizer.json").is_file():
        raise InputError(f"model.tokenizer: no tokenizer.json in {path!r}")
    tokenizer = load_fast_tokenizer(path, "model.tokenizer")
    if cfg.chat_template is ChatTemplate.chatml:
        tokenizer.chat_template = CHATML.read_text()
    if isinstance(tokenizer.chat_template, dict):  # several by name; chats without tools get this
        tokenizer.chat_template = tokenizer.chat_template.get("default")
    require(
        bool(tokenizer.chat_template),
        f"the tokenizer in {path!r} has no chat template; set model.chat_template=chatml, or give "
        "it one",
    )
    return Tokenizer(path, tokenizer, tokenizer.chat_template, cfg.chat_template_kwargs)


def holds_control_tokens(tokenizer: Tokenizer, conversation: Conversation) -> bool:
    """Whether a message's text spells a control token, which would end its turn early."""
    control = tokenizer.control_tokens
    return any(token in m.content for m in conversation.messages for token in control)


def render_example(
    tokenizer: Tokenizer, conversation: Conversation, loss_tokens: LossTokens
) -> Example:
    """Render a whole conversation; the mask covers the assistant's words and its stop token.

    Raises:
        InputError: The template cannot render it.
    """
    if loss_tokens is LossTokens.all:
        input_ids = tokenizer.render(conversation.messages)["input_ids"]
        return Example(input_ids, [True] * len(input_ids))
    rendered = tokenizer.render(conversation.messages, return_assistant_tokens_mask=True)
    return Example(rendered["input_ids"], [mark == 1 for mark in rendered["assistant_masks"]])


def render_prompt(tokenizer: Tokenizer, conversation: Conversation) -> list[int]:
    """Render what stands before the last assistant turn and open that turn.

    Raises:
        InputError: The template cannot render it, or gives no token.
    """
    ids = tokenizer.render(conversation.asked, add_generation_prompt=True)["input_ids"]
    require(len(ids) > 0, "the chat template renders nothing of it")
    return ids


PROBE = Conversation(
    messages=(Message("user", "How are you?"), Message("assistant", "Fine, thank you.")),
    source="a plain exchange",
    category="",
    language="",
    verifier={},
    row=0,
)


def check_marks(tokenizer: Tokenizer, conversations: Iterable[Conversation]) -> None:
    """Refuse a template by which the loss mask would leave out answers, or where they end.

    Args:
        tokenizer: The run's.
        conversations: The first of the run's data; what the run would drop is passed over.

    Raises:
        InputError: The template marks nothing, or a stretch that does not end with a stop token.
    """
    fix = "set model.chat_template=chatml, or mend the template"
    stops = stop_token_ids(tokenizer.path)
    if not _marked(tokenizer, PROBE, stops):
        raise InputError(
            f"the chat template of {tokenizer.path!r} does not mark the assistant's tokens with "
            "{% generation %}, so the loss mask would be empty; " + fix
        )
    answered = [
        conversation
        for conversation in conversations
        if any(message.role == "assistant" for message in conversation.messages)
        and not holds_control_tokens(tokenizer, conversation)
    ]
    marked = [_marked(tokenizer, conversation, stops) for conversation in answered]
    require(
        not answered or any(marked),
        f"the chat template of {tokenizer.path!r} marks no token of the assistant in any of the "
        f"first {len(answered)} conversations with an answer; {fix}",
    )


def _marked(tokenizer: Tokenizer, conversation: Conversation, stops: Sequence[int]) -> bool:
    """Whether any token is marked; refuses a marked stretch that does not end a turn."""
    try:
        example = render_example(tokenizer, conversation, LossTokens.assistant)
    except InputError as error:
        if conversation is PROBE:
            raise InputError(f"the chat template of {tokenizer.path!r}: {error}") from error
        return False  # a row that the run drops
    stretches = list(_stretches(example))
    for ids in stretches:
        require(
            ids[-1] in stops,
            f"the chat template of {tokenizer.path!r} marks {tokenizer.decode(ids)!r} as the "
            f"assistant's ({conversation.source}, row {conversation.row}); it ends with "
            f"{tokenizer.decode(ids[-1:])!r}, and a turn with {tokenizer.decode(stops[:1])!r}: the "
            "model would not learn to stop. Move {% endgeneration %} right behind the stop token, "
            "or set model.chat_template=chatml",
        )
    return bool(stretches)


def _stretches(example: Example) -> Iterator[list[int]]:
    """Token ids of each unbroken stretch with loss."""
    pairs = zip(example.input_ids, example.loss_mask, strict=True)
    for is_marked, group in groupby(pairs, key=lambda pair: pair[1]):
        if is_marked:
            yield [token for token, _ in group]
