"""Which rows a run sees."""

from dataclasses import dataclass, field
from enum import Enum
from fractions import Fraction
from typing import Any

from omegaconf import MISSING, DictConfig

from marco_train.errors import require, require_positive

AUTO = "auto"
"""The weight of a source that is as large as its rows make it."""

ROLES = ("system", "user", "assistant", "tool")
"""Of a turn."""


class Thinking(Enum):
    """What becomes of an answer's thinking, between <think> tags or in a field of its own."""

    keep = "keep"
    strip = "strip"
    last = "last"


class Overlong(Enum):
    """What becomes of a row that is over the stage's limit of tokens."""

    drop = "drop"
    truncate = "truncate"


# `continue` is a word of Python, which only this way of writing an Enum takes for a name.
OnChange = Enum("OnChange", ["refuse", "continue"])
"""What a resumption does where rows are others than before."""


class SourceKind(Enum):
    """Where the rows of a source lie."""

    auto = "auto"
    jsonl = "jsonl"
    parquet = "parquet"
    hub = "hub"


def open_names() -> Any:
    """Names to which the command line adds others without `+`."""
    return DictConfig({}, key_type=str, element_type=str, flags={"struct": False})


@dataclass(kw_only=True)
class SourceConfig:
    """One dataset of a mixture."""

    kind: SourceKind = SourceKind.auto
    """`jsonl` and `parquet` are files; `auto` takes files where there are any, else the hub."""
    path: str = MISSING
    """A file, a directory or a pattern of files, or a repository of the hub."""
    subset: str | None = None
    """Configuration of a hub dataset. None: its default."""
    split: str = "train"
    """Split of a hub dataset."""
    revision: str | None = None
    """Commit, tag or branch of a hub dataset. None: the newest."""
    columns: dict[str, str] = field(default_factory=open_names)
    """Where a standard column (messages, prompt, response, ...) has another name: that name."""
    roles: dict[str, str] = field(default_factory=open_names)
    """What roles of other names are: system, user, assistant or tool."""
    licence: str | None = None
    """Of its rows, by the hub's name, as odc-by; for the card of the model. None: not known."""
    category: str = ""
    """Group of all its rows, in metrics and among teachers. Empty: none."""
    category_column: str | None = None
    """Column that names the group of a row instead, where it is not empty."""
    # A number or `auto`; OmegaConf 2.3 fails to merge a union that stands in a dictionary's item.
    weight: Any = AUTO
    """Share of the mixture's samples, or `auto`: such sources divide what the others leave by their
    numbers of rows. Without `auto` the weights of a mixture sum to 1, beside it to less."""
    unique_prompts: bool = False
    """Keep the first row of each distinct prompt, which is all that stands before the answer."""
    near_duplicates: float | None = None
    """Keep the first row of prompts that are this similar too: the share of their strings of five
    characters that they have in common (Jaccard). None: off."""

    def __post_init__(self) -> None:
        # Plain, where this is made in Python.
        self.columns, self.roles = dict(self.columns), dict(self.roles)
        if self.weight != AUTO:
            require(
                isinstance(self.weight, float | int) and not isinstance(self.weight, bool),
                f"data.sources.*.weight is {self.weight!r}, and must be a share above 0, or {AUTO}",
            )
            require_positive("data.sources.*", weight=self.weight)
        require(
            self.near_duplicates is None or 0 < self.near_duplicates <= 1,
            f"data.sources.*.near_duplicates is {self.near_duplicates}, and must be a share above "
            "0 and up to 1, or null",
        )
        for name, role in self.roles.items():
            require(
                role in ROLES,
                f"data.sources.*.roles maps {name!r} to {role!r}, and must map it to one of "
                f"{', '.join(ROLES)}",
            )


@dataclass(kw_only=True)
class HeldOutConfig:
    """Rows that are measured on and not trained on: sources of their own, or a share."""

    sources: dict[str, SourceConfig] = field(default_factory=dict)
    """Rows of their own."""
    share: float | None = None
    """Share of each of data.sources that is held out, by prompts: rows of one prompt lie all on
    one side. None: none is."""

    def __post_init__(self) -> None:
        require(
            self.share is None or 0 < self.share < 1,
            f"data.held_out.share is {self.share}, and must be a share between 0 and 1",
        )
        require(
            self.share is None or not self.sources,
            f"data.held_out.share is {self.share}, and data.held_out.sources names "
            f"{', '.join(self.sources)}: give one of them",
        )


@dataclass(kw_only=True)
class DataConfig:
    """Which rows a run sees."""

    path: str | None = None
    """Where the rows of data=own lie, as the `path` of a source."""
    sources: dict[str, SourceConfig] = field(default_factory=dict)
    """Rows to train on; an evaluation needs none."""
    held_out: HeldOutConfig | None = field(default_factory=HeldOutConfig)
    """Rows for held-out loss, for when a phase has converged, or for an evaluation. None, or
    neither sources nor a share: no held-out measure."""
    num_rows: int | None = None
    """Budget of rows (labels, in SFT): each source keeps its first weight * num_rows. What `auto`
    weighs is told from all rows, before they are cut. None: all rows."""
    max_tokens_per_microbatch: int = 16384
    """Tokens of one packed forward pass on one rank."""
    thinking: Thinking = Thinking.keep
    """`keep`: all of it, as far as the template shows it; `strip`: none; `last`: that of answers
    after the last question. An answer whose thinking is left out for that is not learnt."""
    keep_empty_answers: bool = False
    """Whether an answer without a word is learnt; else its row is dropped and counted."""
    overlong: Overlong = Overlong.drop
    """What becomes of a row over the stage's limit of tokens. `drop`: it is dropped and counted.
    `truncate`: SFT learns its first tokens; a prompt loses its oldest turns, behind the system
    turn, and is dropped where the last question is too long by itself."""
    max_bad_rows: float = 0.01
    """Share of a source's rows that may be at fault, beyond the first 10: of those that are judged
    before the first step, and of these with those that are drawn later."""
    max_lost_rows: float = 0.5
    """Share of a source's rows that the stage may be unable to use. 1: any."""
    judge_rows: int = 200_000
    """Rows of a source that are all judged before the first step; of more, a sample is."""
    on_change: OnChange = OnChange.refuse
    """`continue`: rows may be mended, added or removed between a checkpoint and its resumption."""

    def __post_init__(self) -> None:
        require_positive(
            "data",
            num_rows=self.num_rows,
            max_tokens_per_microbatch=self.max_tokens_per_microbatch,
            judge_rows=self.judge_rows,
        )
        for name in ("max_bad_rows", "max_lost_rows"):
            share = getattr(self, name)
            require(0 <= share <= 1, f"data.{name} is {share}, and must be a share from 0 to 1")
        # By all that it holds: a key beside the schema is refused later on.
        if self.held_out is not None and vars(self.held_out) == vars(HeldOutConfig()):
            self.held_out = None
        require(
            self.path is None or self.path in {source.path for source in self.sources.values()},
            f"data.path is {self.path!r}, and no source reads it: choose data=own",
        )
        held_out = self.held_out.sources if self.held_out is not None else {}
        for name, mixture in (("sources", self.sources), ("held_out.sources", held_out)):
            if not mixture:
                continue
            shares = [Fraction(str(s.weight)) for s in mixture.values() if s.weight != AUTO]
            total = sum(shares, Fraction(0))
            says = f"the weights of data.{name} sum to {float(total):.6g}, and must sum to"
            if len(shares) == len(mixture):
                require(abs(float(total - 1)) < 1e-6, f"{says} 1")
            else:
                require(total < 1, f"{says} less than 1: sources of weight {AUTO} get the rest")
