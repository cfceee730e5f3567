"""The card of a model: a README.md for the hub, of what its runs wrote and nothing else.

    run -> the runs that it goes on from -> front matter and sections -> Markdown

What no file tells is said to be not known.
"""

import re
import shutil
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from importlib.metadata import version
from itertools import pairwise
from pathlib import Path
from typing import Any

import yaml

from marco_train.config.benchmark import FIXTURE, sections
from marco_train.config.secrets import redacted
from marco_train.content import is_same
from marco_train.errors import InputError, require
from marco_train.evaluation.html import NOT_SHOWN, short
from marco_train.evaluation.run_files import RunFiles, read_object, read_run
from marco_train.evaluation.run_page import phases, summary_rows
from marco_train.files import replaces
from marco_train.hub import is_hub_id

CARD, DATA_CARD = "README.md", "DATA_CARD.md"
UNSAFE_IN_FILES = re.compile(r"[^\w.-]", re.ASCII)
NOT_KNOWN = "not known"
UPCYCLING = "upcycling.json"
COURSE = {"sft": "supervised fine-tuning", "opd": "on-policy distillation"}
"""Stages that train a model."""
DIGITS = 12  # of a digest
# The hub takes ISO 639 without what stands behind it.
CODE = re.compile(r"(?P<code>[a-z]{2,3})([-_].*)?", re.IGNORECASE)
FRONT_MATTER = re.compile(r"\A---\n(.*?)\n---\n", re.DOTALL)


def write_card(
    directory: Path,
    output: Path | None = None,
    benchmark: Path | None = None,
    licence: str | None = None,
) -> Path:
    """Write the card of a run's model, and beside it those of sets that were built for it.

    Args:
        directory: output_dir of the run that trained it last.
        output: None: in its export, or in the directory where there is none yet.
        benchmark: output_dir of a benchmark of the export. None: `benchmark` in the directory, if
            there is one.
        licence: Of the model, by the hub's name. None: what export.licence says.

    Returns:
        The file.

    Raises:
        InputError: One of the directories is none of a run that fits.
        OSError: The card cannot be written.
    """
    if output is None:
        export = directory / "export"
        output = (export if export.is_dir() else directory) / CARD
    if benchmark is None and (directory / "benchmark" / "benchmark.json").is_file():
        benchmark = directory / "benchmark"
    runs = lineage(directory)
    text = model_card(runs, benchmark, licence)
    for name, file in data_cards(runs).items():
        with replaces(output.parent / name) as partial:
            shutil.copyfile(file, partial)
    with replaces(output) as partial:
        partial.write_text(text, encoding="utf-8")
    return output


@dataclass(frozen=True)
class Start:
    """What a run's weights were at its start."""

    told: str
    """In a few words of Markdown."""
    hub_id: str | None = None
    """Of the hub, without its commit."""
    directory: str | None = None
    """That may hold a card of its own."""


def lineage(directory: Path) -> list[RunFiles]:
    """Read a run and those whose exports it goes on from, the first of them first.

    Raises:
        InputError: The directory is none of a run that trains a model.
    """
    found: list[RunFiles] = []
    seen: set[Path] = set()
    at: Path | None = directory
    while at is not None and at.resolve() not in seen:
        run = read_run(at)
        kind = run.config.get("stage", {}).get("kind")
        require(
            kind in COURSE,
            f"{str(at)!r} is no run that trained a model (its stage is {kind or NOT_KNOWN}): give "
            "the output_dir of one, and of a benchmark with --benchmark",
        )
        seen.add(at.resolve())
        found.insert(0, run)
        at = _run_before(run)
    return found


def _run_before(run: RunFiles) -> Path | None:
    """The directory of the run whose export this one began with; None: there is none here."""
    path = run.config.get("model", {}).get("path")
    if not isinstance(path, str) or not Path(path).name.startswith("export"):
        return None
    above = Path(path).parent
    if read_object(above / "config.json").get("stage", {}).get("kind") not in COURSE:
        return None
    return above


