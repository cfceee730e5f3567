"""Say whether a run fits, how long it takes, and what would make it fit.

    scripts/plan.py experiment=marco_mini_opd [gpus=8] [gpu=h100-80] [key=value ...] [--json FILE]

Needs neither weights nor a GPU: the shape of a model that is not here yet is known from the
experiment, from a config.json under `model.path`, or from configs/model/. Ends with 1 where the
run does not fit, and with 2 where it cannot be planned.
"""

import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from hydra import compose, initialize_config_dir
from omegaconf import OmegaConf, open_dict

from marco_train.commands.examination import REFUSALS
from marco_train.config import TrainConfig, to_run
from marco_train.config.run import CONFIG_DIR
from marco_train.errors import InputError, require
from marco_train.train import in_one_line

DEFAULTS = {"gpus": "8", "gpu": "h100-80"}
NOT_HERE = "weights_that_are_not_here_yet"


def main(arguments: Sequence[str] | None = None) -> None:
    """Plan the run of a command line; ends with 0 where it fits, with 1 where it does not."""
    words = list(sys.argv[1:] if arguments is None else arguments)
    try:
        plan, file = plan_of(words)
    except REFUSALS as error:
        print(f"error: {in_one_line(error)}", file=sys.stderr)
        sys.exit(2)
    if file is not None:
        file.write_text(json.dumps(plan.as_json(), indent=1) + "\n")
    print(in_words(plan))
    sys.exit(0 if plan.fits else 1)


def plan_of(words: list[str]) -> tuple[Any, Path | None]:
    """Plan what the words of a command line say.

    Returns:
        The plan, and the file that it is to be written to.

    Raises:
        InputError: A word is of no use.
    """
    own, overrides, file = read_words(words)
    cfg = composed_without_weights(overrides)
    # Heavy libraries are imported from here on.
    from marco_train.planning.advice import advise
    from marco_train.planning.cards import card_of
    from marco_train.planning.plan import make_plan
    from marco_train.planning.seconds import Assumptions

    card = card_of(own.pop("gpu"))
    gpus = int(number(own.pop("gpus"), "gpus"))
    values: dict[str, Any] = {name: number(text, name) for name, text in own.items()}
    return make_plan(cfg, gpus, card, Assumptions(**values), advise), file


def read_words(words: list[str]) -> tuple[dict[str, str], list[str], Path | None]:
    """Part the command's own fields from the run's overrides.

    Returns:
        Own fields by name, overrides of the run, and the file that --json names.

    Raises:
        InputError: --json names no file.
    """
    own, overrides, file = dict(DEFAULTS), list[str](), None
    rest = iter(words)
    for word in rest:
        name, _, value = word.partition("=")
        if name == "--json":
            value = value or next(rest, "")
            require(bool(value), "--json names no file: give one behind it")
            file = Path(value)
        elif name in FIELDS:
            own[name] = value
        else:
            overrides.append(word)
    return own, overrides, file


def number(text: str, name: str) -> float:
    """Read a number.

    Raises:
        InputError: It is none.
    """
    try:
        return float(text)
    except ValueError as error:
        raise InputError(f"{name} is {text!r}, and must be a number") from error


def composed_without_weights(overrides: list[str]) -> TrainConfig:
    """Compose a config of which the weights need not be named."""
    with initialize_config_dir(version_base="1.3", config_dir=str(CONFIG_DIR)):
        found = compose("train", overrides=overrides)
    if found.model is not None and OmegaConf.is_missing(found.model, "path"):
        with open_dict(found):
            found.model.path = NOT_HERE
    return to_run(found)


FIELDS = {
    *DEFAULTS,
    "training_efficiency",
    "scoring_efficiency",
    "sampling_efficiency",
    "server_tokens_per_second",
    "mean_share_of_conversation",
    "mean_share_of_prompt",
    "mean_share_of_response",
    "imbalance",
    "disk_gib_per_second",
    "host_gib_per_node",
    "ranks_per_node",
}
"""Of this command, beside the run's: the cards, and the factors of `planning/seconds.py`."""


def in_words(plan: Any) -> str:
    """Lay a plan out for a reader, as Markdown."""
    phases = list(plan.phases)
    used = [
        name
        for name in next(iter(plan.phases.values())).components_gib
        if any(phase.components_gib[name] for phase in plan.phases.values())
    ]
    lines = [f"| GiB of a rank | {' | '.join(phases)} |", "|---" * (len(phases) + 1) + "|"]
    for name in used:
        cells = [f"{plan.phases[phase].components_gib[name]:.1f}" for phase in phases]
        lines.append(f"| {name} | {' | '.join(cells)} |")
    totals = [f"{plan.phases[phase].total_gib:.1f}" for phase in phases]
    lines.append(f"| **total** | {' | '.join(totals)} |")
    seconds = [f"{plan.phases[phase].seconds:.1f}" for phase in phases]
    lines.append(f"| seconds | {' | '.join(seconds)} |")
    verdict = "fits" if plan.fits else "does not fit"
    lines += [
        "",
        f"{plan.gpus} x {plan.gpu}: {plan.peak_gib:.1f} of {plan.capacity_gib:.1f} GiB in "
        f"{plan.peak_phase}, {verdict}; {plan.host_gib:.0f} GiB of host memory a node, "
        f"{plan.disk_gib:.0f} GiB of disk",
    ]
    if plan.run_hours is not None:
        lines.append(
            f"{plan.step_seconds:.1f} s a step, {plan.run_hours:.0f} hours, "
            f"{plan.gpu_hours:.0f} GPU-hours"
        )
    else:
        lines.append(f"{plan.step_seconds:.1f} s a step; the rows of an epoch were not counted")
    return "\n".join([*lines, *plan.advice])
