"""The whole of a run: from what Hydra composed to a checked config."""

from dataclasses import dataclass, field, fields, is_dataclass
from difflib import get_close_matches
from enum import Enum
from typing import Any

from hydra.core.config_store import ConfigStore
from omegaconf import MISSING, DictConfig, OmegaConf
from omegaconf.errors import (
    InterpolationValidationError,
    MissingMandatoryValue,
    OmegaConfBaseException,
)

from marco_train.config.architecture import check_expert_parallel
from marco_train.config.benchmark import BenchmarkConfig
from marco_train.config.curation import CURATIONS
from marco_train.config.data import DataConfig
from marco_train.config.evaluate import EvaluateConfig
from marco_train.config.lengths import check_positions, fill_lengths, longest_sequence
from marco_train.config.model import ModelConfig
from marco_train.config.opd import OPDConfig
from marco_train.config.optim import OptimConfig
from marco_train.config.parallel import ParallelConfig
from marco_train.config.planning import PlanningConfig
from marco_train.config.profile import ProfileConfig
from marco_train.config.resume import OnResumeConfig
from marco_train.config.rollout import (
    NativeRolloutConfig,
    RolloutConfig,
    VLLMRolloutConfig,
    VLLMServerRolloutConfig,
    check_expert_shares,
    check_replay,
)
from marco_train.config.secrets import check_name, note_secrets
from marco_train.config.sft import SFTConfig
from marco_train.config.stage import StageConfig, UntrainedStageConfig
from marco_train.config.teacher import (
    HFTeacherConfig,
    NativeTeacherConfig,
    TeacherConfig,
    VLLMServerTeacherConfig,
    VLLMTeacherConfig,
)
from marco_train.config.tracking import LoggingConfig
from marco_train.config.trained import SCORE, TrainedStageConfig
from marco_train.errors import InputError, require, require_positive

NO_STAGE = "no stage was chosen: add experiment=<name>, or stage=sft|opd|evaluate|benchmark"


OnError = Enum("OnError", {"continue": "continue", "stop": "stop"})
"""What a run does that could not save a checkpoint: it trains on, and saves when it is due again;
or it ends."""


class BestMode(Enum):
    """Which values of a metric are better."""

    min = "min"
    max = "max"


@dataclass(kw_only=True)
class BestConfig:
    """The checkpoint that stays as a measure of the held-out was never better."""

    metric: str | None = None
    """eval/cross_entropy of SFT, eval/reverse_kl of OPD, or eval/score of `stage.eval.suite` and
    eval/score/task_<task> of one of its tasks. A step at which it is better than ever is saved, and
    stays until another is. None: no checkpoint is kept as the best."""
    mode: BestMode | None = None
    """None: max of a score, and min of any other."""
    export: bool = False
    """Whether the best one is exported too at the end of the run, as export-best."""

    def __post_init__(self) -> None:
        require(
            self.metric is not None or not self.export,
            "checkpoint.best.export is true, and nothing says which is the best: give "
            "checkpoint.best.metric=eval/...",
        )

    @property
    def is_max(self) -> bool:
        """Whether larger values are better."""
        if self.mode is None:
            return (self.metric or "").startswith(SCORE)
        return self.mode is BestMode.max


