"""The page of a run: what it learnt, from what, how fast, and what it says."""

import math
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from marco_train.evaluation.html import (
    Markup,
    Section,
    Series,
    card,
    folded,
    grid,
    heat_text,
    line_chart,
    page,
    plain_text,
    shade_of,
    stacked_chart,
    table,
    warnings,
)
from marco_train.evaluation.run_files import RunFiles, flattened, read_run
from marco_train.evaluation.signature_page import distance_table, tree_of
from marco_train.files import replaces

REPORT = "report.html"
MOST_PARTS = 32
"""Curves of one chart."""
MOST_SAMPLES = 24
MOST_TOKENS = 500  # of a sample
MOST_CHARACTERS = 4000  # of a prompt
MOST_WARNINGS = 40
STRONG_SHARE = 0.95
"""Share of the tokens whose KL is below the strongest colour."""

# Title, unit, and what is drawn in one chart: metrics with their names in its legend.
Chart = tuple[str, str, Mapping[str, str]]

LEARNING: tuple[Chart, ...] = (
    ("Loss", "nats a token", {"loss/cross_entropy": "training", "eval/cross_entropy": "held-out"}),
    ("Held-out reverse KL", "nats a token", {"eval/reverse_kl": "held-out"}),
    ("Score of the suite", "per cent or BLEU", {"eval/score": "mean of its tasks"}),
    ("Entropy", "nats a token", {"loss/entropy": "policy", "kl/teacher_entropy": "teacher"}),
    (
        "Advantage of sampled tokens",
        "nats",
        {f"kl/advantage/p{n:02d}": f"{n} %" for n in (5, 50, 95)},
    ),
    ("Sampler against policy", "nats a token", {"kl/sampler_mismatch": "mean difference"}),
    ("Learning rate", "", {"optim/lr": ""}),
    ("Gradient norm", "before clipping", {"optim/grad_norm": ""}),
)
RESPONSES: tuple[Chart, ...] = (
    ("Length of responses", "tokens", {"rollout/response_length": ""}),
    (
        "Responses that",
        "share",
        {
            "rollout/truncated": "are cut",
            "rollout/empty": "are empty",
            "rollout/repetition": "end in a loop",
            "rollout/lang_match": "are in the prompt's language",
        },
    ),
)
EXPERTS: tuple[Chart, ...] = (
    ("Load of experts", "(largest - mean) / mean", {"moe/max_violation": "worst layer"}),
    ("Entropy of routers", "nats a token", {"moe/router_entropy": ""}),
    ("Experts without a token", "all layers", {"moe/dead_experts": ""}),
    ("Balance loss", "1 is even", {"loss/balance": ""}),
)
SPEED: tuple[Chart, ...] = (
    ("Tokens trained on", "a second", {"perf/tokens_per_second": ""}),
    ("Peak memory", "GiB of a rank", {"memory/peak_gib": ""}),
    ("Use of the GPUs", "share of their peak", {"perf/mfu": ""}),
    ("Teacher's answers", "seconds", {"teacher/seconds": ""}),
)
DATA: tuple[Chart, ...] = (
    ("Epochs", "of the source repeated most", {"data/epoch": ""}),
    (
        "Rows dropped or cut",
        "draws a step",
        {
            f"data/{name}": name.removeprefix("dropped_").replace("_", " ")
            for name in (
                "dropped_too_long",
                "dropped_no_loss",
                "dropped_special",
                "dropped_empty",
                "dropped_malformed",
                "truncated",
            )
        },
    ),
)
TIMES = ("evaluate", "sync", "sample", "score", "train")
SUMMARY = {
    "loss/cross_entropy": "loss, nats a token",
    "eval/cross_entropy": "held-out loss, nats a token",
    "kl/reverse": "reverse KL, nats a token",
    "eval/reverse_kl": "held-out reverse KL, nats a token",
    "eval/score": "score of the suite, per cent or BLEU",
    "loss/entropy": "entropy of the policy, nats a token",
    "rollout/response_length": "length of responses, tokens",
    "optim/grad_norm": "gradient norm",
    "perf/tokens_per_second": "tokens a second",
    "time/step": "seconds a step",
    "memory/peak_gib": "peak memory of a rank, GiB",
}
TENTH = 10  # the first and the last tenth of the steps are compared


