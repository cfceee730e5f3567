"""What a run needs of its cards and of its disk, asked before it loads anything."""

from dataclasses import dataclass

import torch

from marco_train.checkpoint import check_room
from marco_train.config import TrainConfig
from marco_train.config.architecture import ArchitectureConfig
from marco_train.config.planning import PlanCheck
from marco_train.config.resumption import checkpoints_of
from marco_train.distributed import is_main, world_size
from marco_train.errors import InputError, require
from marco_train.metrics import StepWork
from marco_train.planning.advice import advise
from marco_train.planning.cards import Card, card_of_device
from marco_train.planning.memory import GIB, Memory
from marco_train.planning.plan import STATED_ERROR, make_plan
from marco_train.planning.seconds import Assumptions
from marco_train.planning.trace import Shapes, trace_update
from marco_train.tracking import log_line

# What this process holds itself by then: a context, and NCCL's buffers.
OWN_GIB = 2.0
CPU = Card("cpu", 0.0, 0.0, 0.0, is_gpu=False)


@dataclass(frozen=True)
class RunPlan:
    """What is known of a run before it loads anything."""

    gib: float | None = None
    """Of a rank, at its peak; on a CPU of weights, masters and moments alone. None: not known."""
    work: StepWork | None = None
    """Of a step. None: the card is unknown, and so is what it can do."""


def check_plan(cfg: TrainConfig, architecture: ArchitectureConfig) -> RunPlan:
    """Say in a line what the run needs, and refuse one that cannot fit.

    Raises:
        InputError: The plan is over the card's memory by more than it may err, and
            `planning.check` is `refuse`; says what would make the run fit.
    """
    if cfg.planning.check is PlanCheck.off:
        return RunPlan()
    card = own_card()
    if card is None or not card.is_gpu:
        return RunPlan(_say_state(cfg, architecture))
    memory = Memory(cfg, architecture, world_size(), card, Assumptions().imbalance)
    try:
        plan = make_plan(cfg, world_size(), card, advise=advise, architecture=architecture)
    except InputError as error:
        # A teacher of another family than ours has no shape here, and may well fit.
        if is_main():
            log_line(f"plan: none, as {error}")
        return RunPlan(work=step_work(memory))
    if is_main():
        log_line(plan.in_a_line())
    over = plan.peak_gib > plan.capacity_gib * (1 + STATED_ERROR)
    says = " or ".join(plan.advice)
    require(
        not over or cfg.planning.check is PlanCheck.warn,
        f"the plan of this run needs {plan.peak_gib:.1f} GiB of a GPU in its phase "
        f"{plan.peak_phase!r}, which has {plan.capacity_gib:.1f}: {says}; planning.check=warn "
        "starts it all the same",
    )
    if over and is_main():
        log_line(f"the plan does not fit: {says}")
    if cfg.planning.check is PlanCheck.refuse:
        free, capacity = torch.cuda.mem_get_info()
        check_free(plan.peak_gib, free / GIB, capacity / GIB)
    return RunPlan(plan.peak_gib, step_work(memory))


def planned_teacher_bytes(cfg: TrainConfig, architecture: ArchitectureConfig) -> int:
    """What teachers will take of this rank's memory; 0 where one's shape is not known."""
    try:
        return Memory(cfg, architecture, world_size(), CPU, imbalance=1.0).teacher_bytes()
    except InputError:
        return 0


def check_free(needed_gib: float, free_gib: float, capacity_gib: float) -> None:
    """Refuse a card of whose memory others hold what the run needs; nothing is loaded yet.

    Raises:
        InputError: Gives what is needed, what is free, and what others hold.
    """
    held = capacity_gib - free_gib
    require(
        held <= OWN_GIB or needed_gib <= free_gib + OWN_GIB,
        f"the plan of this run needs {needed_gib:.1f} GiB of a GPU, of whose {capacity_gib:.1f} "
        f"only {free_gib:.1f} are free: another process holds {held:.1f}. End it, or choose other "
        "GPUs with CUDA_VISIBLE_DEVICES; planning.check=warn starts the run all the same",
    )


def check_disk(cfg: TrainConfig, architecture: ArchitectureConfig) -> None:
    """Refuse a run whose checkpoints and exports its directory has no room for.

    Raises:
        InputError: Gives what is needed and what is free.
    """
    memory = Memory(cfg, architecture, world_size(), CPU, Assumptions().imbalance)
    if memory.num_checkpoints:
        whole = memory.state * world_size()
        check_room(checkpoints_of(cfg), whole, memory.num_checkpoints, memory.exports)


def own_card() -> Card | None:
    """The card of this rank; None: one of which is not known what it can do."""
    if not torch.cuda.is_available():
        return CPU
    _, capacity = torch.cuda.mem_get_info()
    return card_of_device(torch.cuda.get_device_name(), capacity / GIB)


def _say_state(cfg: TrainConfig, architecture: ArchitectureConfig) -> float:
    """Say what needs no trace, which would take seconds that a run on a CPU has better use for.

    Returns:
        GiB of a rank.
    """
    memory = Memory(cfg, architecture, world_size(), CPU, Assumptions().imbalance)
    gib = (memory.weights + 12 * memory.partition) / GIB
    if is_main():
        log_line(f"plan: {gib:.2f} GiB a rank of weights, masters and moments")
    return gib


def step_work(memory: Memory) -> StepWork:
    """What the tokens of a step compute on all ranks, with what a backward pass needs of it."""
    shapes: Shapes = memory.update_shapes()
    work = trace_update(shapes).forward_work
    squares = sum(length**2 for length in shapes.lengths())
    return StepWork(
        # Backward has two products for each of a forward pass; what is computed again is not work.
        per_token=3 * work.layers / shapes.num_tokens,
        per_loss_token=3 * work.head / shapes.num_tokens,
        # A causal token sees half of its sequence.
        per_token_and_key=3 * work.attention / squares / 2,
        peak=memory.card.tflops * 1e12 * memory.gpus,
    )
