"""See which experts of an MoE model each language uses, and which languages are near each other.

signatures.json   shares of each expert [languages, L, E], distances, merges and families
signatures.svg    the dendrogram: 1 - Pearson correlation, average linkage (Marco-MoE figure 10)
signatures.html   both, with each language's experts by layer, as one page
"""

import argparse
import json
import sys
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from marco_train.commands.model import add_model_arguments
from marco_train.commands.source import add_source_arguments, open_source
from marco_train.config.architecture import read_architecture
from marco_train.config.data import DataConfig, Overlong
from marco_train.config.model import ChatTemplate, DType, ModelConfig
from marco_train.config.sft import LossTokens
from marco_train.data.chat import load_tokenizer
from marco_train.data.conversations import Source
from marco_train.data.drops import Dropped
from marco_train.data.render import ExampleRenderer
from marco_train.data.tokens import render_row
from marco_train.distributed import device
from marco_train.errors import InputError, require
from marco_train.evaluation.signature_page import signature_page, tree_of
from marco_train.files import replaces
from marco_train.hub import fetch, is_hub_id


def main(arguments: Sequence[str] | None = None) -> int:
    """Read the command line, run the rows through the model, and write what is found."""
    args = _parser().parse_args(arguments)
    try:
        found = measure(args)
        _write(args.output, found)
    except InputError as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    except OSError as error:
        print(f"error: {args.output} cannot be written: {error}", file=sys.stderr)
        return 1
    for family in found["families"]:
        print(", ".join(family))
    print(args.output / "signatures.html")
    return 0


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="marco-train signatures", description=(__doc__ or "").splitlines()[0]
    )
    parser.add_argument(
        "model", help="directory of an MoE model, or org/name[@revision] of the hub"
    )
    add_source_arguments(parser, "--data")
    parser.add_argument("--output", type=Path, required=True, help="directory to write to")
    parser.add_argument(
        "--rows", type=int, default=200, help="first rows of each language that are read (200)"
    )
    parser.add_argument(
        "--max-length", type=int, default=2048, help="first tokens of a row that are read (2048)"
    )
    add_model_arguments(parser)
    return parser


def measure(args: argparse.Namespace) -> dict[str, Any]:
    """Find each language's signature; the model is loaded last.

    Raises:
        InputError: The model has no experts, or the rows tell of fewer than two languages.
    """
    path = str(fetch(args.model)) if is_hub_id(args.model) else args.model
    require(args.rows > 0, f"--rows is {args.rows}, and must be greater than 0")
    require(args.max_length > 1, f"--max-length is {args.max_length}, and must be greater than 1")
    architecture = read_architecture(path)
    require(
        architecture.num_experts is not None,
        f"{args.model} is dense, and has no experts to choose from: name an MoE model",
    )
    longest = min(args.max_length, architecture.max_position_embeddings or args.max_length)
    dtype = DType(args.dtype)
    template = ChatTemplate(args.chat_template)
    tokenizer = load_tokenizer(ModelConfig(path=path, tokenizer=path, chat_template=template))
    cfg = DataConfig(overlong=Overlong.truncate)
    render = ExampleRenderer.of(tokenizer, cfg, LossTokens.all, longest)
    texts, lost = texts_by_language(open_source(args), render, args.rows)
    _refuse_too_few(texts, lost, args)
    if lost:
        listed = ", ".join(f"{count:,} {why}" for why, count in lost.most_common())
        print(f"rows left out: {listed}", file=sys.stderr)
    # Seconds to import.
    from marco_train.evaluation.signatures import language_signatures, signature_report
    from marco_train.models import load_model
    from marco_train.models.weights import torch_dtype

    model = load_model(path, torch_dtype(dtype)).to(device())
    pairs = ((language, ids) for language, each in texts.items() for ids in each)
    report = signature_report(language_signatures(model, pairs, max_tokens=4 * longest))
    return {
        "model": args.model,
        "data": args.path,
        "num_rows": {language: len(each) for language, each in sorted(texts.items())},
        "num_tokens": {language: sum(map(len, each)) for language, each in sorted(texts.items())},
        **report,
    }


def texts_by_language(
    source: Source, render: ExampleRenderer, most: int
) -> tuple[dict[str, list[list[int]]], Counter[str]]:
    """Read the first rows of each language.

    Args:
        source: Of the rows.
        render: Makes their tokens.
        most: Rows of a language.

    Returns:
        Token ids by language, and how many rows were left out by what is wrong with them.
    """
    texts: dict[str, list[list[int]]] = {}
    lost: Counter[str] = Counter()
    for index in range(len(source)):
        language = getattr(source[index], "language", "")
        if len(texts.get(language, ())) >= most:
            continue
        found = render_row(source, index, render)
        if isinstance(found, Dropped):
            lost[found.metric.removeprefix("data/dropped_").replace("_", " ")] += 1
        elif not language:
            lost["without a language"] += 1
        else:
            texts.setdefault(language, []).append(list(found[1].input_ids))
    return texts, lost


def _refuse_too_few(
    texts: dict[str, list[list[int]]], lost: Counter[str], args: argparse.Namespace
) -> None:
    if len(texts) > 1:
        return
    left_out = "".join(f"; {count:,} rows are left out: {why}" for why, count in lost.items())
    found = f"all usable rows are of {next(iter(texts))!r}" if texts else "no usable row has one"
    raise InputError(
        f"signatures compare languages, and of those of {args.path} {found}{left_out}: give rows "
        "of two languages or more, whose column `language` holds a code as de or zh-Hans; another "
        "name of the column is taken with --columns language=<name>"
    )


def _write(directory: Path, found: dict[str, Any]) -> None:
    directory.mkdir(parents=True, exist_ok=True)
    contents = {
        "signatures.json": json.dumps(found, ensure_ascii=False) + "\n",
        "signatures.svg": tree_of(found) + "\n",
        "signatures.html": signature_page(found),
    }
    for name, content in contents.items():
        with replaces(directory / name) as partial:
            partial.write_text(content, encoding="utf-8")
