"""A data set that a command is told of by arguments, and whose text it prints."""

import argparse
import sys
from io import TextIOWrapper
from pathlib import Path

from marco_train.config.data import SourceConfig
from marco_train.data.conversations import Source


def add_source_arguments(parser: argparse.ArgumentParser, option: str | None = None) -> None:
    """Let a command be told where rows lie and how they are read.

    Args:
        parser: Of the command.
        option: That names the rows. None: they stand first, without one.
    """
    what = "file, directory or pattern of files, or hub repository"
    if option is None:
        parser.add_argument("path", help=what)
    else:
        parser.add_argument(option, dest="path", required=True, help=what)
    parser.add_argument("--subset", help="configuration of a hub data set")
    parser.add_argument("--split", default="train", help="split of a hub data set (train)")
    parser.add_argument(
        "--columns", type=_pairs, default={}, help="own names of columns: messages=chat,..."
    )
    parser.add_argument("--roles", type=_pairs, default={}, help="what roles are: env=tool,...")


def _pairs(text: str) -> dict[str, str]:
    pairs = [pair.partition("=") for pair in text.split(",") if pair.strip()]
    if not all(name.strip() and value.strip() for name, _, value in pairs):
        raise argparse.ArgumentTypeError(f"{text!r} is no list like name=value,name=value")
    return {name.strip(): value.strip() for name, _, value in pairs}


def open_source(args: argparse.Namespace) -> Source:
    """Open the rows that the arguments name.

    Raises:
        InputError: They cannot be opened, or there are none.
    """
    return Source(
        Path(args.path).name or args.path,
        SourceConfig(
            path=args.path,
            subset=args.subset,
            split=args.split,
            columns=args.columns,
            roles=args.roles,
        ),
    )


def escape_unprintable() -> None:
    """Let characters of rows that stdout cannot encode be printed as escapes."""
    if isinstance(sys.stdout, TextIOWrapper):
        sys.stdout.reconfigure(errors="backslashreplace")