@dataclass(kw_only=True)
class CheckpointConfig:
    """When a run saves the state it can be resumed from."""

    save_every: int | None = MISSING
    """Steps. None: never."""
    keep_last: int = 1
    """Complete checkpoints kept; older ones are deleted after a new one is complete."""
    asynchronous: bool = False
    """Whether training goes on while a checkpoint is copied to the host's memory, 12 bytes for each
    parameter that this rank updates, and written. Only the next update waits for the copy. A
    checkpoint appears after the first step by whose end all ranks have written."""
    keep_every: int | None = None
    """Steps. Checkpoints of a multiple of so many updates are kept for good. None: none is."""
    keep_phase_ends: bool = True
    """Whether a cascade is saved at the end of each phase, in a checkpoint that stays for good."""
    on_error: OnError = OnError["continue"]
    """Whether a run trains on that could not save a checkpoint, and tries the next one."""
    max_failures: int = 3
    """Saves that may fail in a row with `on_error=continue`; the run ends with the last of them."""
    best: BestConfig = field(default_factory=BestConfig)
    must_save_by: str | None = None
    """Hours, minutes and seconds of a launch, as 3:50:00, before which the run is saved and ends
    with exit status 75, to be queued again. The longest step so far is left as room."""

    def __post_init__(self) -> None:
        require_positive("checkpoint", save_every=self.save_every, keep_last=self.keep_last)
        require_positive("checkpoint", keep_every=self.keep_every, max_failures=self.max_failures)
        require_positive("checkpoint", must_save_by=self.seconds)

    @property
    def seconds(self) -> float | None:
        """Of `must_save_by`.

        Raises:
            InputError: It is no time.
        """
        if self.must_save_by is None:
            return None
        parts = str(self.must_save_by).split(":")
        require(
            len(parts) == 3 and all(part.isdecimal() for part in parts),
            f"checkpoint.must_save_by is {self.must_save_by!r}: write hours, minutes and seconds "
            "since the launch, as '3:50:00'",
        )
        hours, minutes, seconds = map(int, parts)
        return 3600.0 * hours + 60 * minutes + seconds


@dataclass(kw_only=True)
class ExportConfig:
    """What the exported model has beside its weights."""

    card: bool = False
    """Whether `export/README.md` is written at a run's end: the model card for the hub, of what
    the run wrote. `marco-train card` makes it of any run, with a benchmark's table."""
    licence: str | None = None
    """Under which the model is published, by the hub's name, as apache-2.0. None: the card says
    that none was chosen."""


