"""This rank's share of each global batch, with a cursor that is the first sample of a step."""

from collections import Counter
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping
from dataclasses import dataclass
from itertools import chain
from typing import Any, TypeVar

from marco_train.config.data import DataConfig, SourceConfig
from marco_train.config.opd import OPDConfig
from marco_train.config.resume import ResumeChange
from marco_train.config.resumption import field_difference
from marco_train.config.sft import LossTokens, SFTConfig, num_sft_steps
from marco_train.data.chat import (
    Tokenizer,
    check_marks,
    holds_control_tokens,
    render_example,
    render_prompt,
)
from marco_train.data.mixture import Mixture, exact_weights
from marco_train.data.packing import pack_examples
from marco_train.data.sources import BadRow, Source
from marco_train.distributed import gather_objects, is_main, rank, reduce_sums, world_size
from marco_train.errors import InputError, require
from marco_train.metrics import Metrics
from marco_train.models.chat_template import check_template_kwargs
from marco_train.tracking import log_line
from marco_train.types import (
    GROUPED_BY,
    Conversation,
    Example,
    Microbatch,
    Prompt,
    group_name,
    prompt_groups,
)

T = TypeVar("T")

MALFORMED = "data/dropped_malformed"
DROPS = ("data/dropped_too_long", "data/dropped_no_loss", "data/dropped_special", MALFORMED)
# Rows at fault that one rank names; the metric counts all.
MOST_NAMED = 20
# Samples at the start of a run whose loss mask is looked at before the first step.
NUM_MARKED = 64
# Rows of each source of which the doctor wants to see one used.
NUM_TRIED = 64
# Steps whose beginnings are known: a checkpoint may be of the last step, prompts of the next.
NUM_POSITIONS = 3
# Samples at the start of a run whose turns are compared with what its teachers make of them.
NUM_FIRST = 2048


@dataclass(frozen=True)
class Dropped:
    """A row that is not used."""

    metric: str
    """Which counts it."""
    source: str
    row: int
    reason: str
    """What is at fault, of a malformed row."""

    @property
    def place(self) -> str:
        """Where the row stands."""
        return f"source {self.source!r}, row {self.row} (from 0)"


class Tally:
    """Counts the rows that are dropped, by reason and source."""

    def __init__(self) -> None:
        self._counts: Counter[tuple[str, str]] = Counter()  # metric, source
        self._first: dict[str, str] = {}  # source -> what is wrong with its first row at fault

    def add(self, drop: Dropped) -> None:
        """Count a row."""
        self._counts[drop.metric, drop.source] += 1
        if drop.metric == MALFORMED:
            self._first.setdefault(drop.source, f"{drop.place}: {drop.reason}")

    def count(self, metric: str) -> int:
        """How many rows a metric counts."""
        return sum(count for (name, _), count in self._counts.items() if name == metric)

    def gathered_refusal(self, what: str) -> InputError:
        """Say why no row can be used; all ranks take part."""
        counts: Counter[tuple[str, str]] = Counter()
        first: dict[str, str] = {}
        for counts_of_rank, first_of_rank in gather_objects((self._counts, self._first)):
            counts.update(counts_of_rank)
            first = first_of_rank | first
        said = [f"{n} {metric} in {source!r}" for (metric, source), n in sorted(counts.items())]
        return InputError(
            f"{what} can be used ({'; '.join([*said, *first.values()])}): mend the rows, or raise "
            "the stage's limit on their length"
        )


