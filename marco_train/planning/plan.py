"""The plan of a run: what it holds, how long it takes, and whether it fits."""

from collections.abc import Callable
from dataclasses import asdict, dataclass
from typing import Any

from marco_train.config import TrainConfig
from marco_train.config.architecture import ArchitectureConfig, check_expert_parallel
from marco_train.config.lengths import check_positions
from marco_train.config.opd import OPDConfig
from marco_train.config.stage import UntrainedStageConfig
from marco_train.config.teacher import NativeTeacherConfig, VLLMServerTeacherConfig
from marco_train.errors import require, require_positive
from marco_train.planning.cards import Card
from marco_train.planning.memory import GIB, Memory, total
from marco_train.planning.seconds import Assumptions, Time
from marco_train.planning.shapes import student_shape, teacher_architecture

STATED_ERROR = 0.1
"""By how much of the predicted peak a measured one may differ."""


@dataclass(frozen=True)
class PlannedPhase:
    """What one rank holds at the worst moment of a phase, and how long the phase takes."""

    total_gib: float
    components_gib: dict[str, float]
    seconds: float


@dataclass(frozen=True)
class Plan:
    """What a run needs; GiB are of one rank, but for the host's memory and the disk."""

    gpus: int
    gpu: str
    capacity_gib: float
    phases: dict[str, PlannedPhase]
    peak_gib: float
    peak_phase: str
    fits: bool
    lack_of_keys: str | None
    """Why a sampler would refuse to start, though no phase needs more than there is."""
    host_gib: float
    """Of a node."""
    disk_gib: float
    step_seconds: float
    run_hours: float | None
    """None: the rows of an epoch were not counted."""
    gpu_hours: float | None
    basis: str
    """What hours and seconds are of, and the factors that matter most."""
    assumptions: dict[str, Any]
    advice: list[str]

    def as_json(self) -> dict[str, Any]:
        """The plan as plain values."""
        return asdict(self)

    def in_a_line(self) -> str:
        """For the header of a run."""
        said = f"plan: {self.peak_gib:.1f} GiB a rank in {self.peak_phase}"
        return f"{said} of {self.capacity_gib:.1f} ({self.gpus} x {self.gpu})"


def make_plan(
    cfg: TrainConfig,
    gpus: int,
    card: Card,
    assumed: Assumptions | None = None,
    advise: Callable[[TrainConfig, int, Card, Assumptions], list[str]] | None = None,
    architecture: ArchitectureConfig | None = None,
    epoch_rows: int | None = None,
) -> Plan:
    """Plan a run.

    Args:
        cfg: Checked.
        gpus: Ranks.
        card: What each of them has.
        assumed: Factors. None: the defaults.
        advise: Says what would make a run fit that does not; see `planning/advice.py`.
        architecture: The student's. None: as the config or its files say.
        epoch_rows: Rows of an epoch, where the run's length is given in epochs. None: they were not
            counted, and nor are the run's hours.

    Raises:
        InputError: The run cannot be planned: it trains nothing, has no known shape, or its ranks
            do not share the experts evenly.
    """
    assumed = assumed or Assumptions()
    require(
        not isinstance(cfg.stage, UntrainedStageConfig),
        "this stage trains nothing, and has no plan of memory: choose an experiment of SFT or OPD",
    )
    architecture = architecture or student_shape(cfg)
    check_ranks(cfg, architecture, gpus)
    memory = Memory(cfg, architecture, gpus, card, assumed.imbalance)
    time = Time(memory, assumed)
    seconds = time.phases()
    phases = {
        name: PlannedPhase(
            round(total(parts.values()), 3),
            {part: round(size / GIB, 3) for part, size in parts.items()},
            round(seconds[name], 2),
        )
        for name, parts in memory.phases().items()
    }
    peak_phase = max(phases, key=lambda name: phases[name].total_gib)
    peak = phases[peak_phase].total_gib
    ranks_per_node = min(gpus, assumed.ranks_per_node)
    host = memory.host(ranks_per_node) / GIB
    lack_of_keys = memory.lack_of_keys
    fits = peak <= card.capacity_gib and lack_of_keys is None
    fits = fits and (not card.is_gpu or host <= assumed.host_gib_per_node)
    num_steps = time.num_steps(epoch_rows)
    hours = None if num_steps is None else num_steps * time.step() / 3600
    said = asdict(assumed)
    said |= {"mean_tokens": round(time.mean_length), "wire_gib_per_step": time.wire_gib()}
    said |= {"peak_tflops": card.tflops, "bandwidth_gb": card.bandwidth_gb}
    advice = [] if fits or advise is None else advise(cfg, gpus, card, assumed)
    return Plan(
        gpus,
        card.name,
        round(card.capacity_gib, 2),
        phases,
        peak,
        peak_phase,
        fits,
        lack_of_keys,
        round(host, 1),
        round(memory.disk() / GIB, 1),
        round(time.step(), 2),
        None if hours is None else round(hours, 3),
        None if hours is None else round(hours * gpus, 3),
        basis_of(cfg, assumed, num_steps, epoch_rows),
        said,
        advice,
    )


def basis_of(
    cfg: TrainConfig, assumed: Assumptions, num_steps: int | None, epoch_rows: int | None = None
) -> str:
    """Say in a line what a plan's hours and seconds are of, and what they are reckoned with."""
    said = [] if num_steps is None else [f"{num_steps} steps"]
    if epoch_rows is not None:
        said.append(f"an epoch has {epoch_rows:,} rows")
    if cfg.checkpoint.save_every is not None:
        said.append(f"checkpoint seconds are per save, every {cfg.checkpoint.save_every} steps")
    assume = f"assumed: {assumed.training_efficiency:.0%} of a card's peak in training"
    if isinstance(cfg.stage, OPDConfig):
        phases = cfg.stage.cascade.values()
        teachers = [t for p in phases for t in (p.teacher, *p.teachers_by_group.values())]
        if any(isinstance(teacher, VLLMServerTeacherConfig) for teacher in teachers):
            said.append("GPUs of teachers on servers are not counted")
        longest = cfg.stage.max_response_length
        mean = assumed.mean_share_of_response * longest
        assume += (
            f", {assumed.scoring_efficiency:.0%} in scoring, {assumed.sampling_efficiency:.0%} of "
            f"its bandwidth in sampling; responses of {mean:.0f} tokens on average "
            f"and {longest} at most, the batch shrinking as they end"
        )
    return "; ".join([*said, assume])


def check_ranks(cfg: TrainConfig, architecture: ArchitectureConfig, gpus: int) -> None:
    """Refuse ranks that do not share experts evenly, as a launch would.

    Raises:
        InputError: Gives both numbers.
    """
    require_positive("plan", gpus=gpus)
    check_expert_parallel(architecture, cfg.parallel.expert_parallel_size)
    check_positions(cfg.stage, architecture.max_position_embeddings, "the model")
    shared = {"parallel.expert_parallel_size": cfg.parallel.expert_parallel_size}
    if isinstance(cfg.stage, OPDConfig):
        for name, phase in cfg.stage.cascade.items():
            teacher = phase.teacher
            if isinstance(teacher, NativeTeacherConfig):
                check_expert_parallel(
                    teacher_architecture(teacher.path), teacher.expert_parallel_size
                )
                where = f"stage.cascade.{name}.teacher.expert_parallel_size"
                shared[where] = teacher.expert_parallel_size
    for name, size in shared.items():
        require(
            gpus % size == 0,
            f"gpus is {gpus}, and {name} {size} does not divide it: plan for a multiple of {size} "
            f"GPUs, or set {name} to a divisor of {gpus}",
        )
