"""Look at a data set before a run does: which shape, what is lost, and what would be learnt."""

import argparse
import json
import random
import re
import sys
import tempfile
from collections import Counter
from collections.abc import Iterable, Sequence
from contextlib import ExitStack, redirect_stdout
from dataclasses import dataclass, field
from itertools import pairwise
from pathlib import Path
from typing import Any

from marco_train.commands.source import add_source_arguments, escape_unprintable, open_source
from marco_train.config.data import DataConfig
from marco_train.config.lengths import MAX_LENGTH, positions_of
from marco_train.config.model import ChatTemplate, ModelConfig
from marco_train.config.sft import LossTokens
from marco_train.data.chat import (
    CHATML,
    Tokenizer,
    check_marks,
    load_tokenizer,
    marked_text,
    stretches,
)
from marco_train.data.conversations import Source
from marco_train.data.drops import Dropped, over
from marco_train.data.duplicates import digest_of_text
from marco_train.data.gate import (
    Structure,
    check_bad_rows,
    check_lost_rows,
    judge_structure,
    judge_tokens,
    judged_rows,
)
from marco_train.data.render import ExampleRenderer, PromptRenderer
from marco_train.data.tokens import render_row
from marco_train.errors import InputError, require
from marco_train.hub import fetch, is_hub_id
from marco_train.types import Conversation

NUM_BARS = 8  # of the histogram
BAR = 40  # characters of the longest
MOST_SHOWN = 2000  # characters of a sample
MOST_TRIED = 10  # rows that are drawn for each sample, as some of them cannot be used
SEED = 0  # of the rows that are shown
NO_LIMIT = 2**31 - 1
LOST = {
    "data/dropped_too_long": "too long",
    "data/dropped_no_loss": "nothing to learn",
    "data/dropped_special": "text of a control token",
    "data/dropped_empty": "empty answer",
    "data/dropped_malformed": "cannot be rendered",
}


@dataclass
class Report:
    """What a data set is; the fields are those of the JSON line."""

    shape: str | None = None
    rows: int = 0
    kept: int = 0
    quarantined: dict[str, int] = field(default_factory=dict)
    """Rows that a run would not use, by reason."""
    duplicates: int = 0
    """Rows, of those that were judged, that say the same as an earlier one in all columns."""
    repeated_roles: int = 0
    """Chats, of those that were judged, with two turns in a row of one role other than tool."""
    ignored_columns: list[str] = field(default_factory=list)
    samples: list[dict[str, Any]] = field(default_factory=list)


def main(arguments: Sequence[str] | None = None) -> None:
    """Read the command line, print what was found, and exit with 1 where a run would not start."""
    args = _parser().parse_args(arguments)
    escape_unprintable()
    report = Report()
    lengths: list[int] = []
    marked: list[str] = []
    found: Structure | None = None
    with ExitStack() as opened:
        opened.enter_context(redirect_stdout(sys.stderr))
        try:
            directory = _tokenizer_directory(args, opened)
            tokenizer = _tokenizer(args, directory)
            limit = _length_limit(args, directory)
            found = inspect(report, args, tokenizer, limit, lengths, marked)
            refusal = None
        except InputError as error:
            refusal = as_options(" ".join(str(error).split()), Path(args.path).name)
    if args.json:
        print(json.dumps(vars(report)))  # in ASCII: no character of a row ends the line
    else:
        unit = "bytes" if args.tokenizer is None else "tokens"
        print("\n".join(_as_text(report, found, lengths, marked, unit)))
    if refusal is not None:
        sys.exit(f"error: {refusal}")


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="marco-train inspect", description=__doc__)
    add_source_arguments(parser)
    parser.add_argument(
        "--tokenizer",
        help="directory of one, or org/name[@revision] of the hub; without, lengths are in bytes",
    )
    parser.add_argument(
        "--chat-template",
        choices=[template.value for template in ChatTemplate],
        help="the tokenizer's own, or ours (chatml, without a tokenizer)",
    )
    parser.add_argument(
        "--max-length",
        type=int,
        help="tokens of a row, or of a prompt in opd, over which it is not used (with --tokenizer: "
        "the positions in the config.json beside it, 4096 at most, of which a prompt gets half)",
    )
    parser.add_argument("--stage", choices=["sft", "opd"], default="sft", help="who reads it (sft)")
    parser.add_argument("--samples", type=int, default=5, help="rows to show (5)")
    parser.add_argument("--json", action="store_true", help="one line of JSON on stdout")
    return parser


