"""A benchmark's task: which set it reads, and the items that it makes of the rows.

    configs/benchmark/tasks/<task>.yaml -> TaskSet -> rows of its files or of the hub -> items

The YAML files are lm-eval's, which calls `load` for the items of a task; what is ours stands in
their `metadata.set`. This module does not know it.
"""

import ast
import math
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from difflib import get_close_matches
from enum import Enum
from functools import cache
from hashlib import blake2b
from pathlib import Path
from random import Random
from typing import Any

import yaml

from marco_train.config.benchmark import BENCHMARK_DIR, FIXTURE, tasks_of
from marco_train.errors import InputError, require
from marco_train.evaluation.benchmark.extraction import LETTERS, boxed, plain_number
from marco_train.evaluation.benchmark.mirrors import SetRows, subsets_of

MAX_FAULTY = 0.01
"""Share of a set's rows whose key points nowhere, beyond the first 10."""
LANGUAGES = {
    "ar": "Arabic",
    "az": "Azerbaijani",
    "bn": "Bengali",
    "cs": "Czech",
    "de": "German",
    "el": "Greek",
    "en": "English",
    "es": "Spanish",
    "fr": "French",
    "he": "Hebrew",
    "hu": "Hungarian",
    "id": "Indonesian",
    "it": "Italian",
    "ja": "Japanese",
    "kk": "Kazakh",
    "ko": "Korean",
    "ms": "Malay",
    "ne": "Nepali",
    "nl": "Dutch",
    "pl": "Polish",
    "pt": "Portuguese",
    "ro": "Romanian",
    "ru": "Russian",
    "th": "Thai",
    "tr": "Turkish",
    "uk": "Ukrainian",
    "ur": "Urdu",
    "vi": "Vietnamese",
    "zh": "Chinese",
}
"""The model card's 29, and what prompts call them."""
PLACEHOLDER = re.compile(r"\{\{(\w+)\}\}")
CHOICE_PREFIX = re.compile(r"^\s*\(?[A-Ja-j]\s*[.):]\s*")


class Kind(Enum):
    """How an answer is read and judged."""

    choice = "choice"
    number = "number"
    formula = "formula"
    translation = "translation"
    # Of one's own rows alone.
    exact = "exact"
    regex = "regex"
    json_schema = "json_schema"
    python = "python"
    # Of held-out rows: as the row's own verifier says.
    row = "row"


class AnswerForm(Enum):
    """What the answer's column holds.

    index: the number of a choice, from 0; letter: its letter; first: the first choice is right, and
    choices are shuffled by the item's own seed; hashes: text that ends in `#### 72`; boxed: text
    with the answer in a LaTeX box; plain: the answer.
    """

    index = "index"
    letter = "letter"
    first = "first"
    hashes = "hashes"
    boxed = "boxed"
    plain = "plain"


class Access(Enum):
    """Who gets the rows, and how.

    open: anybody fetches them; gated: the terms have to be accepted at the hub; script: the hub
    holds a program that makes the rows, which is not run, so that their files are needed.
    """

    open = "open"
    gated = "gated"
    script = "script"