class ConversationStream:
    """A mixture of sources, sampled by index."""

    def __init__(self, sources: dict[str, SourceConfig], num_rows: int | None, seed: int) -> None:
        self._sources = {name: Source(name, cfg) for name, cfg in sorted(sources.items())}
        weights = exact_weights(
            {name: sources[name].weight for name in self._sources},
            {name: len(source) for name, source in self._sources.items()},
        )
        if num_rows is not None:
            for name, source in self._sources.items():
                source.keep_first(max(1, round(num_rows * weights[name])))
        self._mixture = Mixture(
            {name: len(source) for name, source in self._sources.items()}, weights, seed
        )
        self._named: set[tuple[str, int]] = set()

    def __getitem__(self, index: int) -> Conversation | BadRow:
        source, row = self._mixture.sample(index)
        return self._sources[source][row]

    @property
    def num_rows(self) -> int:
        """Rows of all sources."""
        return sum(map(len, self._sources.values()))

    @property
    def num_samples_of_all(self) -> int:
        """Samples after which every row of every source has been drawn."""
        return self._mixture.num_samples_of_all

    def rendered(self, index: int, render: Callable[[int, Conversation], T | str]) -> T | Dropped:
        """Render a sample, unless it is dropped.

        Args:
            index: Of the sample.
            render: Gives the metric that counts the row instead, where it is to be dropped.
        """
        return self.render(self[index], index, render)

    @staticmethod
    def render(
        found: Conversation | BadRow, index: int, render: Callable[[int, Conversation], T | str]
    ) -> T | Dropped:
        """Render a row as the sample of an index, unless it is dropped."""
        if isinstance(found, BadRow):
            return Dropped(MALFORMED, found.source, found.row, found.reason)
        try:
            item = render(index, found)
        except InputError as error:
            return Dropped(MALFORMED, found.source, found.row, str(error))
        return Dropped(item, found.source, found.row, "") if isinstance(item, str) else item

    def first_rows(self, count: int) -> Iterator[list[Conversation | BadRow]]:
        """The first rows of each source."""
        for source in self._sources.values():
            yield [source[row] for row in range(min(count, len(source)))]

    def name_malformed(self, drop: Dropped) -> None:
        """Say which rows are at fault, each once and the first of them only."""
        place = (drop.source, drop.row)
        if drop.metric != MALFORMED or place in self._named or len(self._named) == MOST_NAMED:
            return
        self._named.add(place)
        log_line(f"dropped {drop.place}: {drop.reason}")
        if len(self._named) == MOST_NAMED:
            log_line(f"further rows at fault are not named; {MALFORMED} counts them")

    def values(self, column: str) -> set[str]:
        """What stands in a column of any source."""
        return set().union(*(source.values(column) for source in self._sources.values()))

    def describe(self, num_samples: int) -> list[str]:
        """Say of each source how large it is and how often so many samples go through it."""
        weights, epochs = self._mixture.weights, self._mixture.epochs(num_samples)
        return [
            f"source {name!r}: {len(source)} rows, weight {float(weights[name]):.4g}, "
            f"{epochs[name]:.3g} epochs"
            for name, source in self._sources.items()
        ]

    def epoch(self, index: int) -> float:
        """How often the most repeated source has been walked through before `index`."""
        return max(self._mixture.epochs(index).values())

    def identity(self) -> dict[str, Any]:
        """Digest what the samples are a function of, beside the seed."""
        return {
            "rows": {name: source.fingerprint[:16] for name, source in self._sources.items()},
            "mixture": {
                name: {"rows": len(source), "weight": float(self._mixture.weights[name])}
                for name, source in self._sources.items()
            },
        }


@dataclass(frozen=True)
class Position:
    """How far the data of a run have come, on all ranks, before a step."""

    cursor: int
    """The step's first sample."""
    used: Counter[str]
    """Sequences used since the run began: by group, as `source_math`, and under `""` all."""


