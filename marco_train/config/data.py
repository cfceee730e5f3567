"""Which rows a run sees."""

from dataclasses import dataclass, field
from enum import Enum

from omegaconf import MISSING

from marco_train.errors import require, require_positive


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
    weight: float = MISSING
    """Share of the mixture's samples; the weights of a mixture sum to 1."""
    unique_prompts: bool = False
    """Keep the first row of each distinct prompt."""

    def __post_init__(self) -> None:
        require_positive("data.sources.*", weight=self.weight)


@dataclass(kw_only=True)
class DataConfig:
    """Which rows a run sees."""

    sources: dict[str, SourceConfig] = field(default_factory=dict)
    """Rows to train on; an evaluation needs none."""
    held_out: dict[str, SourceConfig] | None = None
    """Rows for held-out loss or evaluation. None: no held-out measure."""
    num_rows: int | None = None
    """Budget of rows (labels, in SFT): each source keeps its first weight * num_rows.
    None: all rows."""
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
            total = sum(source.weight for source in mixture.values())
            require(
                abs(total - 1) < 1e-6,
                f"the weights of data.{name} sum to {total:.6g}, and must sum to 1",
            )