def model_card(runs: Sequence[RunFiles], benchmark: Path | None, licence: str | None) -> str:
    """Lay out the card.

    Args:
        runs: As `lineage` gives them.
        benchmark: output_dir of a benchmark of the last one's export. None: there is none.
        licence: Of the model, by the hub's name. None: what the last run's config says.

    Raises:
        InputError: The benchmark is of another model, or there is none in its directory.
    """
    last, start = runs[-1], start_of(runs[0])
    licence = licence or last.config.get("export", {}).get("licence")
    measured = {} if benchmark is None else read_benchmark(benchmark, last)
    parts = [
        f"# {cell(last.config.get('name') or last.directory.name)}",
        *introduction(runs, start),
        "## How to load",
        LOADING,
        "## Stages",
        *stages(runs),
        *teachers(last),
        "## Data",
        *data(runs),
        "## Hardware",
        hardware(runs),
        "## Metrics",
        *metrics(runs),
        *benchmarks(measured),
        "## Licences",
        *licences(runs, start, licence),
    ]
    whole = "\n\n".join(part for part in parts if part)
    text = str(redacted(f"---\n{front_matter(runs, start, licence)}---\n\n{whole}\n"))
    return NOT_SHOWN.sub("\ufffd", text.encode("utf-8", "replace").decode())


LOADING = """```python
from transformers import AutoModelForCausalLM, AutoTokenizer

path = "."  # the directory, or the name on the hub, that this file lies in
tokenizer = AutoTokenizer.from_pretrained(path)
model = AutoModelForCausalLM.from_pretrained(path, dtype="auto")
chat = [{"role": "user", "content": "Capital of Peru?"}]
prompt = tokenizer.apply_chat_template(
    chat, add_generation_prompt=True, return_dict=True, return_tensors="pt"
)
print(tokenizer.decode(model.generate(**prompt, max_new_tokens=64)[0]))
```"""


def front_matter(runs: Sequence[RunFiles], start: Start, licence: str | None) -> str:
    """What the hub reads; keys of which nothing is known are left out."""
    sets = [
        source["path"]
        for run in runs
        for source in _sources(run).values()
        if is_hub_set(source) and isinstance(source.get("path"), str)
    ]
    found = {
        "license": licence,
        "language": languages(runs),
        "base_model": [start.hub_id] if start.hub_id else [],
        "library_name": "transformers",
        "pipeline_tag": "text-generation",
        "datasets": list(dict.fromkeys(sets)),
        "tags": ["marco-train", *dict.fromkeys(_course(run).replace(" ", "-") for run in runs)],
    }
    known = {key: value for key, value in found.items() if value}
    return str(yaml.safe_dump(known, sort_keys=False, allow_unicode=True))


def languages(runs: Sequence[RunFiles]) -> list[str]:
    """ISO 639 codes of the rows that were trained on, as the hub writes them."""
    prefix = "data/share/language_"
    shares: dict[str, float] = {}
    for run in runs:
        for name in run.columns:
            code = CODE.fullmatch(name.removeprefix(prefix)) if name.startswith(prefix) else None
            if code is not None:
                share = run.share(name.removeprefix("data/share/"))
                shares[code["code"].lower()] = shares.get(code["code"].lower(), 0.0) + share
    return sorted(code for code, share in shares.items() if share > 0)