class _Loader:
    """Deals out global batches, the same on any number of ranks.

    A step draws as many samples as its batch holds; where all of them are dropped it draws as many
    again. So a step's first sample follows from the steps before it, and is what a checkpoint
    keeps.
    """

    name = "data"

    def __init__(self, data: DataConfig, batch_size: int, tokenizer: Tokenizer, seed: int) -> None:
        self._data = data
        self._batch_size = batch_size
        self._tokenizer = tokenizer
        self._stream = ConversationStream(data.sources, data.num_rows, seed)
        self._identity = self._stream.identity() | tokenizer.digests()
        self._step = 0
        self._positions = {0: Position(0, Counter())}  # by step; of the last few
        self._metrics: Metrics = {}

    def _next_share(self, render: Callable[[int, Conversation], T | str]) -> list[T]:
        """Render this rank's slots of the coming batch; rows at fault are dropped and counted.

        Raises:
            InputError: None of all rows can be used.
        """
        begin = self._positions[self._step]
        first = end = begin.cursor
        dropped = Tally()
        used: Counter[str] = Counter()
        counts: Counter[str] = Counter()  # of this step over all ranks, as `used`, and of drops

        def render_and_count(index: int, conversation: Conversation) -> T | str:
            item = render(index, conversation)
            if not isinstance(item, str):
                used.update(["", *groups_of(conversation)])
            return item

        while not counts[""]:  # on every rank alike
            if end - first >= max(self._batch_size, self._stream.num_samples_of_all):
                raise dropped.gathered_refusal(f"none of {end - first} samples in a row")
            share = range(end + rank(), end + self._batch_size, world_size())
            end += self._batch_size
            kept = render_share(self._stream, share, render_and_count, dropped)
            mine = used | Counter({name: dropped.count(name) for name in DROPS})
            counts = sum(gather_objects(mine), Counter())
        drops = {name: float(counts.pop(name, 0)) for name in DROPS}
        position = Position(end, begin.used + counts)
        self._step += 1
        self._positions[self._step] = position
        self._positions.pop(self._step - NUM_POSITIONS, None)
        num_used = position.used[""]
        shares = {f"data/share/{g}": n / num_used for g, n in sorted(position.used.items()) if g}
        self._metrics = {
            "data/num_sequences": float(counts[""]),
            "data/epoch": self._stream.epoch(end),
            **drops,
            **shares,
        }
        return kept

    def metrics(self) -> Metrics:
        """Describe the last batch, over all ranks."""
        return self._metrics

    def log_plan(self, num_steps: int) -> None:
        """Say how often a run of so many steps, those behind it included, goes through sources."""
        samples_left = (num_steps - self._step) * self._batch_size
        self._log_sources(self._positions[self._step].cursor + samples_left, f"in {num_steps}")

    def log_epochs(self) -> None:
        """Say how often the steps up to here went through each source."""
        self._log_sources(self._positions[self._step].cursor, f"made in {self._step}")

    def _log_sources(self, num_samples: int, when: str) -> None:
        if is_main():
            for line in self._stream.describe(num_samples):
                log_line(f"{line} {when} steps")

    def check_sources(self) -> None:
        """Refuse sources of whose first rows none can be used: the mixture would lack them.

        Every rank takes part.

        Raises:
            InputError: Says how many rows of each were dropped and why.
        """
        for rows in self._stream.first_rows(NUM_TRIED):
            dropped = Tally()
            tried = [self._stream.render(row, 0, self._render) for row in rows]
            lost = [each for each in tried if isinstance(each, Dropped)]
            for each in lost[rank() :: world_size()]:  # counted once
                dropped.add(each)
            if len(lost) == len(tried):
                raise dropped.gathered_refusal(f"none of the first {len(tried)} rows of a source")

    def _render(self, index: int, conversation: Conversation) -> Any:
        """Render a sample, or name the metric that counts it as dropped."""
        raise NotImplementedError

    def state_at(self, step: int) -> dict[str, Any]:
        """What a checkpoint keeps of the data, before a step is made."""
        position = self._positions[step]
        used = dict(sorted(position.used.items()))
        return {"cursor": position.cursor, "used": used, **self._identity}

    def resume(
        self, step: int, state: dict[str, Any], allowed: Collection[ResumeChange] = ()
    ) -> None:
        """Go on at a step.

        Raises:
            InputError: The data are not those of the checkpoint, and may not be others.
        """
        if state.keys() != {"cursor", "used", *self._identity}:
            raise InputError(
                "the checkpoint was saved by an earlier version, which counted other things than "
                "this one does: start with resume=never"
            )
        self._step = step
        self._positions = {step: Position(state["cursor"], Counter(state["used"]))}
        changed = field_difference({name: state[name] for name in self._identity}, self._identity)
        if changed:
            what = f"the data changed since the checkpoint was saved ({'; '.join(changed)})"
            require(
                ResumeChange.data in allowed,
                f"{what}, so rows would be skipped or seen twice, or rendered otherwise: restore "
                "them, go on with the new data from the same sample with on_resume.allow=[data], "
                "or start with resume=never",
            )
            if is_main():
                log_line(
                    f"{what}, as on_resume.allow=[data] allows: rows may be skipped or seen twice"
                )


def groups_of(conversation: Conversation) -> list[str]:
    """Name the groups in which a conversation is counted, as `source_math`."""
    of_prompt = prompt_groups(conversation.category, conversation.language)
    return [group_name(f"source_{conversation.source}"), *of_prompt]


def render_share(
    stream: ConversationStream,
    indices: Iterable[int],
    render: Callable[[int, Conversation], T | str],
    dropped: Tally,
) -> list[T]:
    """Render samples; those that are dropped are counted, and rows at fault are named."""
    kept = []
    for index in indices:
        found = stream.rendered(index, render)
        if isinstance(found, Dropped):
            dropped.add(found)
            stream.name_malformed(found)
        else:
            kept.append(found)
    return kept


