"""Conversations to token ids, once, through a chat template; nothing tokenises text after this."""

import json
import re
from bisect import bisect_left
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cache, cached_property
from hashlib import sha256
from itertools import chain, groupby
from pathlib import Path
from typing import Any

from marco_train.config.data import Thinking
from marco_train.config.model import ChatTemplate, ModelConfig
from marco_train.config.sft import LossTokens
from marco_train.data.answers import NOT_FOUND, Render, find_answers, said_last
from marco_train.data.turns import split_thinking
from marco_train.errors import InputError, require
from marco_train.models.chat_template import MARK, Encoder, Rendered, render_turns
from marco_train.models.hf_io import stop_token_ids
from marco_train.models.tokenizer_files import (
    load_fast_tokenizer,
    read_tokenizer,
    tokenizer_digest,
)
from marco_train.types import Conversation, Example, Message, PlainText, TokenRow

CHATML = Path(__file__).with_name("chat_template.jinja")


@dataclass(frozen=True)
class Tokenizer:
    """A tokenizer with the template, and its arguments, that a run renders its chats with."""

    path: str
    of_transformers: Any  # their classes carry no types
    chat_template: str
    """For chats without tools; the tokenizer may have another for those with."""
    template_kwargs: Mapping[str, Any]

    def render(
        self,
        messages: Sequence[Message],
        tools: Sequence[Mapping[str, Any]] = (),
        *,
        open_answer: bool = False,
    ) -> Rendered:
        """Render turns; see `render_turns`."""
        return render_turns(
            self.of_transformers, messages, self.template_kwargs, tools, open_answer=open_answer
        )

    def decode(self, ids: Sequence[int], skip_special_tokens: bool = False) -> str:
        """Give the text of token ids."""
        return str(self.of_transformers.decode(ids, skip_special_tokens=skip_special_tokens))

    @cached_property
    def encoder(self) -> Encoder:
        """Text to token ids."""
        return Encoder(self.of_transformers)

    @cached_property
    def num_ids(self) -> int:
        """Token ids that mean something."""
        return len(self.of_transformers)

    @cached_property
    def stop_id(self) -> int:
        """The token that ends a text."""
        return int(stop_token_ids(self.path)[0])

    @cached_property
    def stops(self) -> re.Pattern[str]:
        """Finds a token that ends a turn or a text."""
        texts = (self.decode([token]) for token in stop_token_ids(self.path))
        return re.compile("|".join(map(re.escape, texts)))

    @cached_property
    def control_tokens(self) -> list[str]:
        """Texts that become one token and end a turn or open one."""
        added = self.of_transformers.added_tokens_decoder.values()
        special = {token.content for token in added if token.special}
        # What tokenizer_config.json does not name is still one token.
        in_file = read_tokenizer(self.path, "model.tokenizer").get("added_tokens") or []
        special |= {token["content"] for token in in_file if token.get("special")}
        return sorted(special | set(self.of_transformers.all_special_tokens))

    @cached_property
    def spells_control(self) -> re.Pattern[str]:
        """Finds a control token in a text; finds nothing where there are none."""
        return re.compile("|".join(map(re.escape, self.control_tokens)) or r"(?!)")

    @cached_property
    def shows_reasoning(self) -> bool:
        """Whether the template writes what an answer holds in a field for its thinking."""
        answer = Message("assistant", "Four.", reasoning_content="two and two")
        try:
            return answer.reasoning_content in self.render([Message("user", "?"), answer]).text
        except InputError:
            return False

    def digests(self) -> dict[str, str]:
        """Digest what decides the ids of a chat: the tokenizer, and the template in use."""
        templates = self.of_transformers.chat_template
        named = {
            name: str(token) for name, token in self.of_transformers.special_tokens_map.items()
        }
        template = json.dumps([templates, named, dict(self.template_kwargs)], sort_keys=True)
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
        absent = (
            "" if Path(path).is_dir() else ", which is no directory; one of the hub is org/name"
        )
        raise InputError(f"model.tokenizer: no tokenizer.json in {path!r}{absent}")
    tokenizer = load_fast_tokenizer(path, "model.tokenizer")
    if cfg.chat_template is ChatTemplate.chatml:
        tokenizer.chat_template = CHATML.read_text()
    template = tokenizer.chat_template
    if isinstance(template, dict):  # several by name; chats with tools may have their own
        template = template.get("default")
    require(
        bool(template),
        f"the tokenizer in {path!r} has no chat template; set model.chat_template=chatml, or give "
        "it one",
    )
    return Tokenizer(path, tokenizer, template, cfg.chat_template_kwargs)


def holds_control_tokens(tokenizer: Tokenizer, row: Conversation | PlainText) -> bool:
    """Whether any text of a row spells a control token, which would end its turn early."""
    return any(tokenizer.spells_control.search(text) for text in _texts(row))


