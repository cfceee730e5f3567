"""This rank's share of each global batch, with a cursor that is the first sample of a step."""

from collections import Counter
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import chain
from pathlib import Path
from typing import Any, TypeVar

from marco_train.config.data import DataConfig, OnChange, Overlong, Thinking
from marco_train.config.opd import OPDConfig
from marco_train.config.resume import ResumeChange
from marco_train.config.resumption import field_difference
from marco_train.config.sft import LossTokens, SFTConfig
from marco_train.config.stage import samples_of
from marco_train.data.chat import (
    Tokenizer,
    check_marks,
    marked_text,
    with_thinking,
)
from marco_train.data.drops import DROPS, MALFORMED, TRUNCATED, Dropped, Tally, over
from marco_train.data.gate import add_to_quarantine
from marco_train.data.packing import pack_examples
from marco_train.data.render import ExampleRenderer, PromptRenderer
from marco_train.data.stream import ConversationStream
from marco_train.distributed import gather_objects, is_main, rank, reduce_sums, world_size
from marco_train.errors import InputError, require
from marco_train.metrics import Metrics
from marco_train.models.chat_template import check_template_kwargs
from marco_train.tracking import log_line
from marco_train.types import (
    Conversation,
    Example,
    Microbatch,
    Prompt,
    Row,
    UsableRow,
    group_name,
    prompt_groups,
)

T = TypeVar("T")

