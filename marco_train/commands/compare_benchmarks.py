"""Compare two reports of benchmarks: what moved beyond noise, by a paired bootstrap over items."""

import argparse
import json
import sys
from collections.abc import Sequence
from pathlib import Path

from marco_train.errors import InputError
from marco_train.evaluation.benchmark.compare import as_table, compare
from marco_train.files import replaces


def main(arguments: Sequence[str] | None = None) -> None:
    """Read the command line, print a table, and write the JSON where one is asked for."""
    parser = argparse.ArgumentParser(prog="compare_benchmarks", description=__doc__)
    parser.add_argument("first", type=Path, metavar="A", help="output_dir of a benchmark")
    parser.add_argument("second", type=Path, metavar="B", help="that of another")
    parser.add_argument("--json", type=Path, metavar="FILE", help="where to write the figures")
    parser.add_argument("--seed", type=int, default=0, help="of the resamples (0)")
    args = parser.parse_args(arguments)
    try:
        moved = compare(args.first, args.second, args.seed)
    except InputError as error:
        sys.exit(f"error: {error}")
    print("\n".join(as_table(moved)))
    if args.json is not None:
        found = {
            each.row: {
                "a": each.first,
                "b": each.second,
                "difference": each.difference,
                "ci95": list(each.ci95),
                "beyond_noise": each.is_beyond_noise,
                "n_items": each.num_items,
                "n_unpaired": each.num_unpaired,
            }
            for each in moved
        }
        with replaces(args.json) as partial:
            partial.write_text(json.dumps(found, indent=2) + "\n", encoding="utf-8")
