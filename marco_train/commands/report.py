"""Make one HTML page of a run, at any time: `marco-train report DIR [--output FILE]`."""

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

from marco_train.errors import InputError
from marco_train.evaluation.run_page import REPORT, write_run_page


def main(arguments: Sequence[str] | None = None) -> int:
    """Read the command line and write the page; ends with 1 where it cannot."""
    parser = argparse.ArgumentParser(prog="report", description=__doc__)
    parser.add_argument("directory", type=Path, help="output_dir of a run, which may go on")
    parser.add_argument("--output", type=Path, help="file to write (report.html in the directory)")
    args = parser.parse_args(arguments)
    output: Path = args.output or args.directory / REPORT
    try:
        write_run_page(args.directory, output)
    except InputError as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    except OSError as error:
        print(f"error: {output} cannot be written: {error}", file=sys.stderr)
        return 1
    print(output)
    return 0
