"""What on-policy distillation does: its objective, and the cascade of its teachers."""

from dataclasses import dataclass, field
from enum import Enum

from omegaconf import MISSING

from marco_train.config.rollout import RolloutConfig, VLLMServerRolloutConfig
from marco_train.config.stage import steps_of
from marco_train.config.teacher import TeacherConfig
from marco_train.config.trained import TrainedStageConfig
from marco_train.errors import require, require_positive


class Objective(Enum):
    """How the reverse KL of an OPD step is estimated; see `losses/distillation.py`."""

    sampled = "sampled"
    topk = "topk"
    full = "full"


class TopKSource(Enum):
    """Whose likeliest tokens the top-k objective tells apart.

    sampler: the policy's own; teacher: the teacher's, for servers that give no others.
    """

    sampler = "sampler"
    teacher = "teacher"


@dataclass(kw_only=True)
class ScoreCacheConfig:
    """Teachers' scores kept on disk; see `teachers/cache.py`."""

    path: str | None = None
    """Directory; may be shared by ranks and runs. None: every rollout is scored by its teacher."""
    max_gib: float = 16
    """Bound on its size; the oldest scores go first."""

    def __post_init__(self) -> None:
        require_positive("stage.score_cache", max_gib=self.max_gib)


@dataclass(kw_only=True)
class EarlySwitchConfig:
    """When a phase ends before its last step: the held-out reverse KL falls no more."""

    measure_every: int | None = None
    """Steps between two measures, the first before the first step of the phase. None: the phase
    makes all its steps."""
    num_prompts: int = 256
    """Of data.held_out; each gets one response."""
    num_measures: int = 3
    """The phase ends where the best of so many measures in a row ..."""
    min_fall: float = 0.01
    """... lies less than this below the best before them, in nats a token."""

    def __post_init__(self) -> None:
        require_positive(
            "stage.cascade.*.early_switch",
            measure_every=self.measure_every,
            num_prompts=self.num_prompts,
            num_measures=self.num_measures,
        )
        require(
            0 <= self.min_fall < float("inf"),
            f"stage.cascade.*.early_switch.min_fall is {self.min_fall}, and must be 0 or more nats",
        )


@dataclass(kw_only=True)
class PhaseConfig:
    """One teacher of a cascade and how long it teaches."""

    teacher: TeacherConfig = MISSING
    """Of every rollout without a teacher of its own."""
    teachers_by_group: dict[str, TeacherConfig] = field(default_factory=dict)
    """Teachers of some rollouts, by `category_<name>` or `language_<code>`; the category decides
    where both have one."""
    num_steps: int | None = None
    """Of which the learning rate's schedule knows; fewer where the phase converges. None:
    `num_epochs` says it."""
    num_epochs: float | None = None
    """Length in epochs, in place of `num_steps`: so many times all rows of the sources, in updates
    of `global_batch_size` prompts. The last update of a cascade of one phase takes those that are
    left. None: `num_steps` says it."""
    early_switch: EarlySwitchConfig = field(default_factory=EarlySwitchConfig)

    def __post_init__(self) -> None:
        require_positive("stage.cascade.*", num_steps=self.num_steps, num_epochs=self.num_epochs)
        require(
            (self.num_steps is None) != (self.num_epochs is None),
            f"stage.cascade.*.num_steps is {self.num_steps} and stage.cascade.*.num_epochs is "
            f"{self.num_epochs}: give one of them to each phase, and null for the other",
        )
        for group in self.teachers_by_group:
            require(
                group.startswith(("category_", "language_")),
                f"stage.cascade.*.teachers_by_group names {group!r}; name a group "
                "category_<name> or language_<code>",
            )