def start_of(run: RunFiles) -> Start:
    """Tell what the first run began with."""
    path = run.config.get("model", {}).get("path")
    if not isinstance(path, str):
        return Start(f"random weights of seed {run.config.get('seed', NOT_KNOWN)}")
    commit = run.config.get("hub", {}).get("model.path")
    if isinstance(commit, str):
        of = _of_hub(commit)
        return Start(of.told, of.hub_id, path)
    note = read_object(Path(path) / UPCYCLING)
    digest = _digest(run, "model.path")
    if not note:
        return Start(f"{place(path)} on the trainer's machine, {digest}", directory=path)
    dense = str(note.get("dense"))
    told = (
        f"upcycled to {note.get('num_experts')} experts of width {note.get('expert_width')}, "
        f"top-{note.get('top_k')}, {cell(note.get('drop_ratio'))} of each drawn anew: {digest}"
    )
    if is_hub_id(dense):
        of = _of_hub(dense)
        return Start(f"{of.told}, {told}", of.hub_id)
    was = shown_digest(note.get("digest"))
    return Start(f"{place(dense)} on the trainer's machine, {was}, {told}", directory=dense)


def _of_hub(named: str) -> Start:
    """A model of the hub, from org/name@commit."""
    name, _, commit = named.partition("@")
    return Start(f"[{cell(name)}](https://huggingface.co/{cell(name)}), {commit_of(commit)}", name)


def commit_of(revision: object) -> str:
    """A commit or another revision of the hub, in few characters."""
    text = str(revision or "")
    shown = text[:DIGITS] if re.fullmatch(r"[0-9a-f]{40}", text) else text
    return f"revision {code(shown)}" if shown else f"revision {NOT_KNOWN}"


def _digest(run: RunFiles, field: str) -> str:
    """The digest of a file or directory that a field of a run names, as the run noted it."""
    noted = run.finished.get("content", {}).get(field)
    found = noted.get("digest") if isinstance(noted, dict) else None
    return shown_digest(found or run.config.get("digests", {}).get(field))


def shown_digest(digest: object) -> str:
    """A digest in few characters."""
    return f"sha256 {code(str(digest)[:DIGITS])}" if digest else f"digest {NOT_KNOWN}"


def place(path: object) -> str:
    """A path without what only the trainer's machine has: of an absolute one the last names."""
    found = Path(str(path))
    if found.is_absolute():
        parent = found.parent.name if found.name.startswith("export") else ""
        found = Path(parent) / found.name
    return code(found)


def cell(value: object) -> str:
    """A text that stays one in a table of Markdown."""
    return _in_one_line(value).replace("&", "&amp;").replace("<", "&lt;").replace("`", "'")


def code(value: object) -> str:
    """A text as it is, between backticks."""
    shown = _in_one_line(value).replace("`", "'")
    return f"`{shown}`"


def _in_one_line(value: object) -> str:
    return " ".join(str(NOT_KNOWN if value is None else value).split()).replace("|", "\\|")


def markdown_table(head: Sequence[str], rows: Sequence[Sequence[object]]) -> str:
    """Lay out a table; None is not known."""
    lines = [head, ["---"] * len(head), *([_shown(value) for value in row] for row in rows)]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def _shown(value: object) -> str:
    if isinstance(value, Markdown):
        return value.text
    if isinstance(value, int | float) and not isinstance(value, bool):
        return short(value)
    return cell(value)


@dataclass(frozen=True)
class Markdown:
    """A cell that is Markdown already."""

    text: str


def introduction(runs: Sequence[RunFiles], start: Start) -> Iterator[str]:
    """Say what the model is, what it was made from, and whether it is whole."""
    header = runs[-1].header
    sizes = ""
    if isinstance(header.get("parameters"), int):
        sizes = f"{short(header['parameters'])} parameters"
        if header.get("experts"):
            sizes += (
                f", {short(header['active_parameters'])} of them active "
                f"({header['experts_per_token']} of {header['experts']} experts a token)"
            )
    course = ", then ".join(map(_course, runs))
    yield (
        f"{sizes or f'Parameters: {NOT_KNOWN}'}. Start: {start.told}. Trained by {course}, with "
        f"marco_train {version('marco-train')}. All that stands here is what its runs wrote."
    )
    for run in runs:
        if not run.is_finished:
            of = run.header.get("num_steps", NOT_KNOWN)
            yield f"**The run {_name(run)} is not finished**: step {run.last_step} of {of}."
    for before, run in pairwise(runs):
        noted = run.finished.get("content", {}).get("model.path")
        path = run.config["model"]["path"]
        if isinstance(noted, dict) and Path(path).is_dir() and not is_same(noted, path):
            yield (
                f"**The export of {_name(before)} was made anew** since {_name(run)} began with "
                "it: what stands here of it may be of another model."
            )