def write_run_page(directory: Path, output: Path) -> None:
    """Write the page of a run, of one that goes on too; complete or not there.

    Raises:
        InputError: The directory is none of a run.
        OSError: The page cannot be written.
    """
    content = run_page(read_run(directory))
    with replaces(output) as partial_file:
        partial_file.write_text(content, encoding="utf-8")


def run_page(run: RunFiles) -> str:
    """Lay out the page of a run."""
    name = str(run.config.get("name") or run.directory.name)
    return page(
        name,
        state(run),
        [
            Section("Warnings", warnings(warned(run))),
            Section("Summary", summary(run)),
            Section("Learning", learning(run)),
            Section("Categories and languages", by_group(run)),
            Section("Responses", grid(charts(run, RESPONSES))),
            Section("Experts", experts(run)),
            Section("Time and memory", speed(run)),
            Section("Data", data(run)),
            Section("Samples", samples(run)),
            Section("Evaluation", evaluation(run)),
            Section("Routing by language", signatures(run)),
            Section("Config", config(run)),
        ],
    )


def state(run: RunFiles) -> list[str]:
    """Say how far a run has come."""
    kind = run.config.get("stage", {}).get("kind", "run")
    steps, planned = run.last_step, run.header.get("num_steps")
    of = f" of {planned:,}" if isinstance(planned, int) else ""
    if run.is_finished:
        how = "finished"
    elif run.exit_status.get("code"):
        how = f"ended before its time: {run.exit_status.get('reason')}"
    else:
        how = "not finished: it goes on, or was killed"
    said = [f"{kind}, {how}; {run.directory}"]
    if kind == "evaluate":
        return said
    if steps == 0:
        return [*said, "No step was logged yet."]
    return [*said, f"{steps:,}{of} steps."]


def warned(run: RunFiles) -> list[str]:
    """What a reader should not overlook, the newest last."""
    said = [f"step {line.get('step')}: {line.get('text')}" for line in run.warnings]
    more = len(said) - MOST_WARNINGS
    said = said[-MOST_WARNINGS:] + ([f"and {more} earlier ones, in warnings.jsonl"] * (more > 0))
    for metric in SUMMARY.keys() & run.columns.keys():
        pairs = zip(*run.columns[metric], strict=True)
        lost = [step for step, value in pairs if not math.isfinite(value)]
        if lost:
            said.append(f"{metric} was no number at {len(lost)} steps, first at {lost[0]:.0f}")
    if run.num_torn:
        said.append(f"{run.num_torn} lines of metrics.jsonl are torn, and left out")
    sources = Counter(str(row.get("source")) for row in run.faults)
    said += [f"{n} rows of {name!r} are at fault: quarantine.jsonl" for name, n in sources.items()]
    return said


def summary(run: RunFiles) -> list[Markup]:
    """Compare the first and the last tenth of the steps."""
    rows = summary_rows(run)
    head = ("", "first tenth", "last tenth", "least", "most")
    return [table(head, rows)] if rows else []