@dataclass(frozen=True, kw_only=True)
class TaskSet:
    """The set of a task, as `metadata.set` of its YAML gives it."""

    row: str
    """Of the model card."""
    mirror: str
    """Folder of its files below `data_dir`."""
    path: str
    """Repository of the hub."""
    revision: str | None
    licence: str
    kind: Kind
    prompt: str
    """File of `configs/benchmark/prompts`, without its ending."""
    subsets: Mapping[str, Sequence[str]]
    """Configurations of the set, or patterns of their names, by language."""
    columns: Mapping[str, str | Sequence[str]]
    """Columns by what they are to the prompt; those that end in ? may be absent or empty.
    `choices` is a column or a list of them; others than question, choices and answer are named by
    the prompt."""
    splits: Sequence[str] = ("test",)
    """Read one after the other; the group of an item is its split where there are several."""
    access: Access = Access.open
    answer: AnswerForm = AnswerForm.plain
    prefixed_choices: bool = False
    """Whether choices begin with their letter, as (A) or A."""
    no_choice: str | None = None
    """Text that stands where a row has no further choice, beside empty ones."""
    skip_if: str | None = None
    """Column that is true in rows to leave out."""
    into_english: bool = False
    """Of a translation: whether English is what it is made into."""
    source_subset: str | None = None
    """Of a translation whose sides are sets of their own: the English one's."""
    weights: Mapping[str, float] = field(default_factory=dict)
    """Of groups, in a mean that is reported beside the row's."""

    @classmethod
    def of(cls, given: Mapping[str, Any]) -> "TaskSet":
        """Make it of a YAML's mapping.

        Raises:
            TypeError: A field is missing or unknown.
        """
        known = dict(given)
        for name, kind in (("kind", Kind), ("access", Access), ("answer", AnswerForm)):
            if name in known:
                known[name] = kind(known[name])
        return cls(**known)

    @property
    def column_names(self) -> dict[str, bool]:
        """Columns that are read, with whether a row has to have them."""
        names: dict[str, bool] = {}
        for column in self.columns.values():
            for name in [column] if isinstance(column, str) else column:
                names[name.removesuffix("?")] = not name.endswith("?")
        if self.skip_if is not None:
            names[self.skip_if] = True
        return names


class Items(list[dict[str, Any]]):
    """The items of a task, as lm-eval takes the rows of a split.

    Each has `id` (the same wherever the set lies), `language`, `group`, `kind`, `question` (as the
    set has it), `prompt` (what the user says), `gold`, `choices` (empty where there are none),
    `weight` (of its group), and of a translation `target_language`.
    """

    num_faulty: int = 0
    """Rows left out as their key points nowhere."""
    left_out: str = ""
    """How many those are of how many rows, and why; empty where there are none."""

    @property
    def features(self) -> dict[str, None]:
        """Names of what every item has; lm-eval looks for the columns of a template here."""
        return dict.fromkeys(self[0])

    def first(self, count: int | None) -> "Items":
        """At most so many of them, chosen by their ids. None: all."""
        if count is None or count >= len(self):
            return self
        found = Items(_chosen(self, count))
        found.num_faulty, found.left_out = self.num_faulty, self.left_out
        return found


def load(
    *,
    set: Mapping[str, Any],  # the key of the YAML's metadata
    data_dir: str | None = None,
    data_dirs: Mapping[str, str] | None = None,
    languages: Sequence[str] | None = None,
    share: float | None = None,
    max_items: int | None = None,
    is_partial: bool = False,
    data_dir_is: str | None = None,
    **_: Any,
) -> dict[str, Items]:
    """Load the items of a task, under `test`; lm-eval calls it with the metadata of its YAML.

    Args:
        set: What `TaskSet` says.
        data_dir: Directory with a folder for each set that has local files.
        data_dirs: Folders of single sets, by the names of their mirrors.
        languages: Codes to keep. None: all of the set's.
        share: Of the items, the same in each subset, chosen by their ids. None: all.
        max_items: Most items, chosen by their ids. None: all.
        is_partial: Whether subsets may be missing, as in the fixtures.
        data_dir_is: What a user calls `data_dir`. None: a field of the stage.

    Raises:
        InputError: Rows are not there, or are not what the set should hold; says how to get them.
    """
    task_set = TaskSet.of(set)
    rows = SetRows.of(task_set, data_dir, data_dirs or {}, data_dir_is)
    items, num_items = Items(), 0
    for language, patterns in task_set.subsets.items():
        if languages is not None and language not in languages:
            continue
        for subset in subsets_of(rows, patterns, is_partial=is_partial):
            found = list(_items_of(task_set, rows, language, subset, items))
            num_items += len(found)
            items += found if share is None else _share_of(found, share)
    wanted = f" in the languages {', '.join(languages)}" if languages is not None else ""
    require(
        bool(items),
        f"{task_set.row} has no items{wanted}: its languages are {', '.join(task_set.subsets)}",
    )
    if items.num_faulty:
        num_rows = num_items + items.num_faulty
        items.left_out = (
            f"{items.num_faulty:,} of {num_rows:,} rows left out: their key points to no choice, "
            "or is no answer"
        )
    return {"test": items.first(max_items)}


