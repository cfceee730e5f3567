"""A mixture of sources as one stream of samples, each a function of the seed and its index."""

from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, TypeVar

from marco_train.config.data import DataConfig, SourceConfig
from marco_train.data.conversations import BadRow, Source
from marco_train.data.drops import MALFORMED, Dropped
from marco_train.data.gate import (
    Structure,
    add_to_quarantine,
    check_bad_rows,
    check_drawn_rows,
    check_lost_rows,
    describe,
    judge_structure,
    judge_tokens,
    unrendered,
    write_quarantine,
)
from marco_train.data.mixture import Mixture, exact_weights
from marco_train.data.tokens import Render, TokenFiles, render_row
from marco_train.distributed import is_main
from marco_train.errors import require
from marco_train.tracking import log_line
from marco_train.types import Example, Row, UsableRow

T = TypeVar("T")

# Rows at fault that one rank names; the metric counts all.
MOST_NAMED = 20


class ConversationStream:
    """A mixture of sources, sampled by index."""

    def __init__(
        self,
        sources: Mapping[str, SourceConfig],
        num_rows: int | None,
        seed: int,
        held_out_share: float | None = None,
        is_held_out: bool = False,
    ) -> None:
        """Open the sources.

        Args:
            sources: By name.
            num_rows: Budget of rows over all of them. None: there is none.
            seed: Of the order of samples.
            held_out_share: Share of the rows of each that is held out. None: none is.
            is_held_out: Whether these are the rows that are held out, or the others.

        Raises:
            InputError: A source cannot be opened, or there are no rows.
        """
        self.is_held_out = is_held_out
        self.sources = {name: Source(name, cfg) for name, cfg in sorted(sources.items())}
        if held_out_share is not None:
            for source in self.sources.values():
                source.keep_part(held_out_share, is_held_out)
            # A source of one prompt has none to hold out.
            self.sources = {name: source for name, source in self.sources.items() if len(source)}
            require(
                len(self.sources) > 0,
                f"data.held_out.share is {held_out_share}, and no source has two prompts of which "
                "one could be held out: name rows under data.held_out.sources",
            )
        self._given_weights = {name: sources[name].weight for name in self.sources}
        weights = exact_weights(
            {name: sources[name].weight for name in self.sources},
            {name: len(source) for name, source in self.sources.items()},
        )
        if num_rows is not None:
            for name, source in self.sources.items():
                source.keep_first(max(1, round(num_rows * weights[name])))
        sizes = {name: len(source) for name, source in self.sources.items()}
        self._mixture = Mixture(sizes, weights, seed)
        self._named: set[tuple[str, int]] = set()
        self._quarantine: Path | None = None
        self._structures: dict[str, Structure] = {}
        self._token_files: dict[str, TokenFiles] = {}
        self._lost: Counter[str] = Counter()  # rows that were judged, by metric
        self._drawn: Counter[tuple[str, bool]] = Counter()  # of all ranks, as `fault_of` says

    def __getitem__(self, index: int) -> UsableRow | BadRow:
        source, row = self._mixture.sample(index)
        return self.sources[source][row]

    def judge(
        self,
        cfg: DataConfig,
        render: Render,
        decided_by: Sequence[Any],
        limit: str,
        quarantine: Path | None,
    ) -> None:
        """Judge the rows of all sources before any is used; see `gate`. Every rank takes part.

        Args:
            cfg: Says how many rows may be lost.
            render: Makes the tokens of a row, or names the metric that counts it as dropped.
            decided_by: All that `render` is a function of, as JSON.
            limit: On the length of a row, as stage.max_length=256.
            quarantine: Where rows at fault are written down. None: nowhere.

        Raises:
            InputError: Too many rows of a source are at fault, or of no use.
        """
        self._quarantine = quarantine
        for name, source in self.sources.items():
            self._structures[name] = judge_structure(source, cfg)
        at_fault = [row for structure in self._structures.values() for row in structure.bad]
        if quarantine is not None and is_main():
            write_quarantine(quarantine, at_fault)
        for name, structure in self._structures.items():
            check_bad_rows(name, structure, cfg)
        for name, source in self.sources.items():
            found, lost = judge_tokens(source, cfg, render, decided_by)
            if found is not None:
                self._token_files[name] = found
            self._lost.update(lost.counts)
            if is_main():
                for line in describe(name, self._structures[name], lost, limit):
                    log_line(line)
                at_fault += unrendered(source, self._structures[name], lost)
            if quarantine is not None and is_main():
                write_quarantine(quarantine, at_fault)
            check_lost_rows(name, self._structures[name], lost, limit, cfg)

    def place(self, index: int) -> tuple[str, int]:
        """Source of a sample, and its row's place among the rows of the dataset."""
        source, row = self._mixture.sample(index)
        return source, self.sources[source].place(row)

    def tokens(self, index: int, render: Render) -> tuple[Row, Example] | Dropped:
        """The tokens of a sample, unless it is dropped; `render` is what it was judged with."""
        source, row = self._mixture.sample(index)
        files = self._token_files.get(source)
        return files[row] if files is not None else render_row(self.sources[source], row, render)

    def rendered(self, index: int, render: Callable[[int, UsableRow], T | str]) -> T | Dropped:
        """Render a sample, unless it is dropped.

        Args:
            index: Of the sample.
            render: Gives the metric that counts the row instead, where it is to be dropped.
        """
        source, row = self._mixture.sample(index)
        found = render_row(self.sources[source], row, lambda found: render(index, found))
        return found if isinstance(found, Dropped) else found[1]

    @property
    def num_rows(self) -> int:
        """Rows of all sources."""
        return sum(map(len, self.sources.values()))

    @property
    def num_samples_of_all(self) -> int:
        """Samples after which every row of every source has been drawn."""
        return self._mixture.num_samples_of_all

    def name_malformed(self, drop: Dropped) -> None:
        """Say which rows are at fault, each once and the first of them only."""
        place = (drop.source, drop.row)
        if drop.metric != MALFORMED or place in self._named:
            return
        structure = self._structures.get(drop.source)
        if self._quarantine is not None and structure is not None and not structure.is_complete:
            begins = self.sources[drop.source].begins(drop.row)
            line = {"source": drop.source, "row": drop.row, "reason": drop.reason, "begins": begins}
            add_to_quarantine(self._quarantine, [line])
        if len(self._named) == MOST_NAMED:
            return
        self._named.add(place)
        log_line(f"dropped {drop.place}: {drop.reason}")
        if len(self._named) == MOST_NAMED:
            log_line(f"further rows at fault are not named; {MALFORMED} counts them")

    def fault_of(self, index: int, is_malformed: bool) -> tuple[str, bool] | None:
        """Say of which source a sample is, and whether its row is no chat.

        None where all rows of the source were judged before.
        """
        source, row = self._mixture.sample(index)
        if self._structures[source].is_complete:
            return None
        # A chat that the template refuses is of no use, and not at fault.
        return source, is_malformed and isinstance(self.sources[source][row], BadRow)

    def check_drawn(self, drawn: Counter[tuple[str, bool]], cfg: DataConfig) -> None:
        """Refuse a source of which too many rows are at fault, by those that were drawn.

        Args:
            drawn: What `fault_of` says of the samples of all ranks, beside those before.
            cfg: Says how many may be.

        Raises:
            InputError: They are more.
        """
        self._drawn += drawn
        for name in sorted({name for name, _ in drawn}):
            num_bad, num_good = self._drawn[name, True], self._drawn[name, False]
            check_drawn_rows(name, self._structures[name], num_bad + num_good, num_bad, cfg)

    def categories(self) -> set[str]:
        """Categories of the rows that were judged."""
        return {name for found in self._structures.values() for name in found.categories}

    def languages(self) -> set[str]:
        """Languages of the rows that were judged."""
        return {name for found in self._structures.values() for name in found.languages}

    @property
    def is_all_judged(self) -> bool:
        """Whether every row was judged."""
        return all(found.is_complete for found in self._structures.values())

    @property
    def num_judged(self) -> int:
        """Rows that were judged."""
        return sum(found.num_judged for found in self._structures.values())

    @property
    def lost(self) -> dict[str, int]:
        """How many of the rows that were judged no step will use, by metric."""
        return {name: count for name, count in sorted(self._lost.items()) if count}

    @property
    def mean_length(self) -> float | None:
        """Tokens of a sample in the mean; None where not all sources keep tokens."""
        if self._token_files.keys() != self.sources.keys():
            return None
        weights = self._mixture.weights
        return sum(float(weights[n]) * file.mean_length for n, file in self._token_files.items())

    def describe(self, num_samples: int) -> list[str]:
        """Say of each source how large it is and how often so many samples go through it."""
        weights, epochs = self._mixture.weights, self._mixture.epochs(num_samples)
        return [
            f"source {name!r}: {len(source)} rows, weight {float(weights[name]):.4g}, "
            f"{epochs[name]:.3g} epochs"
            for name, source in self.sources.items()
        ]

    def epoch(self, index: int) -> float:
        """How often the most repeated source has been walked through before `index`."""
        return max(self._mixture.epochs(index).values())

    def identity(self) -> dict[str, Any]:
        """Digest what the samples are a function of, beside the seed."""
        return {
            "rows": {name: source.fingerprint[:16] for name, source in self.sources.items()},
            "mixture": {
                name: {"rows": len(source), "weight": self._given_weights[name]}
                for name, source in self.sources.items()
            },
        }
