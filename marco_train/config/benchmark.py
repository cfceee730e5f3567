"""What a benchmark asks of a model."""

from dataclasses import dataclass, field
from difflib import get_close_matches
from functools import cache
from typing import Any

from omegaconf import MISSING, OmegaConf

from marco_train.config.data import open_names
from marco_train.config.paths import CONFIG_DIR
from marco_train.config.rollout import RolloutConfig, VLLMRolloutConfig
from marco_train.config.stage import UntrainedStageConfig
from marco_train.errors import InputError, require, require_positive

BENCHMARK_DIR = CONFIG_DIR / "benchmark"
PREFIX = "marco_"
"""Of our tasks' names in lm-eval."""
FIXTURE = "fixture"
CARD, CARD_LITE = "card", "card_lite"
LITE_SHARE = 0.05
"""Of each subset's items, in `card_lite`."""


@dataclass(frozen=True)
class CardRow:
    """A row of the model card."""

    name: str
    task: str
    section: str
    metric: str
    published: dict[str, float]
    """Per cent or BLEU, by model."""


@cache
def card_rows() -> dict[str, CardRow]:
    """The rows of the model card in its order, by the tasks that measure them."""
    card: Any = OmegaConf.to_container(OmegaConf.load(BENCHMARK_DIR / "card.yaml"))
    found = [
        CardRow(
            name,
            row["task"],
            section,
            row["metric"],
            dict(zip(card["models"], row["published"], strict=True)),
        )
        for section, rows in card["sections"].items()
        for name, row in rows.items()
    ]
    return {row.task: row for row in found}


def sections() -> dict[str, list[str]]:
    """Names of the card's rows, by section."""
    found: dict[str, list[str]] = {}
    for row in card_rows().values():
        found.setdefault(row.section, []).append(row.name)
    return found


def suites() -> dict[str, list[str]]:
    """Tasks of each suite, in the order of the card."""
    rows = card_rows()
    every = list(rows)
    by_section = {
        section: [task for task, row in rows.items() if row.section == section]
        for section in sections()
    }
    return {CARD: every, CARD_LITE: every, FIXTURE: every, **by_section}


def tasks_of(suite: str) -> list[str]:
    """Tasks that a suite or a list of tasks names, in the order of the card.

    Raises:
        InputError: A name is unknown; says which is meant.
    """
    known = suites()
    if suite in known:
        return known[suite]
    names = [name.strip().removeprefix(PREFIX) for name in suite.split(",")]
    for name in names:
        if name not in card_rows():
            near = get_close_matches(name, [*known, *card_rows()], n=1)
            meant = f"did you mean {near[0]}? " if near else ""
            raise InputError(
                f"stage.suite names {name!r}, which is no suite and no task: {meant}Suites are "
                f"{', '.join(known)}; tasks, joined by commas, are {', '.join(card_rows())}"
            )
    return [task for task in card_rows() if task in names]


@dataclass(kw_only=True)
class BenchmarkConfig(UntrainedStageConfig):
    """The card's benchmarks, asked of one model."""

    suite: str = MISSING
    """card, its sections english, multilingual and cultural, card_lite (5 % of each subset's
    items), fixture (made-up items that come with the package), or tasks joined by commas."""
    data_dir: str | None = None
    """Directory with a folder for each set that is read from files. None: the hub."""
    data_dirs: dict[str, str] = field(default_factory=open_names)
    """Folders of single sets, by the name of their mirror, as `cmmlu`."""
    languages: list[str] | None = None
    """Codes of the languages to ask in. None: all of the card's that a set has."""
    responses_per_prompt: int | None = None
    """None: as many as the card's, 8, or 1 of GlobalMMLU and MMMLU."""
    max_prompt_length: int = 4096
    """Tokens. A longer question is not asked, and counts as answered wrong."""
    max_response_length: int = 8192
    """Tokens, as on the card; fewer where the model's positions leave fewer."""
    plan: bool = False
    """Whether to say what would be asked and how long it would take, and end there."""
    plan_gpus: int | None = None
    """GPUs of the plan. None: those of this launch."""
    plan_gpu: str | None = None
    """Their kind, as h100-80. None: that of this launch."""
    identify_languages: bool = True
    """Whether to report the share of items whose first answer is in the language of the item, or of
    the translation, where the package for it is installed."""
    rollout: RolloutConfig = MISSING

    @property
    def leaves_files(self) -> bool:
        """Whether anything is written: nothing by a plan."""
        return not self.plan

    def __post_init__(self) -> None:
        super().__post_init__()
        tasks_of(self.suite)
        self.data_dirs = dict(self.data_dirs)
        require_positive(
            "stage",
            responses_per_prompt=self.responses_per_prompt,
            max_prompt_length=self.max_prompt_length,
            max_response_length=self.max_response_length,
            plan_gpus=self.plan_gpus,
        )
        require(
            not self.rollout.replay_routing,
            "stage.rollout.replay_routing is true, and a benchmark makes no update that could take "
            "the sampler's experts: set it to false",
        )
        require(
            not (isinstance(self.rollout, VLLMRolloutConfig) and self.rollout.expert_parallel),
            "stage.rollout.expert_parallel is true, and in a benchmark each rank samples alone: "
            "set it to false",
        )
        require(
            self.suite != FIXTURE or (self.data_dir is None and not self.data_dirs),
            "stage.suite is fixture, whose items come with the package, and stage.data_dir or "
            "stage.data_dirs names others: leave them out, or choose another suite",
        )

    @property
    def num_sampler_topk(self) -> int:
        """How many likeliest tokens the sampler has to name in each place: none are scored."""
        return 0