NOT_WHOLE = (*DROPS, TRUNCATED)
QUARANTINE = "quarantine.jsonl"
"""Rows at fault of a run, under its output directory."""
# Samples at the start of a run whose loss mask is looked at before the first step.
NUM_MARKED = 64
# Steps whose beginnings are known: a checkpoint may be of the last step, prompts of the next.
NUM_POSITIONS = 3
# Samples at the start of a run whose turns are compared with what its teachers make of them.
NUM_FIRST = 2048


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

    def __init__(
        self,
        data: DataConfig,
        batch_size: int,
        tokenizer: Tokenizer,
        render: ExampleRenderer | PromptRenderer,
        seed: int,
        quarantine: Path | None,
    ) -> None:
        self._data = data
        self._batch_size = batch_size
        self._tokenizer = tokenizer
        self._render = render
        self._stream = trained_stream(data, seed)
        self.epoch_rows = self._stream.num_rows
        self._identity = self._stream.identity() | tokenizer.digests()
        self._check_template()
        self._stream.judge(data, render, render.identity(), render.limit, quarantine)
        self._step = 0
        self._positions = {0: Position(0, Counter())}  # by step; of the last few
        self._metrics: Metrics = {}
        self._dropped = Tally(render.limit)  # of this rank, since it started
        self._quarantine = quarantine
        self._skipped: list[dict[str, Any]] = []  # lines of the quarantine, by `skip`
        self._num_samples: int | None = None  # of a run whose length is given in epochs

    def _next_share(self) -> list[tuple[int, Row, Example]]:
        """Draw this rank's slots of the coming batch; rows at fault are dropped and counted.

        Returns:
            Index, row and tokens of each sample that is used.

        Raises:
            InputError: None of all rows can be used, or too many of a source are at fault.
        """
        begin = self._positions[self._step]
        first = end = begin.cursor
        dropped = Tally(self._render.limit)
        counts: Counter[str] = Counter()  # of this step over all ranks: uses by group, and drops
        while not counts[""]:  # on every rank alike
            if end - first >= max(self._batch_size, self._stream.num_samples_of_all):
                raise dropped.gathered_refusal(f"none of {end - first} samples in a row")
            start, end = end, self._end_of_batch(end)
            share = range(start + rank(), end, world_size())
            kept = []
            used: Counter[str] = Counter()
            drawn: Counter[tuple[str, bool]] = Counter()
            for index in share:
                found = self._stream.tokens(index, self._render)
                is_malformed = isinstance(found, Dropped) and found.metric == MALFORMED
                drawn.update(filter(None, [self._stream.fault_of(index, is_malformed)]))
                if isinstance(found, Dropped):
                    dropped.add(found)
                    self._stream.name_malformed(found)
                else:
                    kept.append((index, *found))
                    if found[1].is_truncated:
                        dropped.add_truncated(found[0])
                    used.update(["", *groups_of(found[0])])
            mine = used | Counter({name: dropped.count(name) for name in NOT_WHOLE})
            of_ranks = gather_objects((mine, drawn))
            counts = sum((count for count, _ in of_ranks), Counter())
            self._stream.check_drawn(sum((each for _, each in of_ranks), Counter()), self._data)
        self._dropped.update(dropped)
        drops = {name: float(counts.pop(name, 0)) for name in NOT_WHOLE}
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

    def _end_of_batch(self, begin: int) -> int:
        end, last = begin + self._batch_size, self._num_samples
        # Behind its last sample a run draws whole batches, as where one was dropped as a whole.
        return last if last is not None and begin < last < end else end

    def metrics(self) -> Metrics:
        """Describe the last batch, over all ranks."""
        return self._metrics

    def skip(self, update: int, samples: Sequence[int], reason: str) -> list[str]:
        """Write down the rows of an update that was not made; every rank takes part.

        They are drawn again in the next epoch.

        Args:
            update: Its number, from 0.
            samples: Positions in the run's stream, of all ranks.
            reason: Why it was not made.

        Returns:
            Where the rows stand, a text for each source.
        """
        rows = sorted({self._stream.place(sample) for sample in samples})
        lines = [
            {
                "source": source,
                "row": row,
                "reason": f"update {update}: {reason}",
                "begins": self._stream.sources[source].begins(row),
            }
            for source, row in rows
        ]
        self._skipped += lines
        self._write_skipped(lines)
        numbers: dict[str, list[str]] = {}
        for source, row in rows:
            numbers.setdefault(source, []).append(str(row))
        return [
            f"source {source!r}, row{'s' * (len(of_it) > 1)} {', '.join(of_it)} (from 0)"
            for source, of_it in numbers.items()
        ]

    def _write_skipped(self, lines: Sequence[dict[str, Any]]) -> None:
        if self._quarantine is not None and is_main() and lines:
            self._quarantine.parent.mkdir(parents=True, exist_ok=True)
            add_to_quarantine(self._quarantine, lines)

    def num_samples(self, num_steps: int) -> int:
        """Count the samples of a run of so many steps, those behind it included."""
        begin, left = self._positions[self._step].cursor, max(0, num_steps - self._step)
        end, last = begin + left * self._batch_size, self._num_samples
        if last is not None and begin < last < end:
            end -= (begin - last) % self._batch_size  # by which the batch that ends there is less
        return end

    def log_plan(self, num_steps: int) -> None:
        """Say how often a run of so many steps, those behind it included, goes through sources."""
        self._log_sources(self.num_samples(num_steps), f"in {num_steps}")

    def header(self, num_steps: int) -> dict[str, Any]:
        """Describe the data to a reader of the run; `stages/header.py` says what is what."""
        num_samples, mean = self.num_samples(num_steps), self._stream.mean_length
        return {
            "rows": self._stream.num_rows,
            "source_rows": {name: len(rows) for name, rows in self._stream.sources.items()},
            "rows_judged": self._stream.num_judged,
            "rows_lost": self._stream.lost,
            "num_steps": num_steps,
            "samples": num_samples,
            "epochs": round(num_samples / self._stream.num_rows, 3),
            "tokens": None if mean is None else round(num_samples * mean),
            "example": self._marked_example(),
        }

    def _marked_example(self) -> str | None:
        """The run's first sample that is used, marked; None: it is not among the first few."""
        for index in range(NUM_MARKED):
            found = self._stream.tokens(index, self._render)
            if not isinstance(found, Dropped):
                return marked_text(self._tokenizer, found[1])
        return None

    def log_end(self) -> None:
        """Say how often the steps up to here went through each source, and what was dropped.

        Every rank takes part.
        """
        self._log_sources(self._positions[self._step].cursor, f"made in {self._step}")
        dropped = self._dropped.gathered().said()
        if dropped and is_main():
            log_line(f"dropped or cut in this launch: {'; '.join(dropped)}")

    def _log_sources(self, num_samples: int, when: str) -> None:
        if is_main():
            for line in self._stream.describe(num_samples):
                log_line(f"{line} {when} steps")

    def _check_template(self) -> None:
        """Refuse a template by which every row would be rendered wrong."""

    def state_at(self, step: int) -> dict[str, Any]:
        """What a checkpoint keeps of the data, before a step is made."""
        position = self._positions[step]
        used = dict(sorted(position.used.items()))
        return {
            "cursor": position.cursor,
            "used": used,
            "skipped": list(self._skipped),
            **self._identity,
        }

    def resume(
        self, step: int, state: dict[str, Any], allowed: Collection[ResumeChange] = ()
    ) -> None:
        """Go on at a step.

        Raises:
            InputError: The data are not those of the checkpoint, and may not be others.
        """
        if state.keys() - {"skipped"} != {"cursor", "used", *self._identity}:
            raise InputError(
                "the checkpoint was saved by an earlier version, which counted other things than "
                "this one does: start with resume=never"
            )
        self._step = step
        self._positions = {step: Position(state["cursor"], Counter(state["used"]))}
        self._skipped = list(state.get("skipped", []))  # older checkpoints know of none
        self._write_skipped(self._skipped)  # as this launch has begun the file anew
        then = {name: state[name] for name in self._identity}
        changed = field_difference(then, self._identity)
        if not changed:
            return
        what = f"the data changed since the checkpoint was saved ({'; '.join(changed)})"
        # Rows that were mended, added or removed, of the same sources, read the same way.
        may_continue = _without_rows(then) == _without_rows(self._identity) and (
            self._data.on_change is OnChange["continue"]
        )
        require(
            may_continue or ResumeChange.data in allowed,
            f"{what}, so rows would be skipped or seen twice, or rendered otherwise: restore "
            "them, go on with mended rows from the same sample with data.on_change=continue (with "
            "any others: on_resume.allow=[data]), or start with resume=never",
        )
        if is_main():
            allows = "data.on_change=continue" if may_continue else "on_resume.allow=[data]"
            log_line(f"{what}, as {allows} allows: rows may be skipped or seen twice")