def _texts(row: Conversation | PlainText) -> Iterator[str]:
    if isinstance(row, PlainText):
        yield row.text
        return
    for message in row.messages:
        yield message.content
        yield message.reasoning_content
        if message.tool_calls or message.name:
            yield json.dumps([message.tool_calls, message.name], ensure_ascii=False, default=str)
    if row.tools:
        yield json.dumps(row.tools, ensure_ascii=False, default=str)


def with_thinking(
    tokenizer: Tokenizer, conversation: Conversation, thinking: Thinking
) -> Conversation:
    """Keep or strip the thinking of answers, in a form that the template shows.

    An answer whose thinking is stripped because a question follows it is not learnt: the model
    would learn to give it without a thought.
    """
    messages = conversation.messages
    if not any(m.role == "assistant" and _shows_thought(m) for m in messages):
        return conversation
    asked_last = max((i for i, m in enumerate(messages) if m.role == "user"), default=-1)
    found = []
    for place, message in enumerate(messages):
        if message.role != "assistant" or not _shows_thought(message):
            found.append(message)
        elif thinking is Thinking.strip:
            found.append(_without_thought(message))
        elif thinking is Thinking.last and place < asked_last:
            is_learnt = message.is_learnt and not thought_of(message)
            found.append(replace(_without_thought(message), is_learnt=is_learnt))
        elif message.reasoning_content and not tokenizer.shows_reasoning:
            thought = message.reasoning_content.strip("\n")
            content = f"<think>\n{thought}\n</think>\n\n{message.content}"
            found.append(replace(message, content=content, reasoning_content=""))
        else:
            found.append(message)
    return replace(conversation, messages=tuple(found))


def thought_of(message: Message) -> str:
    """The thinking of an answer, without white space around it; empty without any."""
    if message.reasoning_content:
        return message.reasoning_content.strip()
    split = split_thinking(message.content)
    return split[0] if split is not None else ""


def _shows_thought(message: Message) -> bool:
    """Whether an answer has thinking, be it empty."""
    return bool(message.reasoning_content) or split_thinking(message.content) is not None


def _without_thought(message: Message) -> Message:
    return replace(message, content=without_thinking(message.content), reasoning_content="")


def without_thinking(text: str) -> str:
    """The text of an answer behind its thinking; empty where that does not end."""
    split = split_thinking(text)
    return text if split is None else split[1]


def render_row(
    tokenizer: Tokenizer, row: Conversation | PlainText | TokenRow, loss_tokens: LossTokens
) -> Example:
    """Render what SFT learns from a row.

    Raises:
        InputError: It cannot be rendered.
    """
    if isinstance(row, TokenRow):
        biggest = max(row.input_ids, default=0)
        require(
            biggest < tokenizer.num_ids,
            f"it holds the token id {biggest}, and the tokenizer has {tokenizer.num_ids}: it was "
            "tokenised for another model",
        )
        return Example(row.input_ids, row.loss_mask)
    if isinstance(row, PlainText):
        ids, _ = tokenizer.encoder.encode(row.text)
        ids = [*ids, tokenizer.stop_id]
        return Example(ids, [True] * len(ids))
    return render_example(tokenizer, row, loss_tokens)


def render_example(
    tokenizer: Tokenizer, conversation: Conversation, loss_tokens: LossTokens
) -> Example:
    """Render a whole conversation; the mask covers the assistant's words and its stop token.

    Its tokens begin with those of the prompt that sampling would use. An answer to which the text
    does not lead as sampling would is not learnt, where the template does not mark answers.

    Raises:
        InputError: The template cannot render it, or not all of it, or no answer of it is found.
    """
    messages, asked = conversation.messages, conversation.asked
    render = _renderings(tokenizer, conversation)
    rendered = render(len(messages), False)
    text, answers = rendered.text, _answers(tokenizer, render, rendered, messages)
    _check_shown(text, answers, messages, conversation.tools)
    cuts = [place for answer in answers for place in answer]
    if asked and len(asked) < len(messages):
        prompt = render(len(asked), True).text
        require(
            text.startswith(prompt),
            f"the chat template writes the prompt as {prompt[-40:]!r} at its end, which the whole "
            "conversation does not hold there: the model would be asked otherwise than it learnt",
        )
        cuts.append(len(prompt))
    else:
        prompt = ""
    ids, starts = _encode_after(tokenizer, prompt, text, cuts)
    exempt = _exempt(tokenizer, render, text, answers, messages)
    if loss_tokens is LossTokens.all:
        require(
            NOT_FOUND not in exempt,
            "an answer that is not to be learnt cannot be told apart: the chat template does not "
            "mark answers, and the text does not lead to this one as sampling would",
        )
        exempted = _mask(starts, sorted(exempt))
        return Example(ids, [not is_exempt for is_exempt in exempted])
    require(
        not answers or any(answer != NOT_FOUND for answer in answers),
        "the chat template does not mark answers, and of this conversation none is found between "
        f"a prompt that sampling would use and a stop token ({tokenizer.stops.pattern})",
    )
    learnt = [answer for answer in answers if answer not in exempt]
    return Example(ids, _mask(starts, learnt))