@dataclass(kw_only=True)
class TrainConfig:
    """One run."""

    name: str = "run"
    """Of the run, in messages, in its directory and on W&B."""
    seed: int = 0
    """Of random weights, of the order of rows, and of samples."""
    deterministic: bool = False
    """Whether GPUs repeat their numbers; on a CPU it changes none, as they repeat there anyway.

    torch takes its deterministic algorithms, and warns by name of an operation that has none; vLLM
    in this process computes each sequence as if it were alone (servers do where they are started
    with VLLM_BATCH_INVARIANT=1). It costs time, which has not been measured, as no GPU has run it:
    attention's backward in one order, products that may not be split over their inner dimension,
    and vLLM's kernels for softmax, means and batched products in the whole process.

    Without it a GPU's numbers hold up to rounding. What is computed again, or beside others, may
    differ in its last bits, and a sampled token with them: a resumed run is not to the bit the run
    that was not interrupted, and responses sampled anew miss the score cache."""
    compile_losses: bool = False
    """Whether torch compiles what losses compute of a tile of logits, each chain of operations to
    one pass over memory; the same up to rounding. It takes seconds at the first update, a compiler
    (g++ on a CPU, Triton on a GPU), and has not run on a GPU. On a CPU it changes nothing for SFT
    and `full` in float32 from a width of 128 on, whose losses have a pass of their own."""
    root: str = "outputs"
    """Directory under which the runs of a recipe lie; experiments build their paths on it."""
    output_dir: str = "${root}/${name}"
    """Where the run's checkpoints, metrics and exports lie."""
    resume: str = "auto"
    """auto: the newest complete checkpoint of output_dir, if any; never: from the start;
    otherwise the path of a checkpoint, also of another run's, with which an output_dir of its own
    begins."""
    on_resume: OnResumeConfig = field(default_factory=OnResumeConfig)
    hub: dict[str, str] = field(default_factory=dict)
    """Which commit each model of the hub is, as org/name@commit by the field that names it; the run
    fills it in."""
    model: ModelConfig = MISSING
    teacher: Any = None
    """The teacher of experiment=opd, where stage.cascade.own.teacher takes it from; of other
    experiments none. Its kind is chosen by teacher=<backend>."""
    data: DataConfig = MISSING
    # The stage is one of StageConfig's subclasses, chosen by the config group `stage`.
    stage: Any = MISSING
    # OptimConfig, which comes with the stages that train; an evaluation has none.
    optim: Any = None
    parallel: ParallelConfig = MISSING
    logging: LoggingConfig = MISSING
    checkpoint: CheckpointConfig = MISSING
    export: ExportConfig = field(default_factory=ExportConfig)
    planning: PlanningConfig = field(default_factory=PlanningConfig)
    profile: ProfileConfig = field(default_factory=ProfileConfig)

    def __post_init__(self) -> None:
        require(
            0 <= self.seed < 2**31, f"seed is {self.seed}, and must lie between 0 and {2**31 - 1}"
        )
        check_name("name", self.name)
        require(isinstance(self.stage, StageConfig), NO_STAGE)
        for group in ("cascade", "models", "teachers"):
            for each in getattr(self.stage, group, {}):
                check_name(f"a name in stage.{group}", each)
        if isinstance(self.stage, UntrainedStageConfig):
            require(self.optim is None, "this stage trains nothing: leave optim out")
            require(
                self.profile.steps is None,
                f"profile.steps is {self.profile.steps}, and this stage makes no steps: "
                "leave it out",
            )
        else:
            require(
                isinstance(self.optim, OptimConfig),
                f"optim is {self.optim}, and the stage trains: give optim.learning_rate instead",
            )
            self._check_best(self.stage)
            require(
                len(self.data.sources) > 0,
                "data.sources is empty: choose data=own data.path=<rows>, or another data=<group>",
            )
        require(
            isinstance(self.stage, OPDConfig) or not self.parallel.offload_while_sampling,
            "parallel.offload_while_sampling is true, and nothing is sampled for an update: set it "
            "to false",
        )
        architecture = self.model.architecture
        longest = longest_sequence(self.stage)
        if architecture is not None:
            check_expert_parallel(architecture, self.parallel.expert_parallel_size)
            check_positions(self.stage, architecture.max_position_embeddings, "the model")
            if isinstance(self.stage, OPDConfig):
                check_replay(self.stage.rollout, architecture)
                check_expert_shares(self.stage.rollout, architecture, num_ranks=1)
        require(
            isinstance(self.stage, BenchmarkConfig)  # which packs nothing
            or longest <= self.data.max_tokens_per_microbatch,
            f"data.max_tokens_per_microbatch is {self.data.max_tokens_per_microbatch}, below the "
            f"longest sequence the stage allows, {longest} tokens",
        )

    def _check_best(self, stage: TrainedStageConfig) -> None:
        """Refuse a measure of the best checkpoint that is not made, or whose best is not kept."""
        metric = self.checkpoint.best.metric
        if metric is None:
            return
        known = stage.eval_metrics(has_held_out=self.data.held_out is not None)
        near = get_close_matches(metric, known, 1)
        hint = f"did you mean {near[0]}? " if near else ""
        ways = "stage.eval_every with data.held_out or stage.eval.suite makes some"
        require(
            metric in known,
            f"checkpoint.best.metric is {metric}, which this run does not measure: {hint}It "
            f"measures {', '.join(known) or 'nothing'}; {ways}",
        )
        require(
            self.checkpoint.save_every is not None,
            "checkpoint.best.metric is given, and checkpoint.save_every is null: no checkpoint is "
            "saved that could stay; give its steps",
        )
        require(
            not self.checkpoint.best.export or "best" not in getattr(stage, "cascade", {}),
            "checkpoint.best.export writes export-best, which is also that of the phase `best`: "
            "name the phase otherwise",
        )


UNIONS = (RolloutConfig, TeacherConfig)
ROLLOUTS = (NativeRolloutConfig, VLLMRolloutConfig, VLLMServerRolloutConfig)
TEACHERS = (HFTeacherConfig, NativeTeacherConfig, VLLMTeacherConfig, VLLMServerTeacherConfig)


