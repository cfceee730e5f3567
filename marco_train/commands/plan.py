"""Say whether a run fits, how long it takes, and what would make it fit.

    marco-train plan experiment=marco_mini_opd [gpus=8] [gpu=h100-80] [key=value ...] [--json FILE]

Needs neither weights nor a GPU: the shape of a model that is not here yet is known from the
experiment, from a config.json under `model.path`, or from configs/model/. The factors of
`planning/seconds.py` are fields too, such as training_efficiency=0.3 or imbalance=1.5, and
hardware=8xh100-80,8xh200-141 compares several plans. Ends with 1 where the run does not fit, and
with 2 where it cannot be planned.
"""

import gc
import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from omegaconf import OmegaConf, open_dict

from marco_train.config import TrainConfig, to_run
from marco_train.config.compose import compose
from marco_train.config.opd import OPDConfig
from marco_train.config.sft import SFTConfig
from marco_train.errors import InputError, require
from marco_train.hub import with_those_here

DEFAULTS = {"gpus": "8", "gpu": "h100-80"}
NOT_HERE = "weights_that_are_not_here_yet"


def main(arguments: Sequence[str] | None = None) -> None:
    """Plan the run of a command line; ends with 0 where it fits, with 1 where it does not."""
    words = list(sys.argv[1:] if arguments is None else arguments)
    if {"--help", "-h"} & set(words):
        print(__doc__)
        return
    gc.disable()  # what is imported stays, and looking through it takes half a second
    try:
        fits, said = answer(words)
    except InputError as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(2)
    finally:
        gc.enable()
    print(said)
    sys.exit(0 if fits else 1)


def answer(words: list[str]) -> tuple[bool, str]:
    """Plan what the words of a command line say.

    Returns:
        Whether all that was planned fits, and what to print.

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

    gpus, gpu, hardware = own.pop("gpus"), own.pop("gpu"), own.pop("hardware", None)
    values: dict[str, Any] = {name: number(text, name) for name, text in own.items()}
    assumed = Assumptions(**values)
    several = hardware is not None
    require(not several or file is None, "--json writes one plan, and hardware names several")
    epoch_rows, absent = rows_of_an_epoch(cfg)
    plans = [
        make_plan(
            cfg,
            whole_number(count, "gpus"),
            card_of(name),
            assumed,
            None if several else advise,
            epoch_rows=epoch_rows,
        )
        for count, _, name in (
            part.partition("x") for part in (hardware or f"{gpus}x{gpu}").split(",")
        )
    ]
    if file is not None:
        file.write_text(json.dumps(plans[0].as_json(), indent=1) + "\n")
    said = side_by_side(plans) if several else in_words(plans[0], absent)
    return all(plan.fits for plan in plans), said


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


def whole_number(text: str, name: str) -> int:
    """Read a whole number.

    Raises:
        InputError: It is none.
    """
    found = number(text, name)
    require(found.is_integer(), f"{name} is {text}, and must be a whole number")
    return int(found)


def composed_without_weights(overrides: list[str]) -> TrainConfig:
    """Compose a config of which the weights need not be named.

    Raises:
        InputError: They are not, and no shape is given either.
    """
    found = with_those_here(compose(overrides))
    if OmegaConf.is_missing(found.model, "path"):
        require(
            found.model.architecture is not None,
            "no architecture is known: give model.path=<directory with a config.json>, "
            "model=<group>, or an experiment that has one",
        )
        with open_dict(found):
            found.model.path = NOT_HERE
    return to_run(found)


def rows_of_an_epoch(cfg: TrainConfig) -> tuple[int | None, str | None]:
    """Count the rows of an epoch as the run does, where its length is given in epochs.

    Returns:
        Their number, or None where nobody asks for it or they are not here; and the first source
        that is not.

    Raises:
        InputError: They are here, and cannot be read.
    """
    if not isinstance(cfg.stage, SFTConfig | OPDConfig) or not cfg.stage.counts_epochs:
        return None, None
    from marco_train.data.loader import trained_stream
    from marco_train.data.sources import lies_here

    for name, source in cfg.data.sources.items():
        if not lies_here(source):
            return None, f"data.sources.{name} ({source.path})"
    return trained_stream(cfg.data, cfg.seed).num_rows, None


FIELDS = {
    *DEFAULTS,
    "hardware",
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


def in_words(plan: Any, absent: str | None) -> str:
    """Lay a plan out for a reader, as Markdown.

    Args:
        plan: What `make_plan` gave.
        absent: The source of which the rows could not be counted.
    """
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
    if plan.lack_of_keys is not None:
        lines.append(f"it would end at its start: {plan.lack_of_keys}")
    if plan.run_hours is not None:
        lines.append(
            f"{plan.step_seconds:.1f} s a step, {hours(plan.run_hours)}, "
            f"{plan.gpu_hours:.{1 if plan.gpu_hours < 10 else 0}f} GPU-hours"
        )
    else:
        lines.append(
            f"{plan.step_seconds:.1f} s a step; the rows of an epoch were not counted, as those of "
            f"{absent} are no files of this machine"
        )
    return "\n".join([*lines, plan.basis, *plan.advice])


def hours(count: float) -> str:
    """Write a time in hours, or in minutes where it is less than two."""
    return f"{count:.0f} hours" if count >= 2 else f"{60 * count:.0f} minutes"


def side_by_side(plans: Sequence[Any]) -> str:
    """Lay the plans of one run on several cards out as a Markdown table."""
    names = [f"{plan.gpus} x {plan.gpu}" for plan in plans]
    rows = {
        f"{phase}, GiB": [f"{plan.phases[phase].total_gib:.1f}" for plan in plans]
        for phase in plans[0].phases
    }
    rows |= {
        "of": [f"{plan.capacity_gib:.1f}" for plan in plans],
        "fits": ["yes" if plan.fits else "**no**" for plan in plans],
        "host a node, GiB": [f"{plan.host_gib:.0f}" for plan in plans],
        "disk, GiB": [f"{plan.disk_gib:.0f}" for plan in plans],
        "a step, s": [f"{plan.step_seconds:.1f}" for plan in plans],
        "GPU-hours": ["-" if p.gpu_hours is None else f"{p.gpu_hours:.0f}" for p in plans],
    }
    lines = [f"| | {' | '.join(names)} |", "|---" * (len(plans) + 1) + "|"]
    lines += [f"| {name} | {' | '.join(cells)} |" for name, cells in rows.items()]
    return "\n".join(lines)