def _renderings(tokenizer: Tokenizer, conversation: Conversation) -> Render:
    """Render the first turns of a conversation, each number of them once."""

    @cache
    def render(count: int, open_answer: bool) -> Rendered:
        turns = conversation.messages[:count]
        return tokenizer.render(turns, conversation.tools, open_answer=open_answer)

    return render


def _answers(
    tokenizer: Tokenizer, render: Render, rendered: Rendered, messages: Sequence[Message]
) -> Sequence[tuple[int, int]]:
    """Where the answers of rendered turns stand: as the template marks them, or as found."""
    if rendered.answers is not None:
        return rendered.answers
    return find_answers(render, tokenizer.stops, rendered.text, messages)


def _encode_after(
    tokenizer: Tokenizer, prompt: str, text: str, cuts: Sequence[int]
) -> tuple[list[int], list[int]]:
    """Encode a text so that its tokens begin with those of the prompt that it begins with."""
    ids, starts = tokenizer.encoder.encode(text, cuts)
    before = tokenizer.encoder.encode(prompt, [cut for cut in cuts if cut < len(prompt)])
    if ids[: len(before[0])] == before[0]:
        return ids, starts
    # What follows a prompt can change how its last characters are split.
    end = len(prompt)
    after = tokenizer.encoder.encode(text[end:], [cut - end for cut in cuts if cut > end])
    return before[0] + after[0], before[1] + [start + end for start in after[1]]


def _mask(starts: Sequence[int], stretches: Sequence[tuple[int, int]]) -> list[bool]:
    """Whether each token begins in one of the stretches of text."""
    mask = [False] * len(starts)
    for begin, end in stretches:
        for place in range(bisect_left(starts, begin), bisect_left(starts, end)):
            mask[place] = True
    return mask


def _exempt(
    tokenizer: Tokenizer,
    render: Render,
    text: str,
    answers: Sequence[tuple[int, int]],
    messages: Sequence[Message],
) -> set[tuple[int, int]]:
    """Stretches of answers that are not learnt: by the row's word, or as their thinking is gone."""
    places = [place for place, message in enumerate(messages) if message.role == "assistant"]
    exempt = [place for place in places if not messages[place].is_learnt]
    thinking = [place for place in places[:-1] if thought_of(messages[place])]
    if not exempt and not thinking:
        return set()
    require(
        len(answers) == len(places),
        f"the chat template marks {len(answers)} stretches for {len(places)} answers, so "
        "it cannot be told which of them are not to be learnt",
    )
    stretch = dict(zip(places, answers, strict=True))
    for place in thinking:
        # As the last turn it stands there as the model would say it.
        said = _said_last(tokenizer, render, place)
        if said != text[slice(*stretch[place])]:
            exempt.append(place)
    return {stretch[place] for place in exempt}


def _said_last(tokenizer: Tokenizer, render: Render, place: int) -> str:
    """What a model would say in a turn if no other followed."""
    alone = render(place + 1, False)
    if alone.answers is None:
        return said_last(render, tokenizer.stops, place)[1]
    return alone.text[slice(*alone.answers[-1])] if alone.answers else ""


def _check_shown(
    text: str,
    answers: Sequence[tuple[int, int]],
    messages: Sequence[Message],
    tools: Sequence[Any],
) -> None:
    """Refuse a template that leaves out a turn, a tool, or a call that is to be learnt.

    Raises:
        InputError: Names what is missing.
    """
    fix = "take one that renders them, as with model.chat_template=chatml"
    for tool in tools:
        name = tool["function"]["name"]
        require(name in text, f"the chat template leaves out tools ({name!r}): {fix}")
    spoken = [message for message in messages if message.role == "assistant"]
    stretches = [text if answer == NOT_FOUND else text[slice(*answer)] for answer in answers]
    if len(stretches) != len(spoken):  # it cannot be told which is whose
        stretches = [text] * len(spoken)
    for message, stretch in zip(spoken, stretches, strict=True):
        called = Counter(call["function"]["name"] for call in message.tool_calls)
        for name, count in called.items():
            require(
                stretch.count(name) >= count,
                f"the chat template leaves out calls of tools ({name!r}): {fix}",
            )
    for message in messages:
        said = message.content.strip()
        as_json = json.dumps(said, ensure_ascii=False)[1:-1]  # as Llama's template writes results
        require(
            message.role == "assistant" or said in text or as_json in text,
            f"the chat template leaves out a {message.role} turn ({message.content[:40]!r}), or "
            f"writes it otherwise: {fix}",
        )