@dataclass(kw_only=True)
class OPDConfig(TrainedStageConfig):
    """On-policy distillation from a cascade of teachers."""

    objective: Objective = MISSING
    max_importance_ratio: float | None = 2.0
    """Cap on the weight policy/sampler of a token's gradient in the `sampled` objective, any number
    above 0; inert while both are the same weights. None: no cap."""
    max_advantage: float | None = None
    """Bound on |log teacher - log sampler| in the `sampled` objective, in nats. None: no bound."""
    top_k: int | None = None
    """Tokens that the `topk` objective tells apart; the others are one bucket. None: another
    objective is chosen."""
    top_k_source: TopKSource = TopKSource.sampler
    max_sampler_mismatch: float | None = 0.2
    """Mean |log policy - log sampler| of a step's tokens above which the run stops, in nats;
    bfloat16 kernels differ by a tenth of the default. None: no bound."""
    global_batch_size: int = MISSING
    """Prompts of one update, over all ranks."""
    responses_per_prompt: int = MISSING
    """Responses that are sampled for each prompt of an update."""
    max_prompt_length: int = MISSING
    """Tokens; longer prompts are dropped and counted. Not given: half of the model's positions, of
    4096 at most."""
    max_response_length: int = MISSING
    """Tokens; a longer response is cut and counted. Not given: as for prompts."""
    drop_repetitive: bool = False
    """Whether responses that end in a loop have no loss; `rollout/repetition` tells their share. A
    loop is where the policy went wrong and the teacher can correct it, so it is learnt from unless
    loops take most of the tokens."""
    identify_languages: bool = False
    """Whether `rollout/lang_match` tells which responses are in the language of their prompt; needs
    `pip install 'marco-train[languages]'`."""
    rollout: RolloutConfig = MISSING
    score_cache: ScoreCacheConfig = field(default_factory=ScoreCacheConfig)
    cascade: dict[str, PhaseConfig] = field(default_factory=dict)
    """Phases in their order, by name."""

    def __post_init__(self) -> None:
        super().__post_init__()
        require_positive(
            "stage",
            max_importance_ratio=self.max_importance_ratio,
            max_advantage=self.max_advantage,
            top_k=self.top_k,
            max_sampler_mismatch=self.max_sampler_mismatch,
            global_batch_size=self.global_batch_size,
            responses_per_prompt=self.responses_per_prompt,
            max_prompt_length=self.max_prompt_length,
            max_response_length=self.max_response_length,
        )
        require(
            self.eval.max_response_length is None,
            f"stage.eval.max_response_length is {self.eval.max_response_length}, and OPD's sampler "
            "makes all answers: give stage.max_response_length alone",
        )
        require(len(self.cascade) > 0, "stage.cascade has no phase: name at least one teacher")
        for name, phase in self.cascade.items():
            require(
                not phase.teachers_by_group or self.objective is not Objective.full,
                f"stage.cascade.{name} has several teachers, and stage.objective=full multiplies "
                "hidden states by the head of one: choose sampled or topk",
            )
        require(
            (self.top_k is not None) == (self.objective is Objective.topk),
            f"stage.top_k is {self.top_k} and stage.objective is {self.objective.value}; give "
            "stage.top_k with stage.objective=topk, and null with any other",
        )

    def phase_steps(self, name: str, epoch_rows: int | None) -> int:
        """Steps of a phase, unless it converges before.

        Args:
            name: Of the phase.
            epoch_rows: Prompts of an epoch; not needed where `num_steps` says it.
        """
        phase = self.cascade[name]
        size = self.global_batch_size
        return self.capped(steps_of(phase.num_steps, phase.num_epochs, size, epoch_rows))

    @property
    def counts_epochs(self) -> bool:
        """Whether the length of a phase depends on the rows of an epoch."""
        return any(phase.num_steps is None for phase in self.cascade.values())

    def total_steps(self, epoch_rows: int | None) -> int:
        """Steps of all phases, unless one converges before; argument as in `phase_steps`."""
        return sum(self.phase_steps(name, epoch_rows) for name in self.cascade)

    @property
    def loss_metric(self) -> str:
        """What is measured on held-out prompts."""
        return "eval/reverse_kl"

    @property
    def whole_epochs(self) -> float | None:
        """Epochs after which the last update takes the prompts that are left; None: none does."""
        phases = list(self.cascade.values())
        return phases[0].num_epochs if len(phases) == 1 else None

    @property
    def num_sampler_topk(self) -> int:
        """How many of its likeliest tokens the sampler has to name in each place."""
        return (self.top_k or 0) if self.top_k_source is TopKSource.sampler else 0

    @property
    def max_staleness(self) -> int:
        """Updates that the policy may be ahead of the weights that sampled.

        Only servers sample while the policy trains.
        """
        if isinstance(self.rollout, VLLMServerRolloutConfig):
            return self.rollout.max_staleness
        return 0