def _share_of(items: list[dict[str, Any]], share: float) -> list[dict[str, Any]]:
    """A share of a subset's items, one at least, that does not depend on others."""
    return _chosen(items, math.ceil(share * len(items)))


def _chosen(items: list[dict[str, Any]], count: int) -> list[dict[str, Any]]:
    """So many items, the same whatever others there are, in their order."""
    chosen = {item["id"] for item in sorted(items, key=lambda item: _seed_of(item["id"]))[:count]}
    return [item for item in items if item["id"] in chosen]


def _seed_of(identifier: str) -> int:
    return int.from_bytes(blake2b(identifier.encode(), digest_size=8).digest(), "big")


def _items_of(
    task_set: TaskSet, rows: "SetRows", language: str, subset: str, items: Items
) -> Iterator[dict[str, Any]]:
    """Make the items of one subset; counts what is left out in `items`."""
    if task_set.kind is Kind.translation:
        yield from _translations(task_set, rows, language, subset)
        return
    num_rows = num_faulty = num_unlabelled = 0
    has_labels = "answer" in task_set.columns
    for split in task_set.splits:
        for number, row in enumerate(rows.read(subset, split)):
            if task_set.skip_if is not None and _is_true(row[task_set.skip_if]):
                continue
            num_rows += 1
            identifier = f"{language}/{subset}/{split}/{number}"
            num_unlabelled += has_labels and _is_empty(_cell(task_set, row, "answer"))
            made = _item(task_set, row, identifier)
            if made is None:
                num_faulty += 1
                continue
            group = split if len(task_set.splits) > 1 else subset
            head = {"id": identifier, "language": language, "group": group}
            weight = float(task_set.weights.get(group, 1.0))
            yield {**head, "kind": task_set.kind.value, "weight": weight, **made}
    require(
        num_rows == 0 or num_unlabelled < num_rows,
        f"{task_set.row}: no row of {subset!r}, split {'/'.join(task_set.splits)}, has an answer: "
        "the labels of this split are not published where these files come from; give the files of "
        "one that has them, as C-Eval's split val",
    )
    require(
        num_faulty <= 10 or num_faulty <= MAX_FAULTY * num_rows,
        f"{task_set.row}: the key of {num_faulty} of {num_rows} rows of {subset!r} points to no "
        "choice, or is no answer: are these the files of this set? See its task in "
        "configs/benchmark/tasks",
    )
    items.num_faulty += num_faulty


def _item(task_set: TaskSet, row: Mapping[str, Any], identifier: str) -> dict[str, Any] | None:
    """What an item is beside where it comes from; None: its key points nowhere."""
    named = {name: _text(_cell(task_set, row, name)) for name in task_set.columns}
    question = named["question"]
    if task_set.kind is Kind.choice:
        choices = _choices(task_set, row)
        answer = _text(_cell(task_set, row, "answer"))
        if task_set.answer is AnswerForm.first:
            right = choices[0] if choices else ""
            Random(_seed_of(identifier)).shuffle(choices)
            gold = LETTERS[choices.index(right)] if choices else ""
        elif task_set.answer is AnswerForm.index:
            is_index = answer.isdecimal() and int(answer) < len(choices)
            gold = LETTERS[int(answer)] if is_index else ""
        else:
            gold = answer.strip("(). ").upper()
        if not choices or len(gold) != 1 or gold not in LETTERS[: len(choices)]:
            return None
        prompt = render(task_set.prompt, named | {"options": options_of(choices)})
        return {"question": question, "prompt": prompt, "gold": gold, "choices": choices}
    gold = _gold(task_set.answer, named["answer"])
    if not gold:
        return None
    prompt = render(task_set.prompt, named)
    return {"question": question, "prompt": prompt, "gold": gold, "choices": []}


