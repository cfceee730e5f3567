"""This rank's share of each global batch, with a cursor that is nothing but the step."""

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from hashlib import sha256
from typing import Any, TypeVar

from marco_train.config import DataConfig, OPDConfig, SFTConfig, SourceConfig, StageConfig
from marco_train.data.chat import (
    Tokenizer,
    holds_control_tokens,
    render_example,
    render_prompt,
)
from marco_train.data.mixture import Mixture
from marco_train.data.packing import pack_examples
from marco_train.data.sources import Source
from marco_train.distributed import rank, reduce_sums, world_size
from marco_train.errors import InputError
from marco_train.metrics import Metrics
from marco_train.tracking import say
from marco_train.types import (
    GROUPED_BY,
    Conversation,
    Example,
    Microbatch,
    Prompt,
    prompt_groups,
)

T = TypeVar("T", Example, Prompt)

DROPS = ("data/dropped_too_long", "data/dropped_no_loss", "data/dropped_special")


class ConversationStream:
    """A mixture of sources, sampled by index."""

    def __init__(self, sources: dict[str, SourceConfig], num_rows: int | None, seed: int) -> None:
        def budget(cfg: SourceConfig) -> int | None:
            return None if num_rows is None else max(1, round(num_rows * cfg.weight))

        self._sources = {
            name: Source(name, cfg, budget(cfg)) for name, cfg in sorted(sources.items())
        }
        self._mixture = Mixture(
            {name: len(source) for name, source in self._sources.items()},
            {name: sources[name].weight for name in self._sources},
            seed,
        )

    def __getitem__(self, index: int) -> Conversation:
        source, row = self._mixture.sample(index)
        return self._sources[source][row]

    def values(self, column: str) -> set[str]:
        """What stands in a column of any source."""
        return set().union(*(source.values(column) for source in self._sources.values()))

    def epoch(self, index: int) -> float:
        """How often the most repeated source has been walked through before `index`."""
        return max(self._mixture.epochs(index).values())

    def fingerprint(self) -> str:
        """Digest of what the samples are a function of, beside the seed."""
        sizes = {name: len(source) for name, source in self._sources.items()}
        contents = {name: source.fingerprint for name, source in self._sources.items()}
        return sha256(repr((sizes, self._mixture.quotas, contents)).encode()).hexdigest()[:16]


class _Loader:
    """Deals out global batches; sample `step * batch + slot` is the same on any number of ranks."""

    name = "data"

    def __init__(self, data: DataConfig, stage: StageConfig, batch_size: int, seed: int) -> None:
        self._data = data
        self._batch_size = batch_size
        self._stream = ConversationStream(data.sources, data.num_rows, seed)
        self._step = 0
        self._drops = dict.fromkeys(DROPS, 0)
        self._num_kept = 0

    def _next_share(self, render: Callable[[int, Conversation], T | str]) -> list[T]:
        """Render this rank's slots of the coming batch; rows at fault are dropped and counted."""
        first = self._step * self._batch_size
        share = range(first + rank(), first + self._batch_size, world_size())
        rendered = [render(index, self._stream[index]) for index in share]
        kept = [item for item in rendered if not isinstance(item, str)]
        self._drops = {name: rendered.count(name) for name in DROPS}
        self._num_kept = len(kept)
        self._step += 1
        return kept

    def metrics(self) -> Metrics:
        """Describe the last batch, over all ranks."""
        kept, *drops = reduce_sums([self._num_kept, *self._drops.values()])
        return {
            "data/num_sequences": kept,
            "data/epoch": self._stream.epoch(self._step * self._batch_size),
            **dict(zip(DROPS, drops, strict=True)),
        }

    def state_at(self, step: int) -> dict[str, Any]:
        """What a checkpoint keeps of the data."""
        return {"cursor": step, "mixture": self._stream.fingerprint()}

    def resume(self, step: int, state: dict[str, Any]) -> None:
        """Go on at a step.

        Raises:
            InputError: The data are not those of the checkpoint.
        """
        expected = self.state_at(step)
        if state != expected:
            raise InputError(
                f"the data changed since the checkpoint was saved ({state} -> {expected}); rows "
                "would be skipped or seen twice: restore the files, or start with resume=never"
            )
        self._step = step