def groups_of(row: Row) -> list[str]:
    """Name the groups in which a row is counted, as `source_math`."""
    of_prompt = prompt_groups(row.category, row.language)
    return [group_name(f"source_{row.source}"), *of_prompt]


def _without_rows(identity: Mapping[str, Any]) -> dict[str, Any]:
    """The identity of data without what their rows say and how many there are."""
    mixture = {
        name: {key: value for key, value in source.items() if key != "rows"}
        for name, source in identity["mixture"].items()
    }
    return {**identity, "rows": None, "mixture": mixture}


class SFTLoader(_Loader):
    """Packed microbatches of conversations."""

    def __init__(
        self,
        data: DataConfig,
        stage: SFTConfig,
        tokenizer: Tokenizer,
        seed: int,
        quarantine: Path | None = None,
    ) -> None:
        """Open the sources, judge their rows, and look at the loss mask of the first.

        Args:
            data: Which sources.
            stage: Says what of them can be used.
            tokenizer: Of the run.
            seed: Of the order of samples.
            quarantine: Where rows at fault are written down. None: nowhere.

        Raises:
            InputError: A source cannot be read, too many of its rows are at fault or of no use, or
                the template does not mark what is to be learnt.
        """
        check_template_kwargs([tokenizer.chat_template], tokenizer.template_kwargs)
        self._stage = stage
        render = ExampleRenderer.of(tokenizer, data, stage.loss_tokens, stage.max_length)
        super().__init__(data, stage.global_batch_size, tokenizer, render, seed, quarantine)
        if stage.num_epochs is not None:
            self._num_samples = samples_of(stage.num_epochs, self.epoch_rows)
        self.num_steps = stage.total_steps(self.epoch_rows)

    def __iter__(self) -> Iterator[list[Microbatch]]:
        return self

    def __next__(self) -> list[Microbatch]:
        share = self._next_share()
        return pack_examples(
            [example for _, _, example in share],
            self._data.max_tokens_per_microbatch,
            samples=[index for index, _, _ in share],
        )

    def held_out(self) -> list[Microbatch]:
        """Pack this rank's share of the held-out conversations; empty without any.

        Raises:
            InputError: None of them can be used.
        """
        if self._data.held_out is None or self._stage.eval_every is None:
            return []
        examples = held_out_share(
            held_out_stream(self._data),
            self._stage.num_eval_examples,
            lambda _, row: self._render(row),
            self._render.limit,
        )
        return pack_examples(examples, self._data.max_tokens_per_microbatch)

    def _check_template(self) -> None:
        if self._stage.loss_tokens is LossTokens.assistant:
            first = map(self._stream.__getitem__, range(NUM_MARKED))
            found = [row for row in first if isinstance(row, Conversation)]
            said = check_marks(self._tokenizer, found)
            if said and is_main():
                log_line(said)


