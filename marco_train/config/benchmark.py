"""What a benchmark asks of a model: suites of the card's tasks, and rows of one's own."""

import re
from collections.abc import Collection
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
OWN = "own"
"""The suite and the task of one's own rows."""
HELD_OUT = "held_out"
"""The task of a run's held-out rows, which stage=evaluate asks."""
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


OWN_ROW, HELD_OUT_ROW = (CardRow(name, name, name, "Acc", published={}) for name in (OWN, HELD_OUT))


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


def row_of(task: str) -> CardRow:
    """The row that a task measures: of the card, of one's own rows, or of held-out ones."""
    return {OWN: OWN_ROW, HELD_OUT: HELD_OUT_ROW}.get(task) or card_rows()[task]


def sections() -> dict[str, list[str]]:
    """Names of the card's rows, by section."""
    found: dict[str, list[str]] = {}
    for row in card_rows().values():
        found.setdefault(row.section, []).append(row.name)
    return found


def reported(rows: Collection[str]) -> dict[str, list[str]]:
    """All rows of a report's sections, by section: the card's, or that of one's own rows."""
    return {OWN: [OWN_ROW.name]} if OWN_ROW.name in rows else sections()


def suites() -> dict[str, list[str]]:
    """Tasks of each suite, in the order of the card."""
    rows = card_rows()
    every = list(rows)
    by_section = {
        section: [task for task, row in rows.items() if row.section == section]
        for section in sections()
    }
    return {CARD: every, CARD_LITE: every, FIXTURE: every, OWN: [OWN], **by_section}


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
        require(
            name not in known,
            f"stage.suite is {suite!r}, and {name} is a suite, which cannot be joined with tasks "
            "or other suites: name it alone, or name tasks only",
        )
        if name not in card_rows():
            near = get_close_matches(name, [*known, *card_rows()], n=1)
            meant = f"did you mean {near[0]}? " if near else ""
            raise InputError(
                f"stage.suite names {name!r}, which is no suite and no task: {meant}Suites are "
                f"{', '.join(known)}; tasks, joined by commas, are {', '.join(card_rows())}"
            )
    return [task for task in card_rows() if task in names]


VERIFIERS = ("number", "choice", "exact", "regex", "math", "json_schema")
"""How answers to one's own rows are judged; a function is named as `python:module.function`."""
PYTHON = "python:"


@dataclass(kw_only=True)
class OwnRowsConfig:
    """A benchmark of one's own rows."""

    path: str | None = None
    """A file, a directory or a pattern of files (JSON lines or arrays, Parquet, Arrow), or a data
    set of the hub."""
    subset: str | None = None
    """Configuration of a set of the hub. None: its default."""
    split: str = "test"
    """Of a set of the hub, or of a directory whose files name splits."""
    question: str = "question"
    """Column of what is asked."""
    answer: str = "answer"
    """Column of the reference, whose form the verifier says."""
    verifier: str = "number"
    """number: the last number of the reference, or what stands behind its ####, against that of the
    answer; choice: a letter, the text of a choice or, as a number, its place from 0; exact: the
    text itself; regex: a pattern of Python that is found in the answer; math: a formula, by
    math-verify; json_schema: a schema that the answer satisfies as JSON;
    python:module.function: `function(response, reference)` says whether it is right. Of an answer
    to number, choice, math and exact the last \\boxed{} counts first."""
    choices: str | None = None
    """Column with the list of choices, which are asked as A, B, ... None: the question names
    them."""
    language: str | None = None
    """Column with the code of each row's language; the score is then the mean of the languages'
    scores. None: all rows are of one that is not named."""
    prompt: str | None = None
    """What is asked, with {{question}} and, where there are choices, {{options}} in it. None: the
    question, and for number, math and choice the card's own instruction to think and to box."""

    def check(self) -> None:
        """Refuse what cannot be read; rows and functions are looked at later.

        Raises:
            InputError: Says what to give.
        """
        require(
            self.path is not None,
            "stage's suite is own, and no rows are named: give own.path=<file> of the stage, with "
            "own.question and own.answer where its columns have other names",
        )
        function = self.verifier.removeprefix(PYTHON)
        is_named = function != self.verifier and re.fullmatch(r"\w+(\.\w+)+", function)
        near = get_close_matches(self.verifier, VERIFIERS, n=1)
        meant = f"did you mean {near[0]}? " if near else ""
        require(
            self.verifier in VERIFIERS or bool(is_named),
            f"own.verifier is {self.verifier!r}: {meant}Known are {', '.join(VERIFIERS)} and "
            f"{PYTHON}module.function",
        )
        require(
            self.choices is None or self.verifier == "choice",
            f"own.choices is {self.choices!r}, and own.verifier is {self.verifier}: choices are "
            "for own.verifier=choice",
        )
        asks = "{{question}}" if self.choices is None else "{{options}}"
        require(
            self.prompt is None or asks in self.prompt,
            f"own.prompt has no {asks} in it: each row would be asked the same",
        )


@dataclass(kw_only=True)
class SuiteConfig:
    """What a suite asks, from where, and how often."""

    own: OwnRowsConfig = field(default_factory=OwnRowsConfig)
    data_dir: str | None = None
    """Directory with a folder for each set that is read from files. None: the hub."""
    data_dirs: dict[str, str] = field(default_factory=open_names)
    """Folders of single sets, by the name of their mirror, as `cmmlu`."""
    languages: list[str] | None = None
    """Codes of the languages to ask in. None: all of the card's that a set has."""
    max_items: int | None = None
    """Most items of each task, chosen by their ids. None: all."""
    responses_per_prompt: int | None = None
    """The n of avg@n. None: as many as the card's, 8, or 1 of GlobalMMLU and MMMLU; 1 with
    `greedy`."""
    greedy: bool = False
    """Whether each token of an answer is the likeliest one, and not sampled at temperature 1."""

    def check_suite(self, suite: str) -> None:
        """Refuse a suite that cannot be asked so.

        Raises:
            InputError: Says why.
        """
        tasks = tasks_of(suite)
        self.data_dirs = dict(self.data_dirs)
        if OWN in tasks:
            self.own.check()
        require_positive(
            "stage", responses_per_prompt=self.responses_per_prompt, max_items=self.max_items
        )
        require(
            not self.greedy or self.responses_per_prompt in (None, 1),
            f"greedy answers are all the same, and responses_per_prompt is "
            f"{self.responses_per_prompt}: set greedy=false, or leave responses_per_prompt out",
        )
        require(
            suite != FIXTURE or (self.data_dir is None and not self.data_dirs),
            "stage.suite is fixture, whose items come with the package, and stage.data_dir or "
            "stage.data_dirs names others: leave them out, or choose another suite",
        )


@dataclass(kw_only=True)
class BenchmarkConfig(SuiteConfig, UntrainedStageConfig):
    """The card's benchmarks or one's own, asked of one model."""

    suite: str = MISSING
    """card, its sections english, multilingual and cultural, card_lite (5 % of each subset's
    items), fixture (made-up items that come with the package), own (rows of one's own), or tasks
    joined by commas."""
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
        self.check_suite(self.suite)
        require_positive(
            "stage",
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

    @property
    def num_sampler_topk(self) -> int:
        """How many likeliest tokens the sampler has to name in each place: none are scored."""
        return 0
