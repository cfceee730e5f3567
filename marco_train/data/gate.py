"""The gate: the rows of a run are judged before its first step.

Two passes over the rows of a source, shared by the ranks. *Structure*: is each row a chat, of which
shape, and which columns are not read. *Tokens*: what the template and the stage's limits make
of it; the token ids are kept, so that nothing is tokenised twice. Both are kept under the source's
digest. Of a large source a sample is judged, and the rest where it is drawn.
"""

import json
import random
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from marco_train.config.data import DataConfig
from marco_train.data.cache import digest_of, read_json, write_json
from marco_train.data.conversations import BadRow, Source
from marco_train.data.drops import MALFORMED, TOO_LONG, TRUNCATED, by_language, over
from marco_train.data.formats import ignored_columns
from marco_train.data.tokens import LostRows, Render, TokenFiles, render_row, token_files
from marco_train.data.turns import MOST_SHOWN
from marco_train.distributed import gather_objects, is_main, rank, world_size
from marco_train.errors import InputError
from marco_train.files import replaces

# Rows of a source that are judged first where it has more than `data.judge_rows`.
NUM_SAMPLED = 10_000
SEED = 0  # of the sample
# Rows at fault of a source that may be there whatever their share.
NUM_FORGIVEN = 10
# Kinds of fault that a refusal names.
NUM_NAMED = 5
# Columns that are not read of which the names are said.
NUM_COLUMNS_NAMED = 20
# Kinds of fault that other names of columns or roles may mend.
READ_OTHERWISE = {"unknown columns", "unknown role", "two shapes", "no list of turns"}
# What helps beside mending the rows, by the metric that counts them.
FIXES = {
    "data/dropped_no_loss": "name the column of the answer with "
    "data.sources.{name}.columns.response, ",
    TOO_LONG: "raise {limit}, cut them with data.overlong=truncate, ",
    "data/dropped_empty": "learn them with data.keep_empty_answers=true, ",
}


@dataclass
class Structure:
    """What the rows of a source are."""

    num_rows: int
    num_judged: int = 0
    shapes: Counter[str] = field(default_factory=Counter)
    categories: Counter[str] = field(default_factory=Counter)
    languages: Counter[str] = field(default_factory=Counter)
    ignored: Counter[str] = field(default_factory=Counter)
    """Columns that look like content and were not read."""
    bad: list[dict[str, Any]] = field(default_factory=list)
    """Rows at fault, as lines of the quarantine: source, row, kind, reason, begins."""

    @property
    def is_complete(self) -> bool:
        """Whether every row was judged."""
        return self.num_judged == self.num_rows

    @property
    def kinds(self) -> Counter[str]:
        """How many rows are at fault, by the kind of fault."""
        return Counter(row["kind"] for row in self.bad)

    @property
    def ignored_names(self) -> list[str]:
        """The columns of `ignored` that are named, those of most rows; in alphabetic order."""
        return sorted(name for name, _ in self.ignored.most_common(NUM_COLUMNS_NAMED))

    def add(self, other: "Structure") -> None:
        """Add what another rank found."""
        self.num_judged += other.num_judged
        self.bad += other.bad
        for mine, theirs in (
            (self.shapes, other.shapes),
            (self.categories, other.categories),
            (self.languages, other.languages),
            (self.ignored, other.ignored),
        ):
            mine.update(theirs)

    def as_json(self) -> dict[str, Any]:
        """What is kept of it."""
        return vars(self)

    @staticmethod
    def of_json(kept: Mapping[str, Any]) -> "Structure":
        """Read what was kept."""
        counters = ("shapes", "categories", "languages", "ignored")
        return Structure(**{**kept, **{name: Counter(kept[name]) for name in counters}})


def judged_rows(source: Source, cfg: DataConfig) -> Sequence[int]:
    """The rows of a source that are judged before the first step: all, or a sample of many.

    It is drawn, as rows of several kinds may come by turns, and the same at every launch.
    """
    if len(source) <= cfg.judge_rows:
        return range(len(source))
    count = min(NUM_SAMPLED, cfg.judge_rows)
    return sorted(random.Random(SEED).sample(range(len(source)), count))


def judge_structure(source: Source, cfg: DataConfig) -> Structure:
    """Judge what the rows of a source are; every rank takes part and gets the whole."""
    rows = judged_rows(source, cfg)
    name = f"structure-{digest_of(source.identity, len(source), len(rows))}"
    kept = gather_objects(read_json(name) if is_main() else None)[0]
    if kept is not None:
        found = Structure.of_json(kept)
    else:
        found = Structure(len(source))
        mine = rows[rank() :: world_size()]
        for part in gather_objects(_structure_of(source, shown_progress(mine, source.name))):
            found.add(part)
        found.bad.sort(key=lambda row: int(row["row"]))
        if is_main():
            write_json(name, found.as_json())
    for row in found.bad:
        row["source"] = source.name  # its name is no part of what is kept
    return found


