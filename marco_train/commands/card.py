"""Write the model card of a run for the hub: `marco-train card DIR [--output FILE]`."""

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

from marco_train.errors import InputError
from marco_train.evaluation.model_card import write_card


def main(arguments: Sequence[str] | None = None) -> int:
    """Read the command line and write the card; ends with 1 where it cannot."""
    parser = argparse.ArgumentParser(prog="marco-train card", description=__doc__)
    parser.add_argument("directory", type=Path, help="output_dir of the run that trained the model")
    parser.add_argument(
        "--output",
        type=Path,
        help="file to write, in place of what is there (README.md in the run's export, or in the "
        "directory where nothing is exported yet)",
    )
    parser.add_argument(
        "--benchmark",
        type=Path,
        metavar="DIR",
        help="output_dir of a benchmark of the export (`benchmark` in the directory, if any)",
    )
    parser.add_argument(
        "--licence", help="of the model, by the hub's name, as apache-2.0 (that of export.licence)"
    )
    args = parser.parse_args(arguments)
    try:
        print(write_card(args.directory, args.output, args.benchmark, args.licence))
    except InputError as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    except OSError as error:
        print(f"error: the card cannot be written: {error}", file=sys.stderr)
        return 1
    return 0