def render_prompt(tokenizer: Tokenizer, conversation: Conversation) -> list[int]:
    """Render what stands before the last assistant turn and open that turn.

    Raises:
        InputError: The template cannot render it, or gives no token.
    """
    asked, render = conversation.asked, _renderings(tokenizer, conversation)
    rendered = render(len(asked), True)
    answers = _answers(tokenizer, render, rendered, asked)
    _check_shown(rendered.text, answers, asked, conversation.tools)
    cuts = [place for answer in answers for place in answer]
    ids, _ = tokenizer.encoder.encode(rendered.text, cuts)
    require(len(ids) > 0, "the chat template renders nothing of it")
    return ids


PROBE = Conversation(
    messages=(Message("user", "How are you?"), Message("assistant", "Fine, thank you.")),
    source="a plain exchange",
    category="",
    language="",
    row=0,
)


FIX = "set model.chat_template=chatml, or mend the template"


def check_marks(tokenizer: Tokenizer, conversations: Iterable[Conversation]) -> str:
    """Refuse a template by which the loss mask would leave out answers, or where they end.

    Args:
        tokenizer: The run's.
        conversations: The first of the run's data; what the run would drop is passed over.

    Returns:
        How many answers are found, of a template that does not mark them; else nothing.

    Raises:
        InputError: No answer is marked or found, or what is marked does not end with a stop token.
    """
    stops = stop_token_ids(tokenizer.path)
    if not _num_marked(tokenizer, PROBE, stops):
        raise InputError(
            f"the chat template of {tokenizer.path!r} does not mark a plain answer with the "
            "{% generation %} that it has, so the loss mask would be empty; " + FIX
        )
    answered = [
        conversation
        for conversation in conversations
        if any(turn.role == "assistant" and turn.is_learnt for turn in conversation.messages)
        and not holds_control_tokens(tokenizer, conversation)
    ]
    found = [_num_marked(tokenizer, each, stops) for each in answered]
    of_rendered = [count for count in found if count is not None]
    num_marked = sum(of_rendered)
    require(
        not of_rendered or num_marked > 0,
        f"the chat template of {tokenizer.path!r} marks no token of the assistant in any of the "
        f"first {len(of_rendered)} conversations with an answer; {FIX}",
    )
    if not answered or MARK.search(tokenizer.chat_template):
        return ""
    turns = chain.from_iterable(conversation.messages for conversation in answered)
    num_answers = sum(turn.role == "assistant" and turn.is_learnt for turn in turns)
    return (
        "the chat template does not mark answers, so they are told by the prompts before them: "
        f"{num_marked} of {num_answers} in the first {len(answered)} conversations are learnt"
    )


def _num_marked(
    tokenizer: Tokenizer, conversation: Conversation, stops: Sequence[int]
) -> int | None:
    """Count the stretches with loss, and refuse one that does not end a turn.

    None: it cannot be rendered, and the gate says why.
    """
    try:
        example = render_example(tokenizer, conversation, LossTokens.assistant)
    except InputError as error:
        if conversation is PROBE:
            raise InputError(f"the chat template of {tokenizer.path!r}: {error}; {FIX}") from error
        return None
    marked = list(stretches(example))
    for ids in marked:
        require(
            ids[-1] in stops,
            f"the chat template of {tokenizer.path!r} marks {tokenizer.decode(ids)!r} as the "
            f"assistant's ({conversation.source}, row {conversation.row}); it ends with "
            f"{tokenizer.decode(ids[-1:])!r}, and a turn with {tokenizer.decode(stops[:1])!r}: the "
            "model would not learn to stop. Move {% endgeneration %} right behind the stop token, "
            "or set model.chat_template=chatml",
        )
    return len(marked)


def stretches(example: Example) -> Iterator[list[int]]:
    """Token ids of each unbroken stretch with loss."""
    pairs = zip(example.input_ids, example.loss_mask, strict=True)
    for is_marked, group in groupby(pairs, key=lambda pair: pair[1]):
        if is_marked:
            yield [token for token, _ in group]


def marked_text(tokenizer: Tokenizer, example: Example) -> str:
    """The text of an example, with » and « around what is learnt."""
    pairs = zip(example.input_ids, example.loss_mask, strict=True)
    texts = []
    for is_learnt, group in groupby(pairs, key=lambda pair: pair[1]):
        text = tokenizer.decode([token for token, _ in group])
        texts.append(f"»{text}«" if is_learnt else text)
    return "".join(texts)