def _kind(run: RunFiles) -> str:
    return str(run.config["stage"]["kind"])


def _course(run: RunFiles) -> str:
    return COURSE[_kind(run)]


def _name(run: RunFiles) -> str:
    return code(run.config.get("name") or run.directory.name)


def stages(runs: Sequence[RunFiles]) -> Iterator[str]:
    """One line a run: how many steps of what, by which loss."""
    rows: list[list[object]] = []
    for number, run in enumerate(runs):
        header = run.header
        begun = Markdown("the start above")
        if number:
            export = code(Path(run.config["model"]["path"]).name)
            begun = Markdown(f"{export} of {_name(runs[number - 1])}")
        rows.append(
            [
                Markdown(_name(run)),
                _kind(run),
                begun,
                Markdown(_digest(run, "model.path")),
                run.last_step,
                header.get("batch"),
                header.get("length"),
                header.get("objective"),
                header.get("optimizer"),
            ]
        )
    head = ["run", "stage", "from", "its digest", "steps", "a step", "at most", "loss", "optimizer"]
    yield markdown_table(head, rows)


def teachers(run: RunFiles) -> Iterator[str]:
    """Who taught a distillation, phase by phase; nothing of another stage."""
    cascade = run.config["stage"].get("cascade")
    if not isinstance(cascade, Mapping):
        return
    order = run.finished.get("phases") or list(cascade)
    begun = dict(phases(run))
    rows: list[list[object]] = []
    for phase in order:
        owner, cfg = f"stage.cascade.{phase}", cascade[phase]
        named = {f"{owner}.teacher": ("all", cfg.get("teacher"))}
        named |= {
            f"{owner}.teachers_by_group.{group}": (group, teacher)
            for group, teacher in (cfg.get("teachers_by_group") or {}).items()
        }
        steps = run.header.get("phases", {}).get(phase, cfg.get("num_steps"))
        for field, (group, teacher) in named.items():
            if isinstance(teacher, Mapping):
                row = _teacher(run, f"{field}.path", teacher)
                rows.append([phase, group, *row, begun.get(phase, "not begun"), steps])
    head = ["phase", "prompts", "teacher", "kind", "what it was", "from step", "steps"]
    yield "## Teachers"
    yield markdown_table(head, rows)


def _teacher(run: RunFiles, field: str, teacher: Mapping[str, Any]) -> list[object]:
    backend = str(teacher.get("backend"))
    commit = run.config.get("hub", {}).get(field)
    what = _digest(run, field)
    if backend == "vllm_server":
        what = f"servers, whose weights were not seen; their tokenizer: {what}"
    if isinstance(commit, str):
        return [Markdown(_of_hub(commit).told), backend, Markdown(what)]
    return [Markdown(place(teacher.get("path"))), backend, Markdown(what)]


def _sources(run: RunFiles) -> dict[str, dict[str, Any]]:
    found = run.config.get("data", {}).get("sources")
    return found if isinstance(found, dict) else {}


def is_hub_set(source: Mapping[str, Any]) -> bool:
    """Whether the rows of a source come from the hub."""
    kind = source.get("kind")
    return kind == "hub" or (kind == "auto" and is_hub_id(source.get("path")))


def data_cards(runs: Sequence[RunFiles]) -> dict[str, Path]:
    """Cards of the sets that `marco-train curate` built, by the names that copies of them have."""
    found = {}
    for run in runs:
        for name, source in _sources(run).items():
            file = Path(str(source.get("path"))).resolve().parent / DATA_CARD
            if not is_hub_set(source) and file.is_file():
                found[f"DATA_CARD_{UNSAFE_IN_FILES.sub('_', name)}.md"] = file
    return found


