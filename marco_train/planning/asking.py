"""What a benchmark asks, and how long it takes: prompts, responses, tokens and hours."""

import math
from collections.abc import Sequence
from dataclasses import dataclass

from marco_train.config import TrainConfig
from marco_train.config.architecture import ArchitectureConfig
from marco_train.config.benchmark import BenchmarkConfig
from marco_train.config.rollout import key_bytes_a_token
from marco_train.distributed import world_size
from marco_train.planning.cards import CARDS, Card, card_of
from marco_train.planning.check import own_card
from marco_train.planning.memory import GIB, sizes_of
from marco_train.planning.seconds import Assumptions, weights_a_step

WORKSPACE_GIB = 8.0
"""Of a card, that a sampler leaves to what it computes with."""


@dataclass(frozen=True)
class AskedTask:
    """What a task asks."""

    name: str
    num_items: int
    num_responses: int
    """To each item."""
    mean_prompt: float
    """Tokens."""


def plan_asking(
    cfg: TrainConfig,
    architecture: ArchitectureConfig,
    tasks: Sequence[AskedTask],
    assumed: Assumptions | None = None,
) -> list[str]:
    """Lay out what a benchmark asks, a task a line, and how many hours it is planned to take.

    Raises:
        InputError: `stage.plan_gpu` is no card that is known.
    """
    assumed = assumed or Assumptions()
    stage: BenchmarkConfig = cfg.stage
    mean_response = assumed.mean_share_of_response * stage.max_response_length
    gpus = stage.plan_gpus or world_size()
    card = card_of(stage.plan_gpu) if stage.plan_gpu is not None else own_card()
    is_known = card is not None and card.is_gpu
    width = max(len(task.name) for task in tasks)
    head = (
        f"{'task':{width}} {'prompts':>9} {'responses':>10} {'prompt Mtok':>12} {'answer Mtok':>12}"
    )
    lines = [head + (f" {'hours':>7}" if is_known else "")] if stage.plan else []
    total_items = total_responses = 0
    total_prompt = total_answer = hours = 0.0
    for task in tasks:
        responses = task.num_items * task.num_responses
        prompt, answer = responses * task.mean_prompt, responses * mean_response
        total_items, total_responses = total_items + task.num_items, total_responses + responses
        total_prompt, total_answer = total_prompt + prompt, total_answer + answer
        line = f"{task.name:{width}} {task.num_items:>9,} {responses:>10,}"
        line += f" {prompt / 1e6:>12,.2f} {answer / 1e6:>12,.2f}"
        if card is not None and is_known:
            seconds = seconds_of(task, cfg, architecture, card, gpus, assumed)
            hours += seconds / 3600
            line += f" {seconds / 3600:>7.2f}"
        if stage.plan:
            lines.append(line)
    said = (
        f"plan: {len(tasks)} rows, {total_items:,} prompts, {total_responses:,} responses, "
        f"{total_prompt / 1e6:,.1f} million tokens of prompts and {total_answer / 1e6:,.1f} of "
        f"answers, if these take {mean_response:.0f} tokens in the mean"
    )
    if card is not None and is_known:
        lines.append(f"{said}; {hours:.1f} h on {gpus} x {card.name}")
    else:
        how = f"stage.plan_gpu={'|'.join(CARDS)} says how many hours a card takes"
        lines.append(f"{said}; {how}" if stage.plan else said)
    return lines


def seconds_of(
    task: AskedTask,
    cfg: TrainConfig,
    architecture: ArchitectureConfig,
    card: Card,
    gpus: int,
    assumed: Assumptions,
) -> float:
    """Seconds of a task: prompts by the card's products, answers by what their steps read."""
    stage: BenchmarkConfig = cfg.stage
    num_bytes = cfg.model.dtype.num_bytes
    mean_response = assumed.mean_share_of_response * stage.max_response_length
    mean_length = task.mean_prompt + mean_response
    responses = math.ceil(task.num_items * task.num_responses / gpus)
    sizes = sizes_of(architecture, 1)
    held = (sizes.dense + sizes.experts) * num_bytes
    free = max(0.0, (card.capacity_gib - WORKSPACE_GIB) * GIB - held)
    a_sequence = key_bytes_a_token(architecture, cfg.model.dtype) * mean_length
    most = getattr(stage.rollout, "batch_size", 256)
    batch = max(1, min(most, responses, int(free / a_sequence)))
    read = weights_a_step(architecture, batch) * num_bytes + batch * a_sequence / 2
    steps = max(mean_response, responses * mean_response / batch)
    sampling = steps * read / (card.bandwidth_gb * 1e9 * assumed.sampling_efficiency)
    active = weights_a_step(architecture, 1)
    prefill = 2 * active * task.mean_prompt * responses
    return sampling + prefill / (card.tflops * 1e12 * assumed.scoring_efficiency)