def summary_rows(run: RunFiles) -> list[tuple[str, float, float, float, float]]:
    """Name, means of the first and the last tenth of the steps, least and most of each figure."""
    rows = []
    for metric, name in SUMMARY.items():
        values = (
            list(filter(math.isfinite, run.columns[metric][1])) if metric in run.columns else []
        )
        if values:
            part = max(1, len(values) // TENTH)
            first, last = sum(values[:part]) / part, sum(values[-part:]) / part
            rows.append((name, first, last, min(values), max(values)))
    return rows


def charts(run: RunFiles, wanted: Iterable[Chart]) -> list[Markup]:
    """Draw those of which something was logged."""
    drawn = []
    for title, unit, names in wanted:
        series = [run.series(metric, name) for metric, name in names.items()]
        logged = [each for each in series if each is not None and any(each.values)]
        drawn.append(line_chart(title, unit, logged, phase_marks(run)))
    return drawn


def phases(run: RunFiles) -> list[tuple[str, int]]:
    """The phases that have begun, each with its first step."""
    column = run.columns.get("cascade/phase")
    names = list(run.config.get("stage", {}).get("cascade") or {})
    found: dict[int, int] = {}
    for step, phase in zip(*column, strict=True) if column is not None else ():
        found.setdefault(int(phase), int(step))
    return [
        (names[phase] if phase < len(names) else f"phase {phase}", step)
        for phase, step in found.items()
    ]


def phase_marks(run: RunFiles) -> dict[float, str]:
    """Where phases begin, if there are several."""
    found = phases(run)
    return {float(step): name for name, step in found} if len(found) > 1 else {}


def kl_by_phase(run: RunFiles) -> list[Series]:
    """The reverse KL, a curve for each teacher."""
    whole = run.series("kl/reverse", "")
    if whole is None:
        return []
    begun = phases(run) or [("reverse KL", 0)]
    ends = [step for _, step in begun[1:]] + [run.last_step + 1]
    parts = []
    for (name, first), end in zip(begun, ends, strict=True):
        inside = [n for n, step in enumerate(whole.steps) if first <= step < end]
        steps, values = [whole.steps[n] for n in inside], [whole.values[n] for n in inside]
        parts.append(Series(name, steps, values))
    return parts


def learning(run: RunFiles) -> list[Markup]:
    """What the run lowers, and how it steps."""
    kl = line_chart("Reverse KL by phase", "nats a token", kl_by_phase(run), phase_marks(run))
    return grid([kl, *charts(run, LEARNING)])


def by_group(run: RunFiles) -> list[Markup]:
    """What is measured by category and language."""
    drawn = []
    for metric, title, unit in (
        ("kl/reverse", "Reverse KL", "nats a token"),
        ("loss/entropy", "Entropy", "nats a token"),
        ("rollout/response_length", "Length of responses", "tokens"),
        ("rollout/truncated", "Responses cut", "share"),
        ("rollout/lang_match", "In the prompt's language", "share"),
    ):
        for kind, by in (("category_", "category"), ("language_", "language")):
            series = run.parts(metric, kind)
            more = len(series) - MOST_PARTS
            said = f"{unit}, the {MOST_PARTS} most used of {len(series)}" if more > 0 else unit
            marks = phase_marks(run)
            if any(any(each.values) for each in series):
                drawn.append(line_chart(f"{title} by {by}", said, series[:MOST_PARTS], marks))
    return grid(drawn)


def experts(run: RunFiles) -> list[Markup]:
    """How tokens spread over experts."""
    layers = sorted(run.parts("moe/max_violation", "layer_"), key=lambda s: (len(s.name), s.name))
    by_layer = line_chart("Load by layer", "(largest - mean) / mean", layers[:MOST_PARTS])
    return grid([*charts(run, EXPERTS), by_layer])


def speed(run: RunFiles) -> list[Markup]:
    """Where the time of a step goes."""
    timers = [run.series(f"time/{name}", name) for name in TIMES]
    parts = [each for each in timers if each is not None]
    whole = run.series("time/step", "")
    if whole is not None:
        spent = dict.fromkeys(whole.steps, 0.0)
        for part in parts:
            for step, seconds in zip(part.steps, part.values, strict=True):
                spent[step] = spent.get(step, 0.0) + seconds
        pairs = zip(whole.steps, whole.values, strict=True)
        rest = [max(0.0, seconds - spent[step]) for step, seconds in pairs]
        parts.append(Series("the rest" if parts else "a step", whole.steps, rest))
    return grid([stacked_chart("Time of a step", "seconds", parts), *charts(run, SPEED)])


def data(run: RunFiles) -> list[Markup]:
    """What the run learnt from."""
    weights = {
        name: source.get("weight")
        for name, source in (run.config.get("data", {}).get("sources") or {}).items()
    }
    shown: list[Markup] = []
    for kind in ("source", "category", "language"):
        prefix = f"data/share/{kind}_"
        found = [n.removeprefix(prefix) for n in run.columns if n.startswith(prefix)]
        rows = [
            [name, 100 * run.share(f"{kind}_{name}")]
            + ([weights.get(name)] if kind == "source" else [])
            for name in sorted(found, key=lambda name: -run.share(f"{kind}_{name}"))
        ]
        head = (kind, "% of sequences", "weight")[: 3 if kind == "source" else 2]
        if rows:
            shown.append(Markup(f"<figure>{table(head, rows)}</figure>"))
    return grid([*shown, *charts(run, DATA)])


def samples(run: RunFiles) -> list[Markup]:
    """The newest samples, each token coloured by its reverse KL."""
    newest = run.samples[: -MOST_SAMPLES - 1 : -1]
    if not newest:
        return []
    known = sorted(
        abs(value) for sample in newest for value in _values(sample) if value is not None
    )
    scale = known[int(STRONG_SHARE * (len(known) - 1))] if known else 0.0
    said = (
        f"Newest first. A token is red where the student holds it likelier than the teacher does, "
        f"blue where less likely; strongest from {scale:.3g} nats on."
    )
    return [plain_text(said), *(_sample(sample, scale) for sample in newest)]


def _values(sample: Mapping[str, Any]) -> list[float | None]:
    found = sample.get("kl")
    return [v if isinstance(v, (int, float)) else None for v in found or []]


def _sample(sample: Mapping[str, Any], scale: float) -> Markup:
    tokens, values = [str(token) for token in sample.get("tokens") or []], _values(sample)
    known = [value for value in values if value is not None]
    mean = f", {sum(known) / len(known):.3g} nats a token" if known else ""
    facts = [sample.get(name) for name in ("category", "language", "source", "finish_reason")]
    title = f"step {sample.get('step')}: {', '.join(str(f) for f in facts if f)}, "
    if "reference" in sample:  # the answer to a suite's question, in one piece
        right = sample.get("right")
        judged = "not judged" if right is None else "right" if right is True else "wrong"
        title += f"{judged}, expected {sample['reference']}"
    else:
        title += f"{len(tokens)} tokens{mean}"
    prompt = str(sample.get("prompt", ""))
    cut = "…" * (len(prompt) > MOST_CHARACTERS)
    values += [None] * len(tokens)
    shown = heat_text(tokens[:MOST_TOKENS], values[: len(tokens)][:MOST_TOKENS], scale)
    rest = len(tokens) - MOST_TOKENS
    more = [plain_text(f"… and {rest} tokens more")] if rest > 0 else []
    return card(title, [plain_text(cut + prompt[-MOST_CHARACTERS:]), shown, *more])


def evaluation(run: RunFiles) -> list[Markup]:
    """How models answered held-out questions."""
    found = run.evaluation
    models = {**_objects(found.get("models")), **_objects(found.get("teachers"))}
    scores = {name: _objects(model.get("avg_at_n")) for name, model in models.items()}
    columns = list(dict.fromkeys(column for of in scores.values() for column in of))
    distances = {name: _objects(model.get("reverse_kl")) for name, model in models.items()}
    teachers = list(dict.fromkeys(name for of in distances.values() for name in of))
    shown: list[Markup] = []
    if columns:
        rows = [[name, *map(of.get, columns)] for name, of in scores.items()]
        shown += [
            plain_text("Accepted answers, %"),
            table(["model", *columns], rows, lambda percent: -shade_of(percent, 150)),
        ]
    if teachers:
        rows = [[name, *map(of.get, teachers)] for name, of in distances.items() if of]
        head = ["model", *(f"KL to {name}, nats a token" for name in teachers)]
        shown.append(table(head, rows))
    for name, answers in _objects(found.get("answers")).items():
        head = ["category", "language", "prompt", "reference", "answer", "accepted"]
        rows = [[answer.get(column) for column in head] for answer in answers]
        for row in rows:
            row[-1] = "yes" if row[-1] else "no"
        if rows:
            shown.append(folded(f"Answers of {name}", table(head, rows)))
    return shown


def _objects(value: Any) -> dict[str, Any]:
    return value if isinstance(value, dict) else {}


def signatures(run: RunFiles) -> list[Markup]:
    """How far the experts that two languages use are apart."""
    shown: list[Markup] = []
    for name, found in run.signatures.items():
        languages: Sequence[str] = found.get("languages", [])
        distances: Sequence[Sequence[float]] = found.get("distances", [])
        is_whole = {len(languages)} == {len(distances), *map(len, distances)}
        if is_whole and len(languages) > 1:
            said = f"{name}: 1 - correlation of the experts that two languages use"
            shown += [plain_text(said), tree_of(found), distance_table(found)]
    return shown


def config(run: RunFiles) -> list[Markup]:
    """What the run said of itself at its start, and its whole config."""
    shown: list[Markup] = []
    if run.header:
        shown.append(table(("at the start", ""), flattened(run.header)))
    if run.config:
        shown.append(folded("all fields", table(("field", "value"), flattened(run.config))))
    return shown