def options_of(choices: Sequence[str]) -> str:
    """Choices as a question names them, a line each."""
    return "\n".join(f"{letter}. {text}" for letter, text in zip(LETTERS, choices, strict=False))


def _gold(form: AnswerForm, answer: str) -> str:
    """The reference of a number or formula; empty where there is none."""
    match form:
        case AnswerForm.hashes:
            _, mark, number = answer.rpartition("####")
            return plain_number(number.strip()) if mark else ""
        case AnswerForm.boxed:
            return boxed(answer) or ""
    return answer.strip().strip("$").strip()


def _choices(task_set: TaskSet, row: Mapping[str, Any]) -> list[str]:
    """Texts of a row's choices; those that are empty at the end are none."""
    columns = task_set.columns["choices"]
    if isinstance(columns, str):
        found: Any = row[columns]
        if isinstance(found, str) and found.lstrip().startswith("["):
            found = ast.literal_eval(found)
        elif isinstance(found, str):
            found = found.strip().split("\n")
    else:
        found = [row.get(column.removesuffix("?")) for column in columns]
    texts = [_text(each) for each in found]
    while texts and texts[-1] in ("", task_set.no_choice):
        texts.pop()
    return [CHOICE_PREFIX.sub("", text) for text in texts] if task_set.prefixed_choices else texts


def _cell(task_set: TaskSet, row: Mapping[str, Any], name: str) -> Any:
    column = task_set.columns.get(name)
    return row.get(column.removesuffix("?")) if isinstance(column, str) else None


def _text(value: Any) -> str:
    if isinstance(value, float) and value.is_integer():  # of a column with gaps
        value = int(value)
    return "" if _is_empty(value) else str(value).strip()


def _is_empty(value: Any) -> bool:
    return value is None or (isinstance(value, float) and math.isnan(value)) or value == ""


def _is_true(value: Any) -> bool:
    return str(value).strip().lower() in {"1", "1.0", "true"}


def _translations(
    task_set: TaskSet, rows: "SetRows", language: str, subset: str
) -> Iterator[dict[str, Any]]:
    """Make the items of a pair of languages, English and another."""
    (split,) = task_set.splits
    pairs: Iterator[tuple[str, str]] | zip[tuple[str, str]]
    if task_set.source_subset is None:
        kept = (
            row
            for row in rows.read(subset, split)
            if task_set.skip_if is None or not _is_true(row[task_set.skip_if])
        )
        pairs = (
            (_text(_cell(task_set, row, "source")), _text(_cell(task_set, row, "target")))
            for row in kept
        )
    else:
        sides = [
            [_text(_cell(task_set, row, "text")) for row in rows.read(side, split)]
            for side in (task_set.source_subset, subset)
        ]
        require(
            len(sides[0]) == len(sides[1]),
            f"{task_set.row}: {task_set.source_subset!r} has {len(sides[0])} sentences and "
            f"{subset!r} has {len(sides[1])}, and they should be the same ones: fetch both again",
        )
        pairs = zip(*sides, strict=True)
    for number, (english, other) in enumerate(pairs):
        source, target = (other, english) if task_set.into_english else (english, other)
        codes = (language, "en") if task_set.into_english else ("en", language)
        names = {"source_language": LANGUAGES[codes[0]], "target_language": LANGUAGES[codes[1]]}
        yield {
            "id": f"{language}/{subset}/{split}/{number}",
            "language": language,
            "group": subset,
            "kind": task_set.kind.value,
            "weight": 1.0,
            "question": source,
            "prompt": render(task_set.prompt, {"text": source, **names}),
            "gold": target,
            "choices": [],
            "target_language": codes[1],
        }


def render(prompt: str, values: Mapping[str, str]) -> str:
    """Fill a prompt's file; lines that only hold what is empty are left out.

    Raises:
        KeyError: The prompt names something that the set has not.
    """
    return fill(prompt_text(prompt), values)


