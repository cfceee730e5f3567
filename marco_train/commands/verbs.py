"""marco-train: post-training of Mixture-of-Experts models.

A verb is imported only once it is asked for, so that --help answers at once.
"""

import sys
from collections.abc import Sequence
from difflib import get_close_matches
from importlib import import_module
from importlib.metadata import version

VERBS = {
    "train": ("marco_train.train", "run a stage; the verb may be left out"),
    "doctor": ("marco_train.commands.doctor", "make all of a run up to its first update"),
    "plan": ("marco_train.commands.plan", "say whether a run fits, and how long it takes"),
    "inspect": ("marco_train.commands.inspect_data", "look at a data set as a run would"),
    "decontaminate": ("marco_train.commands.decontaminate", "look for benchmarks in rows"),
    "curate": ("marco_train.commands.curate", "build translation, culture or science data"),
    "chat": ("marco_train.commands.chat", "talk to a model in the terminal"),
    "upcycle": ("marco_train.commands.upcycle", "make an MoE model from a dense one"),
    "benchmark": ("marco_train.commands.benchmark", "ask a model the card's benchmarks"),
    "signatures": ("marco_train.commands.signatures", "see which experts each language uses"),
    "report": ("marco_train.commands.report", "make one page of what a run measured"),
    "card": ("marco_train.commands.card", "write the model card of a run for the hub"),
    "checkpoint": ("marco_train.commands.checkpoint", "list, verify and export saved states"),
    "env": ("marco_train.commands.env", "print what a bug report needs"),
}
"""Where each verb's `main(words)` lies, and what it does."""

USAGE = """usage: marco-train [train] experiment=<name> [key=value ...]
       marco-train <verb> [--help] ...
       marco-train --version

{verbs}

A run of your own:
  marco-train experiment=sft model.path=<directory or org/name> data=own data.path=rows.jsonl
  marco-train experiment=opd model.path=... teacher.path=... data=own data.path=prompts.jsonl
  marco-train --config-dir DIR experiment=mine     # DIR/experiment/mine.yaml
  marco-train experiment=sft --cfg job             # prints a run
On several GPUs, in a checkout, and elsewhere (torchrun, whose report of a refusal is kept back):
  recipes/run.sh <experiment> [--config-dir DIR] [key=value ...]
  python -m marco_train.commands.launch --nproc_per_node 8 -m marco_train.train [key=value ...]"""


def main(words: Sequence[str] | None = None) -> None:
    """Hand a command line on to its verb; without one, it trains."""
    words = list(sys.argv[1:] if words is None else words)
    first = words[0] if words else "--help"
    if first in {"--help", "-h", "help"}:
        print(USAGE.format(verbs="\n".join(f"  {v:14} {does}" for v, (_, does) in VERBS.items())))
        return
    if first in {"--version", "-V"}:
        print(f"marco-train {version('marco-train')}")
        return
    if first in VERBS:
        words = words[1:]
    elif _is_word(first):
        near = get_close_matches(first, VERBS, 1, 0.5)
        hint = f"did you mean {near[0]}? " if near else ""
        sys.exit(f"error: there is no verb {first!r}; {hint}known are {', '.join(VERBS)}")
    else:
        first = "train"
    sys.exit(import_module(VERBS[first][0]).main(words))


def _is_word(text: str) -> bool:
    """Whether it can be no override and no option."""
    return "=" not in text and not text.startswith(("-", "~", "+"))


if __name__ == "__main__":
    main()
