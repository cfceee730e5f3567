"""Build a set of the model card that nobody released.

    marco-train curate translation input=DIR output_dir=D [languages=[de,fr]] [plan=true]
        [key=value ...]

A killed curation goes on when it is launched again; recipes/curation/README.md has the kinds.
"""

import shlex
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from marco_train.config.compose import read_curation
from marco_train.config.curation import (
    CURATIONS,
    CultureConfig,
    CurationConfig,
    ScienceConfig,
    TranslationConfig,
)
from marco_train.config.secrets import redacted
from marco_train.errors import REFUSED, TRY_AGAIN_LATER, InputError, ServersUnavailable

if TYPE_CHECKING:
    from marco_train.curation.frame import Cost, Pipeline


def main(words: Sequence[str] | None = None) -> int:
    """Read the command line, and plan or build; says how it ended."""
    words = list(sys.argv[1:] if words is None else words)
    if not words or {"--help", "-h"} & set(words):
        print(f"{(__doc__ or '').strip()}\n\nKinds: {', '.join(CURATIONS)}")
        return 0
    try:
        cfg = read_curation(words[0], words[1:])
        curate(cfg, shlex.join(["marco-train", "curate", *words]))
    except InputError as error:
        print(f"error: {redacted(str(error))}", file=sys.stderr)
        return REFUSED
    except ServersUnavailable as error:
        said = f"error: {redacted(str(error))}; nothing is lost: launch it again later"
        print(said, file=sys.stderr)
        return TRY_AGAIN_LATER
    return 0


def curate(cfg: CurationConfig, command: str) -> None:
    """Plan, or build.

    Raises:
        InputError: Something that was given is refused, or the disk is full.
        ServersUnavailable: The LLM is away.
    """
    from marco_train.checkpoint.lock import held
    from marco_train.curation.card import write_card
    from marco_train.curation.frame import planned, room_on_disk, run, unfinished
    from marco_train.curation.llm import check_endpoint
    from marco_train.curation.outputs import write_rows
    from marco_train.tracking import log_line

    pipeline = pipeline_of(cfg)
    if cfg.plan:
        print("\n".join(_as_text(planned(pipeline))))
        return
    directory = Path(cfg.output_dir)
    check_endpoint(unfinished(pipeline, directory / "work", cfg.shard_rows))
    with held(directory), room_on_disk(directory):
        ran = run(pipeline, directory / "work", cfg.shard_rows, cfg.processes)
        outputs = write_rows(pipeline, ran, directory, cfg.seed)
        write_card(cfg, pipeline, ran.counts, outputs, command)
    rows = directory / f"{pipeline.kind}.jsonl"
    log_line(f"{rows}: {outputs.num_rows:,} rows, {outputs.digest}")
    if directory.resolve().name == pipeline.kind:
        log_line(_link_beside(rows))


def _link_beside(rows: Path) -> str:
    """Link the rows of D/<kind>/ as D/<kind>.jsonl, where configs/data/marco_*.yaml read them.

    Returns:
        What was done; a file that is no link is left as it is.
    """
    directory = rows.parent.resolve()
    link = directory.parent / rows.name
    if link.exists() and not link.is_symlink():
        return f"{link} is a file of its own, and no link to these rows was made there"
    partial = link.with_name(f".{link.name}.partial")
    partial.unlink(missing_ok=True)
    partial.symlink_to(Path(directory.name) / rows.name)
    partial.replace(link)
    return f"{link} links to them"


def pipeline_of(cfg: CurationConfig) -> "Pipeline":
    """Put together the pipeline of a config.

    Raises:
        InputError: Its input or its rules are refused.
    """
    match cfg:
        case TranslationConfig():
            from marco_train.curation import translation

            return translation.pipeline(cfg)
        case CultureConfig():
            from marco_train.curation import culture

            return culture.pipeline(cfg)
        case ScienceConfig():
            from marco_train.curation import science

            return science.pipeline(cfg)
    raise AssertionError(cfg.kind)


def _as_text(costs: "Sequence[tuple[str, Cost]]") -> Iterator[str]:
    """The plan for a person."""
    heads = ("rows out", "LLM calls", "tokens in", "tokens out", "embeddings", "hours")
    yield " ".join([f"{'step':12}", *(f"{head:>12}" for head in heads)])
    for name, cost in costs:
        amounts = (
            cost.rows,
            cost.llm_calls,
            cost.prompt_tokens,
            cost.completion_tokens,
            cost.embedding_batches,
        )
        cells = [f"{name:12}", *(f"{amount:12,.0f}" for amount in amounts)]
        yield " ".join([*cells, f"{cost.seconds / 3600:12.2g}"])
    yield (
        "Rows are at most, as what steps drop is not known before; embeddings are batches. In all "
        f"{sum(cost.llm_calls for _, cost in costs):,.0f} LLM calls, "
        f"{sum(cost.embedding_batches for _, cost in costs):,.0f} embedding batches and "
        f"{sum(cost.seconds for _, cost in costs) / 3600:.2g} hours."
    )


if __name__ == "__main__":
    sys.exit(main())
