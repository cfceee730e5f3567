"""Rows on disk, and the sources and loaders that read them."""

import json
from pathlib import Path
from typing import Any

from marco_train.config import TrainConfig
from marco_train.config.data import SourceConfig
from marco_train.data.conversations import Source
from marco_train.data.loader import PromptLoader, SFTLoader
from marco_train.types import Conversation
from tests.helpers.configs import compose_config
from tests.helpers.tokenizers import tokenizer_of
from tests.helpers.world import World

LOADERS: dict[str, Any] = {"sft": SFTLoader, "opd": PromptLoader}


def chat(question: str, answer: str = "no") -> dict[str, Any]:
    """A row of one question and its answer."""
    turns = [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]
    return {"messages": turns}


def turns(*found: Any) -> str:
    """A line with these turns."""
    return json.dumps({"messages": list(found)})


def write(directory: Path, *lines: str) -> Path:
    """A file of lines."""
    file = directory / "rows.jsonl"
    file.write_text("".join(line + "\n" for line in lines))
    return file


def source_at(path: Path | str, **changes: Any) -> Source:
    """What lies at a path as a source."""
    fields: dict[str, Any] = {"path": str(path), "category": "math", "weight": 1.0}
    return Source("fixture", SourceConfig(**(fields | changes)))


def source(directory: Path, *rows: Any, **changes: Any) -> Source:
    """A source with these rows."""
    return source_at(write(directory, *map(json.dumps, rows)), **changes)


def conversations(found: Source) -> list[Conversation]:
    """The rows of a source, all of which are chats."""
    rows = [found[index] for index in range(len(found))]
    chats = [row for row in rows if isinstance(row, Conversation)]
    assert len(chats) == len(rows)
    return chats


def config(stage: str, world: World, file: Path, *more: str) -> TrainConfig:
    """A run on one source alone."""
    overrides = [f"root={world.root}", "data=quickstart_text", f"data.sources.text.path={file}"]
    return compose_config(f"quickstart_{stage}", *overrides, *more)


def loader_of(
    stage: str,
    world: World,
    file: Path,
    *more: str,
    tokenizer: Path | None = None,
    quarantine: Path | None = None,
) -> Any:
    """The loader of a run on one source alone; a test knows of which stage."""
    cfg = config(stage, world, file, *more)
    read = tokenizer_of(tokenizer or cfg.model.tokenizer)
    return LOADERS[stage](cfg.data, cfg.stage, read, cfg.seed, quarantine)
