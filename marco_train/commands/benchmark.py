"""Ask a model the model card's benchmarks.

    marco-train benchmark model.path=PATH suite=card [output_dir=D] [key=value ...]
    recipes/benchmark.sh model.path=PATH suite=card ...   # on all GPUs

Keys of the stage need no `stage.`: suite, plan, data_dir, languages, responses_per_prompt.
"""

import sys
from collections.abc import Iterator, Sequence
from dataclasses import fields

from marco_train import train
from marco_train.config.benchmark import BenchmarkConfig

KEYS = {field.name for field in fields(BenchmarkConfig)}


def main(words: Sequence[str] | None = None) -> None:
    """Run the benchmark that a command line asks for, as a stage of its own."""
    words = list(sys.argv[1:] if words is None else words)
    if {"--help", "-h"} & set(words):
        print(__doc__.strip())
        return
    train.main(["experiment=benchmark", *as_overrides(words)])


def as_overrides(words: Sequence[str]) -> Iterator[str]:
    """Put the keys of the stage where Hydra finds them."""
    for word in words:
        key, equals, value = word.partition("=")
        if not equals or key.partition(".")[0] not in KEYS:
            yield word
        elif key == "suite":
            # Quoted, as Hydra takes a comma for a choice of several runs.
            yield f"stage.suite='{value}'"
        else:
            yield f"stage.{word}"


if __name__ == "__main__":
    main()