def _structure_of(source: Source, rows: Iterator[int]) -> Structure:
    found = Structure(0)
    for index in rows:
        row, reading, columns = source.read(index)
        found.num_judged += 1
        if isinstance(row, BadRow):
            found.bad.append(vars(row))
            continue
        assert reading is not None
        found.shapes[reading.shape] += 1
        found.categories[row.category] += 1
        found.languages[row.language] += 1
        found.ignored.update(ignored_columns(columns, reading.used))
    return found


def shown_progress(rows: Sequence[int], name: str) -> Iterator[int]:
    """Go through rows with a bar, on the main rank and where it takes longer than a moment."""
    from tqdm import tqdm

    return iter(tqdm(rows, f"rows of {name}", delay=3, disable=not is_main()))


def check_bad_rows(name: str, found: Structure, cfg: DataConfig) -> None:
    """Refuse a source of which too many rows are at fault.

    Raises:
        InputError: Names the commonest kinds of fault, with the first row of each.
    """
    num_bad, allowed = len(found.bad), max(NUM_FORGIVEN, cfg.max_bad_rows * found.num_judged)
    is_mostly_bad = 2 * num_bad > found.num_judged and cfg.max_bad_rows < 0.5
    if num_bad <= allowed and not is_mostly_bad:
        return
    first = {row["kind"]: row for row in reversed(found.bad)}
    lines = [
        f"{count} {kind}, as row {first[kind]['row']} (from 0): {first[kind]['reason']}"
        for kind, count in found.kinds.most_common(NUM_NAMED)
    ]
    share = f"data.max_bad_rows={cfg.max_bad_rows:g}"
    bound = f"{share} allows"
    if num_bad <= allowed:
        bound = f"half of them, which {share} does not allow"
    elif allowed == NUM_FORGIVEN:
        bound = f"{share} allows beyond the first {NUM_FORGIVEN}, which are free"
    named = f"say with data.sources.{name}.columns and .roles how they are to be read, "
    raise InputError(
        f"source {name!r}: {num_bad} of {found.num_judged} rows are at fault, more than "
        f"{bound} ({'; '.join(lines)}): mend the rows, "
        f"{named if READ_OTHERWISE & found.kinds.keys() else ''}or raise data.max_bad_rows"
    )


def check_drawn_rows(
    name: str, found: Structure, num_drawn: int, num_bad: int, cfg: DataConfig
) -> None:
    """Refuse a source of which a sample was judged and too many of all rows seen are at fault.

    Args:
        name: Of the source.
        found: What the sample was.
        num_drawn: Rows that were drawn since the start.
        num_bad: How many of them are at fault.
        cfg: Says how many may be.

    Raises:
        InputError: They are more.
    """
    # The sample counts as well: of few rows the share is known too badly to end a run by it.
    num_rows, num_bad = found.num_judged + num_drawn, len(found.bad) + num_bad
    if num_bad <= max(NUM_FORGIVEN, cfg.max_bad_rows * num_rows):
        return
    raise InputError(
        f"source {name!r}: {num_bad} of {num_rows} rows are at fault, of {found.num_judged} that "
        f"were judged before the first step and {num_drawn} that were drawn since the start, more "
        f"than data.max_bad_rows={cfg.max_bad_rows:g} allows: mend the rows that are named above "
        "and go on with data.on_change=continue, or raise data.max_bad_rows"
    )


def judge_tokens(
    source: Source, cfg: DataConfig, render: Render, decided_by: Sequence[Any]
) -> tuple[TokenFiles | None, LostRows]:
    """Judge what the template and the stage make of a source's rows; every rank takes part.

    Args:
        source: Its rows, which `judge_structure` has seen.
        cfg: Of the run.
        render: Makes the tokens of a row.
        decided_by: All that `render` is a function of, as JSON.

    Returns:
        The tokens of all rows, where they are kept; and how many rows each metric would count.
    """
    rows = judged_rows(source, cfg)
    mine = rows[rank() :: world_size()]
    if len(rows) == len(source):
        name = digest_of(source.identity, len(source), decided_by)
        found, counted = token_files(source, shown_progress(mine, source.name), render, name)
        if counted is not None:
            return found, counted
    lost = LostRows()
    for index in shown_progress(mine, source.name):
        lost.add(index, render_row(source, index, render))
    total = LostRows()
    for share in gather_objects(lost):
        total.update(share)
    return None, total