def register_schemas() -> None:
    """Make the dataclasses known to Hydra, in groups of their own under `schema/`."""
    store = ConfigStore.instance()
    run = OmegaConf.structured(TrainConfig)
    run.model, run.data, run.parallel = ModelConfig, DataConfig, ParallelConfig
    run.logging, run.checkpoint = LoggingConfig, CheckpointConfig
    # Any name may stand here, and without `+`.
    OmegaConf.set_struct(run.model.chat_template_kwargs, False)
    store.store(name="run", group="schema", node=run)
    stages = {
        "sft": SFTConfig,
        "opd": OPDConfig,
        "evaluate": EvaluateConfig,
        "benchmark": BenchmarkConfig,
    }
    for kind, stage in stages.items():
        node = OmegaConf.structured(stage)
        if "rollout" in node:
            node.rollout = MISSING  # the group chooses, which could not replace another's fields
        store.store(name=kind, group="schema/stage", node=node)
    for name, curation in CURATIONS.items():
        store.store(name=name, group="schema/curation", node=curation)
    store.store(name="adamw", group="schema/optim", node=OptimConfig)
    for group, union in (("rollout", ROLLOUTS), ("teacher", TEACHERS)):
        for each in union:
            node = OmegaConf.structured(each)
            # A field of another backend is refused by `refuse_unknown_keys`, which knows more.
            OmegaConf.set_struct(node, False)
            store.store(name=each.backend.value, group=f"schema/{group}", node=node)


def to_run(composed: DictConfig) -> TrainConfig:
    """Make the typed config of what Hydra composed; every check between fields runs here.

    Raises:
        InputError: A value is out of its bounds or was not given, or a key is unknown.
    """
    note_secrets(composed)
    require(not OmegaConf.is_missing(composed, "stage") and composed.stage is not None, NO_STAGE)
    for key in REQUIRED:  # first, as others may be taken from them
        owner, _, name = key.partition(".")
        part: Any = composed._get_node(owner)
        lacks = isinstance(part, DictConfig) and name in list(part)
        require(not lacks or not OmegaConf.is_missing(part, name), _not_given(key))
    composed = fill_lengths(composed)
    try:
        cfg = OmegaConf.to_object(composed)
    except InterpolationValidationError as error:
        if error.full_key == "data.sources.own.path":
            raise InputError(_not_given("data.path")) from error
        raise InputError(
            f"{error.full_key} is not given, and what it is taken from is null: give both, or set "
            f"{error.full_key}"
        ) from error
    except MissingMandatoryValue as error:
        raise InputError(_not_given(error.full_key or "name")) from error
    except OmegaConfBaseException as error:
        raise InputError(f"{error.full_key}: {str(error).splitlines()[0]}") from error
    assert isinstance(cfg, TrainConfig)
    refuse_unknown_keys(cfg, "")
    return cfg


def _not_given(key: str) -> str:
    """Ask for a value that only the user can give."""
    if key in REQUIRED:
        return f"{key} has no value: {REQUIRED[key]}"
    return f"{key} has no value: give {key}=<value>, or choose a run with experiment=<name>"


REQUIRED = {
    "model.path": "give model.path=<directory, or org/name of the hub>",
    "data.path": "give data.path=<file, directory, pattern, or org/name of the hub>",
    "teacher.path": "give teacher.path=<directory, or org/name of the hub>",
}


def refuse_unknown_keys(value: Any, where: str) -> None:
    """Refuse what `+key=value` added beside the schema: OmegaConf would carry it along unread."""
    if isinstance(value, dict):
        for key, item in value.items():
            refuse_unknown_keys(item, f"{where}{key}.")
    if not is_dataclass(value):
        return
    known = [field.name for field in fields(value)]
    for name, item in vars(value).items():
        kind = f" with {where}backend={value.backend.value}" if isinstance(value, UNIONS) else ""
        near = get_close_matches(name, known, 1, 0.6)
        hint = f"did you mean {where}{near[0]}? " if near else ""
        known_are = f"{hint}known are {', '.join(known)}"
        require(name in known, f"there is no {where}{name}{kind}; {known_are}")
        refuse_unknown_keys(item, f"{where}{name}.")