def data(runs: Sequence[RunFiles]) -> Iterator[str]:
    """One table a run: each source, with where it is from and how much of it there is."""
    head = ["source", "rows of", "which", "licence", "rows", "weight", "category"]
    for run in runs:
        rows: list[list[object]] = []
        counts = run.header.get("source_rows", {})
        for name, source in _sources(run).items():
            path, of_hub = source.get("path"), is_hub_set(source)
            parts = [source.get("subset"), source.get("split") if of_hub else None]
            named = "".join(f", {cell(part)}" for part in parts if part)
            if of_hub:
                link = f"https://huggingface.co/datasets/{cell(path)}"
                where = f"[{cell(path)}]({link}){named}"
                pinned = source.get("revision")
                which = commit_of(pinned) if pinned else "the newest revision then"
            else:
                where, which = place(path), _digest(run, f"data.sources.{name}.path")
            licence, category = source.get("licence"), source.get("category") or "none"
            row = [name, Markdown(where), Markdown(which), licence, counts.get(name)]
            rows.append([*row, source.get("weight"), category])
        yield f"{_name(run)}: {_lost(run.header)}."
        yield markdown_table(head, rows)
    if cards := data_cards(runs):
        links = ", ".join(f"[{name}]({name})" for name in cards)
        yield f"How the sets were built that nobody released: {links}."
    told = ", ".join(languages(runs))
    yield f"Languages that rows name: {told or 'none'}."


def _lost(header: Mapping[str, Any]) -> str:
    """What was not used of the rows."""
    lost = header.get("rows_lost")
    if not isinstance(lost, Mapping):
        return f"rows {NOT_KNOWN}"
    what = ", ".join(f"{count:,} {cell(name)}" for name, count in lost.items()) or "none"
    judged, of = header.get("rows_judged"), header.get("rows")
    return f"{cell(of)} rows, {cell(judged)} of them judged; not used: {what}"


def hardware(runs: Sequence[RunFiles]) -> str:
    """What the steps ran on, and how long."""
    rows: list[list[object]] = []
    for run in runs:
        header, seconds = run.header, run.columns.get("time/step")
        hours = sum(seconds[1]) / 3600 if seconds is not None else None
        ranks, peak = header.get("ranks"), run.columns.get("memory/peak_gib")
        rows.append(
            [
                Markdown(_name(run)),
                None if ranks is None else f"{ranks} x {header.get('device', NOT_KNOWN)}",
                header.get("dtype"),
                header.get("expert_parallel_size"),
                header.get("zero_stage"),
                hours,
                None if hours is None or ranks is None else hours * ranks,
                None if peak is None else max(peak[1]),
            ]
        )
    head = [
        "run",
        "ranks",
        "type",
        "experts over",
        "ZeRO",
        "hours of steps",
        "rank-hours",
        "peak GiB",
    ]
    return markdown_table(head, rows)


def metrics(runs: Sequence[RunFiles]) -> Iterator[str]:
    """How the figures of each run moved."""
    for run in runs:
        rows = summary_rows(run)
        yield f"{_name(run)}:"
        if rows:
            yield markdown_table(["", "first tenth", "last tenth", "least", "most"], rows)
        else:
            yield "No step was logged."


