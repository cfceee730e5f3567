"""What a run says of itself before its first step: a few lines, and header.json."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from marco_train.config import TrainConfig
from marco_train.config.architecture import ArchitectureConfig
from marco_train.config.opd import OPDConfig
from marco_train.config.optim import OptimConfig, Schedule
from marco_train.config.sft import SFTConfig
from marco_train.distributed import is_main, world_size
from marco_train.files import replaces
from marco_train.planning.memory import sizes_of
from marco_train.tracking import log_line

HEADER = "header.json"
MOST_SHOWN = 240
"""Characters of the example, the last of them."""


def say_header(
    cfg: TrainConfig,
    architecture: ArchitectureConfig,
    data: Mapping[str, Any],
    schedule_steps: int,
    plan_gib: float | None,
) -> None:
    """Print what runs and write it to header.json; the main rank does.

    Args:
        cfg: The run.
        architecture: The student's.
        data: As the loader's `header` gives it.
        schedule_steps: Updates that the learning rate's course spans.
        plan_gib: Of a rank, by the plan. None: there is no plan.
    """
    if not is_main():
        return
    header = header_of(cfg, architecture, data, schedule_steps, plan_gib)
    with replaces(Path(cfg.output_dir) / HEADER) as partial:
        partial.write_text(json.dumps(header, indent=2, ensure_ascii=False), encoding="utf-8")
    for line in header_lines(header):
        log_line(line)


def header_of(
    cfg: TrainConfig,
    architecture: ArchitectureConfig,
    data: Mapping[str, Any],
    schedule_steps: int,
    plan_gib: float | None,
) -> dict[str, Any]:
    """Collect the facts of a run; see `say_header`.

    Returns:
        As JSON. `rows_lost` are of `rows_judged`, by the metric that counts them; `epochs` and
        `tokens` of the whole run, without responses; `example` has » and « around what is learnt.
    """
    sizes = sizes_of(architecture, 1)
    share = 1.0
    if architecture.num_experts is not None and architecture.num_experts_per_tok is not None:
        share = architecture.num_experts_per_tok / architecture.num_experts
    return {
        "name": cfg.name,
        "stage": cfg.stage.kind.value,
        "output_dir": cfg.output_dir,
        "parameters": sizes.total,
        "active_parameters": sizes.dense + round(sizes.experts * share),
        "experts": architecture.num_experts,
        "experts_per_token": architecture.num_experts_per_tok,
        "dtype": cfg.model.dtype.value,
        "ranks": world_size(),
        "device": torch.cuda.get_device_name() if torch.cuda.is_available() else "CPU",
        "expert_parallel_size": cfg.parallel.expert_parallel_size,
        "zero_stage": cfg.parallel.zero_stage,
        "plan_gib": None if plan_gib is None else round(plan_gib, 3),
        **data,
        **_learning(cfg.stage, data),
        "optimizer": _optimizer(cfg.optim, schedule_steps),
    }


def _learning(stage: SFTConfig | OPDConfig, data: Mapping[str, Any]) -> dict[str, Any]:
    """What a step is made of, and what it lowers."""
    if isinstance(stage, OPDConfig):
        phases = {name: stage.phase_steps(name, data["rows"]) for name in stage.cascade}
        return {
            "batch": f"{stage.global_batch_size} prompts x {stage.responses_per_prompt} responses",
            "length": f"prompts of {stage.max_prompt_length} tokens, responses of "
            f"{stage.max_response_length}",
            "objective": f"reverse KL, {stage.objective.value}",
            "phases": phases,
        }
    return {
        "batch": f"{stage.global_batch_size} conversations",
        "length": f"{stage.max_length} tokens",
        "objective": f"cross-entropy of {stage.loss_tokens.value} tokens",
    }


def _optimizer(optim: OptimConfig, schedule_steps: int) -> str:
    falls = f" to {optim.min_learning_rate:g}" if optim.schedule is Schedule.cosine else ""
    return (
        f"learning rate {optim.learning_rate:g}{falls} ({optim.schedule.value}), warm-up of "
        f"{optim.num_warmup_steps(schedule_steps)} steps"
    )


def header_lines(header: Mapping[str, Any]) -> list[str]:
    """Lay a header out for a reader."""
    experts = (
        f", {header['experts_per_token']} of {header['experts']} experts a token"
        if header["experts"] is not None
        else ""
    )
    plan = "" if header["plan_gib"] is None else f", {header['plan_gib']:.2g} GiB a rank by plan"
    lost = ", ".join(f"{count:,} {name}" for name, count in header["rows_lost"].items())
    rows = f"{header['rows']:,} rows"
    if header["rows_judged"] < header["rows"]:
        rows += f", {header['rows_judged']:,} of them judged"
    kept = header["rows_judged"] - sum(header["rows_lost"].values())
    num_tokens = header["tokens"]
    tokens = "" if num_tokens is None else f", about {amount(num_tokens)} tokens"
    phases = ", then ".join(f"{name} {n:,}" for name, n in header.get("phases", {}).items())
    taught = f" ({phases})" if phases else ""
    what = "prompts" if header["stage"] == "opd" else "samples"
    lines = [
        f"{header['name']}: {header['stage']} in {header['output_dir']}",
        f"  model      {amount(header['parameters'])} parameters, "
        f"{amount(header['active_parameters'])} active{experts}, {header['dtype']}",
        f"  ranks      {header['ranks']}, experts over {header['expert_parallel_size']}, ZeRO "
        f"{header['zero_stage']}{plan}",
        f"  data       {rows}: {kept:,} kept, {lost or 'none dropped'}",
        f"  steps      {header['num_steps']:,}{taught} of {header['batch']}, at most "
        f"{header['length']}",
        f"  in all     {header['samples']:,} {what}, {header['epochs']:g} epochs{tokens}",
        f"  learning   {header['objective']}; {header['optimizer']}",
    ]
    if header["example"] is not None:
        last = header["example"][-MOST_SHOWN:].replace("\n", "⏎")
        # No row writes to the terminal what a terminal obeys.
        shown = "".join(c if c.isprintable() else "\ufffd" for c in last)
        begun = "…" if len(header["example"]) > MOST_SHOWN else ""
        sampled = "»…«" if header["stage"] == "opd" else ""
        lines.append(f"  example    {begun}{shown}{sampled}")
    return lines


def amount(count: int) -> str:
    """Write a large number in few characters, as 17.3 B."""
    for bound, unit in ((1e9, " B"), (1e6, " M"), (1e3, " k")):
        if count >= bound:
            return f"{count / bound:.3g}{unit}"
    return str(count)