def _tokenizer_directory(args: argparse.Namespace, opened: ExitStack) -> Path:
    if args.tokenizer is None:
        path = Path(opened.enter_context(tempfile.TemporaryDirectory()))
        write_byte_tokenizer(path)
        return path
    return (
        fetch(args.tokenizer, weights=False) if is_hub_id(args.tokenizer) else Path(args.tokenizer)
    )


def _length_limit(args: argparse.Namespace, directory: Path) -> int:
    """Tokens that a run would allow a row, or a prompt, which shares them with its response."""
    if args.max_length is not None:
        require(
            args.max_length > 0, f"--max-length is {args.max_length}, and must be greater than 0"
        )
        return int(args.max_length)
    if args.tokenizer is None:
        return NO_LIMIT
    whole = min(MAX_LENGTH, positions_of(directory) or MAX_LENGTH)
    return whole if args.stage == "sft" else max(1, whole // 2)


def _tokenizer(args: argparse.Namespace, directory: Path) -> Tokenizer:
    template = args.chat_template or ("tokenizer" if args.tokenizer else "chatml")
    return load_tokenizer(
        ModelConfig(tokenizer=str(directory), chat_template=ChatTemplate(template))
    )


def write_byte_tokenizer(path: Path) -> None:
    """Write a tokenizer of bytes and ChatML's control tokens."""
    from tokenizers import Tokenizer as Rules
    from tokenizers import decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    rules = Rules(models.BPE(vocab={byte: i for i, byte in enumerate(alphabet)}, merges=[]))
    rules.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    rules.decoder = decoders.ByteLevel()
    rules.add_special_tokens(["<|endoftext|>", "<|im_start|>", "<|im_end|>"])
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=rules, eos_token="<|im_end|>")
    tokenizer.chat_template = CHATML.read_text()
    tokenizer.save_pretrained(path)


def inspect(
    report: Report,
    args: argparse.Namespace,
    tokenizer: Tokenizer,
    limit: int,
    lengths: list[int],
    marked: list[str],
) -> Structure:
    """Judge a data set as a run would, and fill in what is found on the way.

    Raises:
        InputError: A run would not start with it.
    """
    require(args.samples >= 0, f"--samples is {args.samples}, and must be 0 or more")
    cfg = DataConfig()
    source = open_source(args)
    report.rows = len(source)
    found = judge_structure(source, cfg)
    report.shape = found.shapes.most_common(1)[0][0] if found.shapes else None
    report.ignored_columns = found.ignored_names
    report.quarantined = dict(found.kinds)
    report.kept = report.rows - len(found.bad)
    rows = judged_rows(source, cfg)
    report.duplicates, report.repeated_roles = _repetitions(source, rows)
    check_bad_rows(source.name, found, cfg)

    render = _renderer(args, tokenizer, limit, cfg)
    if args.stage == "sft":
        said = check_marks(tokenizer, _first_conversations(source, rows))
        if said:
            print(said)
    _show_samples(report, marked, source, render, rows, args.samples)
    files, lost = judge_tokens(source, cfg, render, render.identity())
    is_bad = Counter({"data/dropped_malformed": len(found.bad)})
    bound = f"--max-length={limit}"
    report.quarantined |= {
        LOST[name] + over(name, bound): n for name, n in (lost.counts - is_bad).items()
    }
    report.kept = report.rows - sum(report.quarantined.values())
    for index in rows:
        item = files[index] if files is not None else render_row(source, index, render)
        if not isinstance(item, Dropped):
            lengths.append(len(item[1].input_ids))
    scale(report, found)
    check_lost_rows(source.name, found, lost, bound, cfg)
    return found


def as_options(text: str, name: str) -> str:
    """Say of the keys of a run what they are here, and what in a run of the rows.

    Args:
        text: A sentence for a run, which speaks of data.sources.<name> or other keys of it.
        name: Of the source.
    """
    key = rf"data\.sources\.(?:<name>|{re.escape(name)})\.(columns|roles)"
    text = re.sub(
        rf"{key} and \.roles",
        "--columns and --roles (in a run data.sources.own.columns and .roles)",
        text,
    )
    value = r"((?:<[^>]+>|\w+)=(?:<[^>]+>|\w+))"
    text = re.sub(rf"{key}\.{value}", r"--\1 \2 (in a run data.sources.own.\1.\2)", text)
    text = re.sub(rf"{key}\.(\w+)", r"--\1 \2=<own name> (in a run data.sources.own.\1.\2)", text)
    text = re.sub(key, r"--\1", text)
    return re.sub(r"(raise|with) (data\.(?!sources)\w+)", r"\1 the run's \2", text)


