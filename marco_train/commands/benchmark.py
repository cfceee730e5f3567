"""Ask a model the model card's benchmarks.

    marco-train benchmark model.path=PATH suite=card [output_dir=D] [key=value ...]
    marco-train benchmark model.path=PATH benchmark=own own.path=my.jsonl own.verifier=number
    marco-train benchmark pin [--again]   # writes the newest revisions of the sets into the tasks
    recipes/benchmark.sh model.path=PATH suite=card ...   # on all GPUs

Keys of the stage need no `stage.`: suite, plan, data_dir, languages, responses_per_prompt, greedy.
"""

import sys
from collections.abc import Iterator, Sequence
from dataclasses import fields

from marco_train import train
from marco_train.config.benchmark import BenchmarkConfig

KEYS = {field.name for field in fields(BenchmarkConfig)}
# As Hydra takes a comma for a choice of several runs, and braces for a dictionary.
QUOTED = {"suite", "own.prompt"}


def main(words: Sequence[str] | None = None) -> None:
    """Run the benchmark that a command line asks for, as a stage of its own."""
    words = list(sys.argv[1:] if words is None else words)
    if words[:1] == ["pin"]:
        # Others need not wait for its import.
        from marco_train.commands import pin_benchmarks

        pin_benchmarks.main(words[1:])
        return
    if {"--help", "-h"} & set(words):
        print(__doc__.strip())
        return
    train.main(["experiment=benchmark", *as_overrides(words)])


def as_overrides(words: Sequence[str]) -> Iterator[str]:
    """Put the keys of the stage where Hydra finds them."""
    for word in words:
        key, equals, value = word.partition("=")
        key = "suite" if key == "benchmark" else key
        if not equals or key.partition(".")[0] not in KEYS:
            yield word
        elif key in QUOTED:
            yield f"stage.{key}='{value}'"
        else:
            yield f"stage.{word}"


if __name__ == "__main__":
    main()