class PromptLoader(_Loader):
    """Prompts that await responses."""

    def __init__(
        self,
        data: DataConfig,
        stage: OPDConfig,
        tokenizer: Tokenizer,
        seed: int,
        quarantine: Path | None = None,
    ) -> None:
        """Open the sources and judge their rows; see `SFTLoader`."""
        self._prompts = PromptRenderer(
            tokenizer, stage.max_prompt_length, data.thinking, data.overlong
        )
        size = stage.global_batch_size
        super().__init__(data, size, tokenizer, self._prompts, seed, quarantine)
        if stage.whole_epochs is not None:
            self._num_samples = samples_of(stage.whole_epochs, self.epoch_rows)

    def __iter__(self) -> Iterator[list[Prompt]]:
        return self

    def __next__(self) -> list[Prompt]:
        return [make_prompt(index, row, example) for index, row, example in self._next_share()]

    @property
    def knows_all_groups(self) -> bool:
        """Whether `groups` are those of all rows, and not of a sample of a large source."""
        return self._stream.is_all_judged

    def groups(self) -> set[str]:
        """Names of the groups of rollouts that these prompts give, as `category_math`."""
        by_category = (prompt_groups(name, "") for name in self._stream.categories())
        by_language = (prompt_groups("", name) for name in self._stream.languages())
        return set(chain(*by_category, *by_language))

    def languages(self) -> set[str]:
        """Codes of the languages of the rows that were judged."""
        return self._stream.languages()

    def first(self, count: int) -> list[Prompt]:
        """Render this rank's share of the run's first `count` prompts; rows at fault are left out.

        The cursor stays where it is.

        Raises:
            InputError: There is none among the first samples.
        """
        found: list[Prompt] = []
        dropped = Tally(self._render.limit)
        for index in range(NUM_FIRST):
            if len(found) == count:
                break
            item = self._stream.tokens(index, self._render)
            if not isinstance(item, Dropped):
                found.append(make_prompt(index, *item))
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
            found, item = self._stream[index], self._stream.tokens(index, self._render)
            if isinstance(item, Dropped) or not isinstance(found, Conversation):
                continue
            if is_wanted(found):  # asked of those alone that are used
                yield self._prompts.prepared(found), make_prompt(index, *item)

    def held_out(self, count: int) -> list[Prompt]:
        """Render this rank's share of `count` held-out prompts; rows at fault are left out.

        Raises:
            InputError: There are none, or none of them can be used.
        """
        if count == 0:
            return []
        if self._data.held_out is None:
            raise InputError(
                "stage.cascade.*.early_switch measures the reverse KL on held-out prompts: "
                "set data.held_out.share or data.held_out.sources"
            )

        def render(index: int, row: UsableRow) -> Prompt | str:
            found = self._prompts(row)
            return found if isinstance(found, str) else make_prompt(index, row, found)

        return held_out_share(held_out_stream(self._data), count, render, self._prompts.limit)


