"""DATA_CARD.md: what is in a set, how it was made, and what is known to be weak about it."""

from collections.abc import Iterable, Iterator, Sequence
from datetime import UTC, datetime
from importlib.metadata import version
from pathlib import Path

from marco_train.config.curation import CARD_LANGUAGES, CurationConfig
from marco_train.config.secrets import redacted
from marco_train.curation.frame import Pipeline, StepCounts
from marco_train.curation.outputs import Outputs
from marco_train.files import replaces

ANSWERED_BY = "answered by "
"""Of a count whose name goes on with the LLM's."""


def write_card(
    cfg: CurationConfig,
    pipeline: Pipeline,
    counts: Sequence[StepCounts],
    outputs: Outputs,
    command: str,
) -> None:
    """Write the card of a set beside it."""
    lines = [
        f"# {pipeline.kind}",
        "",
        f"{outputs.num_rows:,} rows in {len(outputs.lengths)} languages, made by marco-train "
        f"{version('marco-train')}.",
        "",
        f"- SHA-256 of {pipeline.kind}.jsonl: `{outputs.digest}`",
        f"- Written: {datetime.now(UTC):%Y-%m-%d %H:%M} UTC",
        f"- Command: `{command}`",
        f"- Seed: {cfg.seed}",
        *_models(cfg, counts),
        "",
        "## Sources",
        "",
        *_table(
            ["source", "revision", "licence"],
            [[o.name, o.revision or "not said", o.licence] for o in pipeline.origins],
        ),
        "## Rows by step",
        "",
        *_table(["step", "in", "out", "dropped"], [*_steps(counts)]),
        "## Languages",
        "",
        *_table(
            ["language", "rows", "characters, median", "95 %", "longest"],
            [*_languages(outputs)],
        ),
        *_section("Categories", [f"{name}: {n:,}" for name, n in outputs.categories.items()]),
        *_section("Counted beside rows", [*_counted(counts)]),
        *_section("Prompts", [f"{name}: `{what}`" for name, what in pipeline.prompts.items()]),
        *_section("Rules", pipeline.details),
        *_section("Known weaknesses", pipeline.weaknesses(counts)),
    ]
    with replaces(Path(cfg.output_dir) / "DATA_CARD.md") as partial:
        partial.write_text(redacted("\n".join(lines)), encoding="utf-8")


def _models(cfg: CurationConfig, counts: Sequence[StepCounts]) -> Iterator[str]:
    answered = {name for each in counts for name in each.whole.counted}
    models = sorted(n.removeprefix(ANSWERED_BY) for n in answered if n.startswith(ANSWERED_BY))
    sampling = f"temperature {cfg.llm.temperature:g}, top_p {cfg.llm.top_p:g}, seed {cfg.llm.seed}"
    yield f"- LLM: {', '.join(models)} ({sampling})" if models else "- LLM: none"
    revision = f", revision {cfg.embedding.revision}" if cfg.embedding.revision else ""
    yield f"- Embedding model: {cfg.embedding.model or 'none'}{revision}"


def _steps(counts: Sequence[StepCounts]) -> Iterator[list[str]]:
    for each in counts:
        dropped = ", ".join(f"{why} {n:,}" for why, n in each.whole.dropped.most_common())
        yield [each.name, f"{each.whole.rows_in:,}", f"{each.whole.rows_out:,}", dropped or "none"]


def _languages(outputs: Outputs) -> Iterator[list[str]]:
    for code, lengths in sorted(outputs.lengths.items()):
        name = f"{code} ({CARD_LANGUAGES[code][1]})" if code in CARD_LANGUAGES else code or "none"
        quantiles = [f"{lengths.quantile(share):,}" for share in (0.5, 0.95, 1.0)]
        yield [name, f"{lengths.counts.total():,}", *quantiles]


def _counted(counts: Sequence[StepCounts]) -> Iterator[str]:
    for each in counts:
        for name, count in sorted(each.whole.counted.items()):
            if not name.startswith(ANSWERED_BY):
                yield f"{each.name}: {name} {count:,}"


def _section(title: str, lines: Iterable[str]) -> list[str]:
    items = [f"- {line}" for line in lines]
    return [f"## {title}", "", *items, ""] if items else []


def _table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> list[str]:
    def line(cells: Sequence[str]) -> str:
        return "| " + " | ".join(cell.replace("|", "\\|") for cell in cells) + " |"

    return [line(head), line(["---"] * len(head)), *map(line, rows), ""]