def check_lost_rows(
    name: str, found: Structure, lost: LostRows, limit: str, cfg: DataConfig
) -> None:
    """Refuse a source of which the stage cannot use enough.

    Args:
        name: Of the source.
        found: What its rows are.
        lost: Those that the stage cannot use.
        limit: On the length of a row, as stage.max_length=256.
        cfg: Says how many may be lost.

    Raises:
        InputError: Says how many rows which metric would count.
    """
    num_lost, num_judged = sum(lost.counts.values()), found.num_judged
    if num_lost <= cfg.max_lost_rows * num_judged:
        return
    said = ", ".join(
        f"{count} {metric}{by_language(lost.languages.get(metric, {}))}{over(metric, limit)}"
        for metric, count in sorted(lost.counts.items())
    )
    if lost.reasons:
        said += f"; the first of those at fault: {lost.reasons[min(lost.reasons)]}"
    if found.ignored:
        said += f"; columns that are not read: {', '.join(found.ignored_names)}"
    fixes = "".join(fix for metric, fix in FIXES.items() if lost.counts[metric])
    raise InputError(
        f"source {name!r}: this stage can use {num_judged - num_lost} of {num_judged} rows, and "
        f"may lose a share of {cfg.max_lost_rows:g} ({said}): mend the rows, "
        f"{fixes.format(name=name, limit=limit.partition('=')[0])}or raise data.max_lost_rows"
    )


def describe(name: str, found: Structure, lost: LostRows, limit: str) -> list[str]:
    """Say what was found of a source, in a line or two; arguments as in `check_lost_rows`."""

    def languages(metric: str) -> str:
        return by_language(lost.languages.get(metric, {}))

    shapes = ", ".join(
        shape if count == found.num_judged - len(found.bad) else f"{shape} ({count:,})"
        for shape, count in found.shapes.most_common()
    )
    judged = "" if found.is_complete else f", of which {found.num_judged:,} were judged"
    bad = ", ".join(f"{kind} {count:,}" for kind, count in found.kinds.most_common())
    cut = lost.languages.get(TRUNCATED, Counter())
    lost_too = lost.counts - Counter({MALFORMED: len(found.bad)})  # which are counted there as well
    lines = [
        f"source {name!r}: {found.num_rows:,} rows{judged}, shape {shapes or 'none'}"
        + (f"; at fault: {bad}" if bad else "")
        + "".join(
            f"; {n:,} {metric}{languages(metric)}{over(metric, limit)}"
            for metric, n in sorted(lost_too.items())
        )
        + (f"; {cut.total():,} {TRUNCATED}{languages(TRUNCATED)}" if cut else "")
    ]
    if found.ignored:
        counts = [f"{column} ({found.ignored[column]:,})" for column in found.ignored_names]
        more = len(found.ignored) - len(counts)
        lines.append(
            f"source {name!r}: columns that hold something and are not read: {', '.join(counts)}"
            + (f", and {more:,} more" if more else "")
        )
    return lines


def unrendered(source: Source, found: Structure, lost: LostRows) -> list[dict[str, Any]]:
    """Rows that are chats and cannot be rendered, as lines of the quarantine."""
    known = {row["row"] for row in found.bad}
    lines = []
    for index, reason in sorted(lost.reasons.items()):
        row, _, columns = source.read(index)
        if row.row not in known:
            begins = repr(columns)[:MOST_SHOWN]
            lines.append(
                {"source": source.name, "row": row.row, "reason": reason, "begins": begins}
            )
    return lines


def write_quarantine(file: Path, rows: Sequence[Mapping[str, Any]]) -> None:
    """Write down rows at fault, one JSON object a line; without any there is no file."""
    if not rows:
        file.unlink(missing_ok=True)
        return
    file.parent.mkdir(parents=True, exist_ok=True)
    with replaces(file) as partial, partial.open("w", encoding="utf-8") as lines:
        lines.writelines(map(_line, rows))


def add_to_quarantine(file: Path, rows: Sequence[Mapping[str, Any]]) -> None:
    """Write down rows that were found at fault after the first step."""
    with file.open("a", encoding="utf-8") as lines:
        lines.writelines(map(_line, rows))


def _line(row: Mapping[str, Any]) -> str:
    kept = {key: row[key] for key in ("source", "row", "reason", "begins")}
    return json.dumps(kept, ensure_ascii=True) + "\n"