def fill(text: str, values: Mapping[str, str]) -> str:
    """Put values in the places of a prompt that name them; see `render`."""
    lines = []
    for line in text.splitlines():
        names = PLACEHOLDER.findall(line)
        if names and not any(values[name] for name in names):
            continue
        lines.append(PLACEHOLDER.sub(lambda found: values[found[1]], line))
    return "\n".join(lines)


@cache
def prompt_text(name: str) -> str:
    """The text of a prompt's file."""
    return (BENCHMARK_DIR / "prompts" / f"{name}.txt").read_text(encoding="utf-8").rstrip("\n")


@cache
def task_set_of(task: str) -> Mapping[str, Any]:
    """What `metadata.set` of a task's file says."""

    class Loader(yaml.SafeLoader):  # type: ignore[misc]
        """Takes functions by their names."""

    Loader.add_constructor("!function", Loader.construct_scalar)
    file = BENCHMARK_DIR / "tasks" / f"{task}.yaml"
    said = Loader(file.read_text(encoding="utf-8")).get_single_data()
    return dict(said["metadata"]["set"])


def where_of(
    suite: str, data_dir: str | None = None, data_dirs: Mapping[str, str] | None = None
) -> dict[str, Any]:
    """Arguments of `load` that say where a suite's rows lie."""
    if suite == FIXTURE:
        return {"data_dir": str(BENCHMARK_DIR / FIXTURE), "is_partial": True}
    return {"data_dir": data_dir, "data_dirs": dict(data_dirs or {})}


def check_access(tasks: Sequence[str], where: Mapping[str, Any]) -> None:
    """Refuse tasks whose rows cannot be read where they should be, before any is read.

    Raises:
        InputError: Names them all, and how their rows are got.
    """
    data_dir = where.get("data_dir")
    require(
        data_dir is None or Path(data_dir).is_dir(),
        f"{where.get('data_dir_is') or 'stage.data_dir'}: there is no directory {data_dir!r}",
    )
    refused = []
    for task in tasks:
        task_set = TaskSet.of(task_set_of(task))
        try:
            SetRows.of(
                task_set,
                data_dir,
                where.get("data_dirs") or {},
                where.get("data_dir_is"),
            )
        except InputError as error:
            refused.append(str(error))
    require(not refused, "\n       ".join(refused))


def check_languages(tasks: Sequence[str], languages: Sequence[str] | None) -> None:
    """Refuse languages that tasks have no items in, before any is read.

    Raises:
        InputError: Names the tasks that have them, or the codes that are known.
    """
    if languages is None:
        return
    for code in languages:
        near = get_close_matches(code, LANGUAGES, n=1)
        meant = f"did you mean {near[0]}? " if near else ""
        require(
            code in LANGUAGES,
            f"stage.languages names {code!r}, which is none of the card's: {meant}Known are "
            f"{', '.join(LANGUAGES)}",
        )
    with_them = [task for task in tasks if set(languages) & set(task_set_of(task)["subsets"])]
    without = [task for task in tasks if task not in with_them]
    ask = f"suite={','.join(with_them)}" if with_them else "another suite"
    require(
        not without,
        f"stage.languages is {', '.join(languages)}, and {', '.join(without)} "
        f"{'has' if len(without) == 1 else 'have'} no items in them: choose {ask}",
    )


def questions_of(
    suite: str, data_dir: str | None = None, data_dir_is: str | None = None
) -> Iterator[tuple[str, str]]:
    """Questions and sentences of a suite, each with the name of its row.

    Args:
        suite: Of the card.
        data_dir: Directory with a folder for each set that has local files.
        data_dir_is: What a user calls it. None: a field of the stage.

    Raises:
        InputError: The rows of a task cannot be read.
    """
    where = where_of(suite, data_dir) | {"data_dir_is": data_dir_is}
    check_access(tasks_of(suite), where)
    for task in tasks_of(suite):
        task_set = task_set_of(task)
        for item in load(set=task_set, **where)["test"]:
            yield task_set["row"], item["question"]