def read_benchmark(directory: Path, run: RunFiles) -> dict[str, Any]:
    """Read a benchmark of a run's export.

    Raises:
        InputError: There is none, or it asked another model.
    """
    found = read_object(directory / "benchmark.json")
    require(
        isinstance(found.get("rows"), dict) and bool(found["rows"]),
        f"{str(directory)!r} holds no benchmark.json: give the output_dir of a benchmark that has "
        "ended",
    )
    model, export = Path(str(found.get("model"))), run.directory / "export"
    require(
        model.resolve() == export.resolve(),
        f"{directory / 'benchmark.json'} is of {str(model)!r}, and this is the card of "
        f"{str(export)!r}: give a benchmark of that, or leave it out",
    )
    noted = read_object(directory / "finished.json").get("content", {}).get("model.path")
    if isinstance(noted, dict) and not is_same(noted, export):
        raise InputError(
            f"{directory / 'benchmark.json'} was measured before {str(export)!r} was made anew: "
            "run the benchmark again"
        )
    stage = read_object(directory / "config.json").get("stage", {})
    from_files = bool(stage.get("data_dir") or stage.get("data_dirs"))
    details = read_object(directory / "details.json")
    return found | {"details": details, "from_files": from_files}


def benchmarks(found: Mapping[str, Any]) -> Iterator[str]:
    """The table of a benchmark, by the sections of the card; nothing of none."""
    if not found:
        return
    yield "## Benchmarks"
    yield (
        f"Suite {cell(found.get('suite'))}, by the tasks of marco_train {version('marco-train')} "
        "in lm-eval."
    )
    made_up = found.get("suite") == FIXTURE
    if made_up:
        yield "**The items are made up: scores say that all runs, and nothing of the model.**"
    if found["from_files"]:
        yield "Sets were read from files, whose revisions are not known."
    rows: list[list[object]] = []
    of_card = {name for names in sections().values() for name in names}
    others = [name for name in found["rows"] if name not in of_card]
    for section, names in {**sections(), "other": others}.items():
        shown = [name for name in names if name in found["rows"]]
        for name in shown:
            row, more = found["rows"][name], found["details"].get(name, {})
            revision = None if found["from_files"] else more.get("revision")
            origin = ["made up", "made up"] if made_up else [revision, more.get("licence")]
            low, high = row["ci95"]
            rows.append(
                [
                    *(name, row["metric"], f"{row['score']:.1f}", f"{low:.1f} to {high:.1f}"),
                    *(row["n_items"], *origin),
                ]
            )
        mean = found["means"].get(section)
        if shown and mean is not None:
            of = f"mean of {len(shown)} of {len(names)} {section} rows"
            rows.append([of, "", f"{mean:.1f}", "", "", "", ""])
    head = ["row", "metric", "score", "95 %", "items", "revision of the set", "its licence"]
    yield markdown_table(head, rows)


def licences(runs: Sequence[RunFiles], start: Start, licence: str | None) -> Iterator[str]:
    """What is known of the licences of all that the model was made from."""
    lines = [f"- This model: {cell(licence) if licence else 'none was chosen'}."]
    lines.append(f"- What it began with ({start.told}): {licence_in(start.directory)}.")
    for phase, cfg in (runs[-1].config["stage"].get("cascade") or {}).items():
        teacher = (cfg.get("teacher") or {}).get("path")
        if teacher is not None:
            lines.append(
                f"- Teacher of phase {cell(phase)}, {place(teacher)}: {licence_in(teacher)}."
            )
    known: dict[str, set[str]] = {}
    for run in runs:
        for name, source in _sources(run).items():
            known.setdefault(source.get("licence") or NOT_KNOWN, set()).add(name)
    for named, names in known.items():
        lines.append(f"- Rows of {', '.join(map(cell, sorted(names)))}: {cell(named)}.")
    yield "\n".join(lines)
    if any(NOT_KNOWN in line for line in lines) or not licence:
        yield "What is not known here has to be looked up before the model is published."


def licence_in(path: object) -> str:
    """The licence that the card in a model's directory names."""
    try:
        text = (Path(str(path)) / CARD).read_text(encoding="utf-8")
        found = FRONT_MATTER.match(text)
        named = yaml.safe_load(found[1]).get("license") if found else None
    except (AttributeError, OSError, ValueError, yaml.YAMLError):
        named = None
    return cell(named)