class SFTLoader(_Loader):
    """Packed microbatches of conversations."""

    def __init__(self, data: DataConfig, stage: SFTConfig, tokenizer: Tokenizer, seed: int) -> None:
        """Open the sources, and look at the loss mask of their first conversations.

        Raises:
            InputError: A source cannot be read, or the template does not mark what is to be learnt.
        """
        check_template_kwargs([tokenizer.chat_template], tokenizer.template_kwargs)
        super().__init__(data, stage.global_batch_size, tokenizer, seed)
        self._stage = stage
        self.epoch_rows = self._stream.num_rows
        self.num_steps = stage.capped(
            num_sft_steps(
                stage.num_steps, stage.num_epochs, stage.global_batch_size, self.epoch_rows
            )
        )
        if stage.loss_tokens is LossTokens.assistant:
            first = map(self._stream.__getitem__, range(NUM_MARKED))
            check_marks(tokenizer, [found for found in first if isinstance(found, Conversation)])

    def __iter__(self) -> Iterator[list[Microbatch]]:
        return self

    def __next__(self) -> list[Microbatch]:
        examples = self._next_share(self._render)
        return pack_examples(examples, self._data.max_tokens_per_microbatch)

    def held_out(self) -> list[Microbatch]:
        """Pack this rank's share of the held-out conversations; empty without any.

        Raises:
            InputError: None of them can be used.
        """
        if self._data.held_out is None or self._stage.eval_every is None:
            return []
        examples = held_out_share(self._data.held_out, self._stage.num_eval_examples, self._render)
        return pack_examples(examples, self._data.max_tokens_per_microbatch)

    def _render(self, _: int, conversation: Conversation) -> Example | str:
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
        super().__init__(data, stage.global_batch_size, tokenizer, seed)
        self._max_prompt_length = stage.max_prompt_length

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
        """Render this rank's share of the run's first `count` prompts; rows at fault are left out.

        The cursor stays where it is.

        Raises:
            InputError: There is none among the first samples.
        """
        found: list[Prompt] = []
        dropped = Tally()
        for index in range(NUM_FIRST):
            if len(found) == count:
                break
            item = self._stream.rendered(index, self._render)
            if not isinstance(item, Dropped):
                found.append(item)
            elif index % world_size() == rank():  # counted once
                dropped.add(item)
        if count and not found:
            raise dropped.gathered_refusal(f"none of the first {NUM_FIRST} samples")
        return found[rank() :: world_size()]

    def first_prompts(
        self, is_wanted: Callable[[Conversation], bool]
    ) -> Iterator[tuple[Conversation, Prompt]]:
        """Render those of the first samples that are wanted, the same on every rank.

        Those that are dropped are left out.
        """
        for index in range(NUM_FIRST):
            found = self._stream[index]
            if isinstance(found, BadRow) or not is_wanted(found):
                continue
            prompt = self._stream.render(found, index, self._render)
            if not isinstance(prompt, Dropped):
                yield found, prompt

    def held_out(self, count: int) -> list[Prompt]:
        """Render this rank's share of `count` held-out prompts; rows at fault are left out.

        Raises:
            InputError: There are none, or none of them can be used.
        """
        if count == 0:
            return []
        if self._data.held_out is None:
            raise InputError(
                "stage.cascade.*.early_switch measures the KL on held-out prompts: "
                "set data.held_out"
            )
        return held_out_share(self._data.held_out, count, self._render)

    def _render(self, index: int, conversation: Conversation) -> Prompt | str:
        if holds_control_tokens(self._tokenizer, conversation):
            return "data/dropped_special"
        if conversation.messages[0].role == "assistant":
            return "data/dropped_no_loss"
        prompt = make_prompt(self._tokenizer, index, conversation)
        if len(prompt.input_ids) > self._max_prompt_length:
            return "data/dropped_too_long"
        return prompt


def held_out_share(
    sources: dict[str, SourceConfig], count: int, render: Callable[[int, Conversation], T | str]
) -> list[T]:
    """Render this rank's share of the first held-out samples.

    Raises:
        InputError: None of them can be used.
    """
    stream, dropped = ConversationStream(sources, None, seed=0), Tally()
    kept = render_share(stream, range(rank(), count, world_size()), render, dropped)
    num_kept, *drops = reduce_sums([len(kept), *map(dropped.count, DROPS)])
    if num_kept == 0:
        raise dropped.gathered_refusal(f"none of {count} held-out rows")
    if sum(drops) > 0 and is_main():
        said = ", ".join(f"{n:.0f} {name}" for n, name in zip(drops, DROPS, strict=True) if n)
        log_line(f"held-out: dropped {sum(drops):.0f} of {count} rows ({said})")
    return kept


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
    """Render the same questions on every rank; rows at fault are dropped. All ranks take part.

    Raises:
        InputError: None of them can be used, or the template reads not all of its arguments.
    """

    def render(index: int, conversation: Conversation) -> Question | str:
        asked, answers = conversation.asked, conversation.messages[len(conversation.asked) :]
        if not asked or not answers:
            raise InputError("the row is no question with its answer")
        if holds_control_tokens(tokenizer, conversation):
            return "data/dropped_special"
        prompt = make_prompt(tokenizer, index, conversation)
        if len(prompt.input_ids) > max_prompt_length:
            return "data/dropped_too_long"
        return Question(prompt, asked[-1].content, answers[-1].content, conversation.verifier)

    check_template_kwargs([tokenizer.chat_template], tokenizer.template_kwargs)
    shares = gather_objects(held_out_share(sources, count, render))
    return sorted(chain.from_iterable(shares), key=lambda question: question.prompt.index)


def make_prompt(tokenizer: Tokenizer, index: int, conversation: Conversation) -> Prompt:
    """Render the prompt of a conversation."""
    return Prompt(
        index=index,
        input_ids=render_prompt(tokenizer, conversation),
        source=conversation.source,
        category=conversation.category,
        language=conversation.language,
    )