def trained_stream(data: DataConfig, seed: int) -> ConversationStream:
    """Open the rows that are trained on; an epoch is as many samples as there are.

    Args:
        data: Names them, and those that are held out of them.
        seed: Of the order of samples.

    Raises:
        InputError: A source cannot be opened, or there are no rows.
    """
    share = None if data.held_out is None else data.held_out.share
    return ConversationStream(data.sources, data.num_rows, seed, share)


def held_out_stream(data: DataConfig) -> ConversationStream:
    """Open the rows that are measured on and not trained on.

    Raises:
        InputError: There are none.
    """
    require(data.held_out is not None, "no rows are held out: set data.held_out.share or sources")
    assert data.held_out is not None
    if data.held_out.share is None:
        return ConversationStream(data.held_out.sources, None, seed=0)
    return ConversationStream(data.sources, None, 0, data.held_out.share, is_held_out=True)


def held_out_share(
    stream: ConversationStream,
    count: int,
    render: Callable[[int, UsableRow], T | str],
    limit: str,
) -> list[T]:
    """Render this rank's share of the first held-out samples; of a share of the rows, each once.

    Args:
        stream: The rows that are held out.
        count: Samples of all ranks.
        render: Makes of a sample what is measured on, or names the metric that counts it.
        limit: On the length of a row, as stage.max_length=256.

    Raises:
        InputError: None of them can be used.
    """
    dropped = Tally(limit)
    count = min(count, stream.num_rows) if stream.is_held_out else count
    kept = []
    for index in range(rank(), count, world_size()):
        found = stream.rendered(index, render)
        if isinstance(found, Dropped):
            dropped.add(found)
            stream.name_malformed(found)
        else:
            kept.append(found)
    num_kept, *drops = reduce_sums([len(kept), *map(dropped.count, DROPS)])
    if num_kept == 0:
        raise dropped.gathered_refusal(f"none of {count} held-out rows")
    if sum(drops) > 0 and is_main():
        said = ", ".join(
            f"{n:.0f} {name}{over(name, limit)}" for n, name in zip(drops, DROPS, strict=True) if n
        )
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
    stream: ConversationStream,
    count: int,
    max_prompt_length: int,
    tokenizer: Tokenizer,
    thinking: Thinking = Thinking.keep,
) -> list[Question]:
    """Render the same questions on every rank; rows at fault are dropped. All ranks take part.

    Raises:
        InputError: None of them can be used, or the template reads not all of its arguments.
    """
    # Who is asked without what was said before answers another question.
    prompts = PromptRenderer(tokenizer, max_prompt_length, thinking, Overlong.drop)

    def render(index: int, row: UsableRow) -> Question | str:
        if not isinstance(row, Conversation) or not row.asked or row.asked == row.messages:
            raise InputError("the row is no question with its answer")
        tokens = prompts(row)
        if isinstance(tokens, str):
            return tokens
        answer = with_thinking(tokenizer, row, Thinking.strip).messages[-1]
        prompt = make_prompt(index, row, tokens)
        return Question(prompt, row.asked[-1].content, answer.content, row.verifier)

    check_template_kwargs([tokenizer.chat_template], tokenizer.template_kwargs)
    shares = gather_objects(held_out_share(stream, count, render, prompts.limit))
    return sorted(chain.from_iterable(shares), key=lambda question: question.prompt.index)


def make_prompt(index: int, row: Row, tokens: Example) -> Prompt:
    """Make the prompt of a sample from its tokens."""
    return Prompt(index, tokens.input_ids, row.source, row.category, row.language)