def scale(report: Report, found: Structure) -> None:
    """Reckon from the rows that were judged to all of them."""
    if found.is_complete:
        return
    share = found.num_rows / found.num_judged
    report.quarantined = {why: round(n * share) for why, n in report.quarantined.items()}
    report.kept = report.rows - sum(report.quarantined.values())


def _renderer(
    args: argparse.Namespace, tokenizer: Tokenizer, limit: int, cfg: DataConfig
) -> ExampleRenderer | PromptRenderer:
    """What a stage makes of a row."""
    if args.stage == "sft":
        return ExampleRenderer.of(tokenizer, cfg, LossTokens.assistant, limit)
    return PromptRenderer(tokenizer, limit, cfg.thinking, cfg.overlong)


def _repetitions(source: Source, rows: Sequence[int]) -> tuple[int, int]:
    """Count rows that repeat another one, and chats in which a role has two turns in a row."""
    seen: set[bytes] = set()
    num_repeated = num_of_one_role = 0
    for index in rows:
        row, _, held = source.read(index)
        said = digest_of_text(repr(held))
        num_repeated += said in seen
        seen.add(said)
        if isinstance(row, Conversation):
            roles = [turn.role for turn in row.messages]
            num_of_one_role += any(a == b != "tool" for a, b in pairwise(roles))
    return num_repeated, num_of_one_role


def _first_conversations(source: Source, rows: Sequence[int]) -> list[Conversation]:
    found = (source[index] for index in rows[:64])
    return [row for row in found if isinstance(row, Conversation)]


def _show_samples(
    report: Report,
    marked: list[str],
    source: Source,
    render: ExampleRenderer | PromptRenderer,
    rows: Sequence[int],
    count: int,
) -> None:
    """Render rows that are drawn at random, as many as are wanted and can be used."""
    tokenizer = render.tokenizer
    drawn = random.Random(SEED).sample(rows, min(len(rows), MOST_TRIED * count))
    for index in drawn:
        if len(report.samples) == count:
            return
        found = render_row(source, index, render)
        if isinstance(found, Dropped):
            continue
        row, example = found
        learnt = [tokenizer.decode(ids) for ids in stretches(example)]
        text = tokenizer.decode(example.input_ids)
        report.samples.append({"row": row.row, "text": text, "learnt": learnt})
        marked.append(marked_text(tokenizer, example)[:MOST_SHOWN])


def _as_text(
    report: Report, found: Structure | None, lengths: list[int], marked: list[str], unit: str
) -> Iterable[str]:
    """The report for a person."""
    yield f"shape    {report.shape or 'none that is known'}"
    judged = "" if found is None or found.is_complete else f", judged by {found.num_judged:,}"
    yield f"rows     {report.rows:,}, of which {report.kept:,} would be used{judged}"
    for reason, count in sorted(report.quarantined.items(), key=lambda item: -item[1]):
        yield f"         {count:,} not used: {reason}"
    if found is not None:
        languages = ", ".join(
            f"{name or 'none'} {n:,}" for name, n in found.languages.most_common(12)
        )
        yield f"language {languages}"
        for kind, row in {row["kind"]: row for row in reversed(found.bad)}.items():
            reason = as_options(row["reason"], str(row["source"]))
            yield f"at fault {kind}, as row {row['row']} (from 0): {reason}"
    if report.duplicates:
        yield f"repeated {report.duplicates:,} rows say what an earlier one says, in all columns"
    if report.repeated_roles:
        yield f"turns    {report.repeated_roles:,} chats have two turns of one role in a row"
    if report.ignored_columns:
        yield f"not read {', '.join(report.ignored_columns)}: columns that hold something"
    yield from _histogram(lengths, unit)
    for sample, text in zip(report.samples, marked, strict=True):
        yield f"--- row {sample['row']}, what is learnt between » and «"
        yield text


def _histogram(lengths: list[int], unit: str) -> Iterable[str]:
    if not lengths:
        return
    ordered = sorted(lengths)
    middle, high = ordered[len(ordered) // 2], ordered[int(len(ordered) * 0.99)]
    yield f"length   {middle:,} {unit} in the middle, {high:,} at 99 %, {ordered[-1]:,} at most"
    width = max(1, -(-(high + 1) // NUM_BARS))
    counts = Counter(min(length // width, NUM_BARS) for length in lengths)
    for bar in range(min(counts), max(counts) + 1):
        end = f"{(bar + 1) * width - 1:>7,}" if bar < NUM_BARS else "   more"
        filled = "#" * (BAR * counts[bar] // max(counts.values()))
        yield f"{bar * width:>9,} - {end} {filled} {counts[bar]:,}"
