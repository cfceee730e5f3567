"""Which rows a run sees."""

from dataclasses import dataclass, field
from enum import Enum
from fractions import Fraction
from typing import Any

from omegaconf import MISSING

from marco_train.errors import require, require_positive

AUTO = "auto"
"""The weight of a source that is as large as its rows make it."""


class SourceKind(Enum):
    """Where the rows of a source lie."""

    jsonl = "jsonl"
    parquet = "parquet"
    hub = "hub"


@dataclass(kw_only=True)
class SourceConfig:
    """One dataset of a mixture."""

    kind: SourceKind = MISSING
    path: str = MISSING
    """A file, or a repository of the hub."""
    subset: str | None = None
    """Configuration of a hub dataset. None: its default."""
    split: str = "train"
    """Split of a hub dataset."""
    category: str = MISSING
    # A number or `auto`; OmegaConf 2.3 fails to merge a union that stands in a dictionary's item.
    weight: Any = AUTO
    """Share of the mixture's samples, or `auto`: such sources divide what the others leave by their
    numbers of rows. Without `auto` the weights of a mixture sum to 1, beside it to less."""
    unique_prompts: bool = False
    """Keep the first row of each distinct prompt."""

    def __post_init__(self) -> None:
        if self.weight == AUTO:
            return
        require(
            isinstance(self.weight, float | int) and not isinstance(self.weight, bool),
            f"data.sources.*.weight is {self.weight!r}, and must be a share above 0, or {AUTO}",
        )
        require_positive("data.sources.*", weight=self.weight)


@dataclass(kw_only=True)
class DataConfig:
    """Which rows a run sees."""

    sources: dict[str, SourceConfig] = field(default_factory=dict)
    """Rows to train on; an evaluation needs none."""
    held_out: dict[str, SourceConfig] | None = None
    """Rows for held-out loss or evaluation. None: no held-out measure."""
    num_rows: int | None = None
    """Budget of rows (labels, in SFT): each source keeps its first weight * num_rows. What `auto`
    weighs is told from all rows, before they are cut. None: all rows."""
    max_tokens_per_microbatch: int = 16384
    """Tokens of one packed forward pass on one rank."""

    def __post_init__(self) -> None:
        require_positive(
            "data",
            num_rows=self.num_rows,
            max_tokens_per_microbatch=self.max_tokens_per_microbatch,
        )
        for name, mixture in (("sources", self.sources), ("held_out", self.held_out)):
            if not mixture:
                continue
            shares = [Fraction(str(s.weight)) for s in mixture.values() if s.weight != AUTO]
            total = sum(shares, Fraction(0))
            says = f"the weights of data.{name} sum to {float(total):.6g}, and must sum to"
            if len(shares) == len(mixture):
                require(abs(float(total - 1)) < 1e-6, f"{says} 1")
            else:
                require(total < 1, f"{says} less than 1: sources of weight {AUTO} get the rest")
