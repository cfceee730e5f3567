"""Write the newest revision of each benchmark's set at the hub into its task, where none stands.

marco-train benchmark pin [--again]
"""

import argparse
import sys
from collections.abc import Callable, Sequence
from pathlib import Path

from marco_train.config.benchmark import BENCHMARK_DIR
from marco_train.errors import InputError
from marco_train.evaluation.benchmark.tasks import task_set_of
from marco_train.files import replaces

NAMED = "    revision: "


def main(arguments: Sequence[str] | None = None) -> None:
    """Read the command line and pin what is to be pinned."""
    parser = argparse.ArgumentParser(prog="marco-train benchmark pin", description=__doc__)
    parser.add_argument("--again", action="store_true", help="also where a revision stands")
    args = parser.parse_args(arguments)
    try:
        for task, revision in pin(BENCHMARK_DIR / "tasks", newest, again=args.again).items():
            print(f"{task}: {revision}")
    except InputError as error:
        sys.exit(f"error: {error}")


def pin(folder: Path, revision_of: Callable[[str], str], *, again: bool) -> dict[str, str]:
    """Write revisions into the files of tasks; the rest of them stays as it is.

    Args:
        folder: Of the tasks' files.
        revision_of: Gives the newest revision of a set of the hub.
        again: Whether to replace revisions that stand there.

    Returns:
        The revisions by task, of those that were written.
    """
    found = {}
    for file in sorted(folder.glob("[!_]*.yaml")):
        text = file.read_text(encoding="utf-8")
        given = next((line for line in text.splitlines() if line.startswith(NAMED)), None)
        if given is None or (given != f"{NAMED}null" and not again):
            continue
        revision = revision_of(task_set_of(file.stem)["path"])
        with replaces(file) as partial:
            partial.write_text(text.replace(given, f"{NAMED}{revision}", 1), encoding="utf-8")
        found[file.stem] = revision
    return found


def newest(path: str) -> str:
    """Revision of a set of the hub.

    Raises:
        InputError: The hub is not reached, or has no such set.
    """
    from huggingface_hub import HfApi
    from huggingface_hub.errors import HfHubHTTPError

    try:
        found = HfApi().dataset_info(path).sha
    except (OSError, ValueError, HfHubHTTPError) as error:
        raise InputError(f"the hub does not say the revision of {path!r}: {error}") from error
    if found is None:
        raise InputError(f"the hub has no revision of {path!r}")
    return found