class SFTLoader(_Loader):
    """Packed microbatches of conversations."""

    def __init__(self, data: DataConfig, stage: SFTConfig, tokenizer: Tokenizer, seed: int) -> None:
        super().__init__(data, stage, stage.global_batch_size, seed)
        self._stage = stage
        self._tokenizer = tokenizer
        self.num_steps = stage.capped(stage.num_steps)

    def __iter__(self) -> Iterator[list[Microbatch]]:
        return self

    def __next__(self) -> list[Microbatch]:
        examples = self._next_share(self._render)
        return pack_examples(examples, self._data.max_tokens_per_microbatch)

    def held_out(self) -> list[Microbatch]:
        """Pack this rank's share of the held-out conversations; empty without any."""
        if self._data.held_out is None or self._stage.eval_every is None:
            return []
        stream = ConversationStream(self._data.held_out, None, seed=0)
        share = range(rank(), self._stage.num_eval_examples, world_size())
        rendered = [self._render(index, stream[index]) for index in share]
        examples = [item for item in rendered if not isinstance(item, str)]
        if len(examples) < len(rendered):
            say(f"held-out: dropped {len(rendered) - len(examples)} of {len(rendered)} rows")
        return pack_examples(examples, self._data.max_tokens_per_microbatch)

    def _render(self, index: int, conversation: Conversation) -> Example | str:
        if holds_control_tokens(self._tokenizer, conversation):
            return "data/dropped_special"
        example = render_example(self._tokenizer, conversation, self._stage.loss_tokens)
        if len(example.input_ids) > self._stage.max_length:
            return "data/dropped_too_long"
        if not any(example.loss_mask[1:]):
            return "data/dropped_no_loss"
        return example


class PromptLoader(_Loader):
    """Prompts that await responses."""

    def __init__(self, data: DataConfig, stage: OPDConfig, tokenizer: Tokenizer, seed: int) -> None:
        super().__init__(data, stage, stage.global_batch_size, seed)
        self._max_prompt_length = stage.max_prompt_length
        self._tokenizer = tokenizer

    def __iter__(self) -> Iterator[list[Prompt]]:
        return self

    def __next__(self) -> list[Prompt]:
        return self._next_share(self._render)

    def groups(self) -> set[str]:
        """Names of the groups of rollouts that these prompts give, as `category_math`."""
        categories, languages = (self._stream.values(kind) for kind in GROUPED_BY)
        return {group for name in categories for group in prompt_groups(name, "")} | {
            group for name in languages for group in prompt_groups("", name)
        }

    def first(self, count: int) -> list[Prompt]:
        """Render this rank's share of the run's first prompts; rows at fault are left out.

        The cursor stays where it is.
        """
        share = range(rank(), count, world_size())
        rendered = [self._render(index, self._stream[index]) for index in share]
        return [prompt for prompt in rendered if not isinstance(prompt, str)]

    def held_out(self, count: int) -> list[Prompt]:
        """Render this rank's share of `count` held-out prompts; rows at fault are left out.

        Raises:
            InputError: There are none.
        """
        if count == 0:
            return []
        if self._data.held_out is None:
            raise InputError(
                "stage.cascade.*.converged measures the KL on held-out prompts: set data.held_out"
            )
        stream = ConversationStream(self._data.held_out, None, seed=0)
        rendered = [self._render(i, stream[i]) for i in range(rank(), count, world_size())]
        return [prompt for prompt in rendered if not isinstance(prompt, str)]

    def _render(self, index: int, conversation: Conversation) -> Prompt | str:
        if holds_control_tokens(self._tokenizer, conversation):
            return "data/dropped_special"
        if conversation.messages[0].role == "assistant":
            return "data/dropped_no_loss"
        prompt = make_prompt(self._tokenizer, index, conversation)
        if len(prompt.input_ids) > self._max_prompt_length:
            return "data/dropped_too_long"
        return prompt


@dataclass(frozen=True)
class Question:
    """A held-out prompt and how its answer is checked."""

    prompt: Prompt
    text: str
    reference: str
    verifier: Mapping[str, Any]


def held_out_questions(
    sources: dict[str, SourceConfig], count: int, max_prompt_length: int, tokenizer: Tokenizer
) -> list[Question]:
    """Render the same questions on every rank; rows at fault are left out.

    Raises:
        InputError: A row has no question or no answer, or every prompt is over the limit.
    """
    stream = ConversationStream(sources, None, seed=0)
    questions = []
    for index in range(count):
        conversation = stream[index]
        asked, answer = conversation.messages[:-1], conversation.messages[-1]
        if answer.role != "assistant" or not asked:
            raise InputError(
                f"source {conversation.source!r} has a row that is no question with its answer"
            )
        if holds_control_tokens(tokenizer, conversation):
            continue
        prompt = make_prompt(tokenizer, index, conversation)
        if len(prompt.input_ids) <= max_prompt_length:
            questions.append(
                Question(prompt, asked[-1].content, answer.content, conversation.verifier)
            )
    if not questions:
        raise InputError(
            f"none of {count} held-out prompts is within stage.max_prompt_length "
            f"{max_prompt_length} tokens"
        )
    return questions


def make_prompt(tokenizer: Tokenizer, index: int, conversation: Conversation) -> Prompt:
    """Render the prompt of a conversation."""
    return Prompt(
        index=index,
        input_ids=render_prompt(tokenizer, conversation),
        source=conversation.source,
        category=conversation.category,
        language=conversation.language,
    )
