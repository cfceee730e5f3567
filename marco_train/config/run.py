"""The typed schema of a run and the checks between its fields.

YAML under `configs/` fills these dataclasses; code never supplies a fall-back value. Imports no
tensor library, so that a run is composed, printed and refused in well under a second.
"""

import math
from dataclasses import dataclass, field, fields, is_dataclass
from enum import Enum
from typing import Any, ClassVar

from hydra.core.config_store import ConfigStore
from omegaconf import MISSING, DictConfig, OmegaConf

from marco_train.architecture import ArchitectureConfig, check_expert_parallel
from marco_train.errors import InputError, require, require_positive


class StageKind(Enum):
    """What a run does."""

    sft = "sft"
    opd = "opd"
    evaluate = "evaluate"


class SourceKind(Enum):
    """Where the rows of a source lie."""

    jsonl = "jsonl"
    parquet = "parquet"
    hub = "hub"


class LossTokens(Enum):
    """Which tokens of a conversation the SFT loss covers."""

    assistant = "assistant"
    all = "all"


class Objective(Enum):
    """How the reverse KL of an OPD step is estimated; see `losses/distillation.py`."""

    sampled = "sampled"
    topk = "topk"
    full = "full"


class TopKFrom(Enum):
    """Whose likeliest tokens the top-k objective tells apart.

    sampler: the policy's own; teacher: the teacher's, for servers that give no others.
    """

    sampler = "sampler"
    teacher = "teacher"


class Schedule(Enum):
    """Shape of the learning rate after warm-up."""

    cosine = "cosine"
    constant = "constant"


class DType(Enum):
    """Type of the weights that compute; masters and reductions are float32."""

    float32 = "float32"
    bfloat16 = "bfloat16"


class Dispatch(Enum):
    """How tokens cross an expert-parallel group; see `models/dispatch.py`."""

    all_to_all = "all_to_all"
    deduplicated = "deduplicated"


class Recompute(Enum):
    """What backward computes again instead of keeping it.

    attention: each layer's attention with its norms; layer: whole layers, of which only the input
    is kept.
    """

    none = "none"
    attention = "attention"
    layer = "layer"


class BalanceScope(Enum):
    """Over which tokens the balance loss takes the experts' loads."""

    microbatch = "microbatch"
    global_batch = "global_batch"


class SamplerBackend(Enum):
    """Who makes the rollouts.

    hf: our own model with a cache of keys and values; vllm: an engine of vLLM in each rank's
    process; vllm_server: servers of vLLM over HTTP.
    """

    hf = "hf"
    vllm = "vllm"
    vllm_server = "vllm_server"


class TeacherBackend(Enum):
    """Who scores the rollouts.

    hf: any causal language model of transformers, whole on every rank; moe: Qwen3-MoE or dense
    Qwen3 in our own model, experts shared over ranks; vllm: an engine of vLLM in each rank's
    process; vllm_server: servers of vLLM over HTTP.
    """

    hf = "hf"
    moe = "moe"
    vllm = "vllm"
    vllm_server = "vllm_server"


class ChatTemplate(Enum):
    """Which template renders a conversation."""

    tokenizer = "tokenizer"
    chatml = "chatml"


class ResumeChange(Enum):
    """What a resumption may be allowed to change; see `OnResumeConfig`."""

    model = "model"
    data = "data"
    objective = "objective"
    optim = "optim"
    teacher = "teacher"
    rollout = "rollout"


class ChangedSchedule(Enum):
    """Which course the learning rate takes once a resumption has changed the number of steps.

    keep: the old one, which stays at its end value from its last step on; stretch: the one of a run
    that had the new number of steps from its start.
    """

    keep = "keep"
    stretch = "stretch"


class LoggingBackend(Enum):
    """Where metrics go beside the console and `metrics.jsonl`."""

    none = "none"
    wandb = "wandb"


class WandbMode(Enum):
    """`offline` needs neither account nor network."""

    online = "online"
    offline = "offline"


@dataclass(kw_only=True)
class ModelConfig:
    """The student: which weights to start from."""

    path: str | None = MISSING
    """Hugging Face directory to start from. None: random weights of `architecture`."""
    tokenizer: str = MISSING
    """Hugging Face directory of the tokenizer and its chat template."""
    chat_template: ChatTemplate = MISSING
    """tokenizer: the tokenizer's own, which has to mark the assistant's tokens; chatml: ours, for
    tokenizers that do not (`data/chat_template.jinja`). Exports carry the one in use."""
    chat_template_kwargs: dict[str, Any] = field(default_factory=dict)
    """Arguments of the template, of the student's and of the teachers' alike, by the names it
    reads, as `enable_thinking: false`."""
    architecture: ArchitectureConfig | None = None
    """What config.json under `path` has to say, or the shape to initialise at random.
    None: whatever config.json says."""
    dtype: DType = MISSING

    def __post_init__(self) -> None:
        require(
            self.path is not None or self.architecture is not None,
            "model.path and model.architecture are both null: give weights to start from, or a "
            "shape to initialise at random",
        )
        taken = sorted(TAKEN_BY_RENDERING & self.chat_template_kwargs.keys())
        require(
            not taken,
            f"model.chat_template_kwargs has {', '.join(taken)}, which every rendering sets "
            "itself: give only what the template reads beside the turns",
        )


# Arguments of `apply_chat_template` in transformers, and the name of the turns in templates.
TAKEN_BY_RENDERING = {
    "add_generation_prompt",
    "chat_template",
    "continue_final_message",
    "conversation",
    "conversations",
    "documents",
    "max_length",
    "messages",
    "padding",
    "return_assistant_tokens_mask",
    "return_dict",
    "return_tensors",
    "tokenize",
    "tokenizer_kwargs",
    "tools",
    "truncation",
}


@dataclass(kw_only=True)
class SourceConfig:
    """One dataset of a mixture."""

    kind: SourceKind = MISSING
    path: str = MISSING
    """A file, or a repository of the hub."""
    subset: str | None = None
    """Configuration of a hub dataset. None: its default."""
    split: str = "train"
    """Split of a hub dataset."""
    category: str = MISSING
    weight: float = MISSING
    """Share of the mixture's samples; the weights of a mixture sum to 1."""
    unique_prompts: bool = False
    """Keep the first row of each distinct prompt."""

    def __post_init__(self) -> None:
        require_positive("data.sources.*", weight=self.weight)


@dataclass(kw_only=True)
class DataConfig:
    """Which rows a run sees."""

    sources: dict[str, SourceConfig] = MISSING
    held_out: dict[str, SourceConfig] | None = None
    """Rows for held-out loss or evaluation. None: no held-out measure."""
    num_rows: int | None = None
    """Budget of rows (labels, in SFT): each source keeps its first weight * num_rows.
    None: all rows."""
    max_tokens_per_microbatch: int = MISSING
    """Tokens of one packed forward pass on one rank."""

    def __post_init__(self) -> None:
        require_positive(
            "data",
            num_rows=self.num_rows,
            max_tokens_per_microbatch=self.max_tokens_per_microbatch,
        )
        for name, mixture in (("sources", self.sources), ("held_out", self.held_out)):
            if mixture is None:
                continue
            total = sum(source.weight for source in mixture.values())
            require(
                abs(total - 1) < 1e-6,
                f"the weights of data.{name} sum to {total:.6g}, and must sum to 1",
            )


@dataclass(kw_only=True)
class StageConfig:
    """What both training stages and the evaluation share."""

    kind: StageKind = MISSING
    max_steps: int | None = None
    """Cap on the steps of an SFT run and of each phase of a cascade, for trials.
    None: no cap."""

    def __post_init__(self) -> None:
        require_positive("stage", max_steps=self.max_steps)

    def capped(self, num_steps: int) -> int:
        """Steps to take of `num_steps`."""
        return num_steps if self.max_steps is None else min(num_steps, self.max_steps)


@dataclass(kw_only=True)
class SFTConfig(StageConfig):
    """Supervised fine-tuning on conversations."""

    num_steps: int = MISSING
    global_batch_size: int = MISSING
    """Conversations of one update, over all ranks."""
    max_length: int = MISSING
    """Tokens of one conversation; longer ones are dropped and counted."""
    loss_tokens: LossTokens = MISSING
    eval_every: int | None = MISSING
    """Steps between two measures of the held-out loss. None: off."""
    num_eval_examples: int = MISSING
    """Held-out conversations of one measure."""

    def __post_init__(self) -> None:
        super().__post_init__()
        require_positive(
            "stage",
            num_steps=self.num_steps,
            global_batch_size=self.global_batch_size,
            max_length=self.max_length,
            eval_every=self.eval_every,
            num_eval_examples=self.num_eval_examples,
        )


@dataclass(kw_only=True)
class ServersConfig:
    """Servers of vLLM over HTTP, all of one model; see `inference/pool.py`."""

    owner: ClassVar[str] = "stage.rollout.servers"

    urls: list[str] = MISSING
    """As http://host:port; requests go to the one with the fewest open."""
    max_requests: int = MISSING
    """Open at once from one rank, over all servers."""
    request_timeout_seconds: float = MISSING
    """Silence of a server after which a request is made anew."""
    save_after_seconds: float = MISSING
    """Without any answer, after which the run saves a checkpoint and goes on waiting."""
    give_up_after_seconds: float = MISSING
    """Without any answer, after which the run ends; it can be resumed."""

    def __post_init__(self) -> None:
        require_positive(
            self.owner,
            max_requests=self.max_requests,
            request_timeout_seconds=self.request_timeout_seconds,
            save_after_seconds=self.save_after_seconds,
        )
        require(len(self.urls) > 0, f"{self.owner}.urls is empty: name at least one server")
        for url in self.urls:
            require(
                url.startswith(("http://", "https://")),
                f"{self.owner}.urls names {url!r}; write it as http://host:port",
            )
        require(
            self.save_after_seconds <= self.give_up_after_seconds,
            f"{self.owner}.give_up_after_seconds is {self.give_up_after_seconds}, below "
            f"save_after_seconds {self.save_after_seconds}",
        )


@dataclass(kw_only=True)
class RolloutConfig:
    """How responses are sampled."""

    backend: SamplerBackend = MISSING
    batch_size: int | None = MISSING
    """Responses decoded together on one rank. None for `vllm_server`, which decides itself."""
    temperature: float = MISSING
    canary_tolerance: float = MISSING
    """Largest difference of a log-probability between policy and sampler after a sync, in nats."""
    replay_routing: bool = MISSING
    """Whether the policy's update takes the experts that the sampler chose for each token, with
    the weights of its own routers."""
    max_tokens_per_batch: int | None = MISSING
    """Tokens of one forward pass of a `vllm` sampler on one rank. None for any other."""
    kv_cache_gib: float | None = MISSING
    """Memory for keys and values of a `vllm` sampler on one rank. None for any other."""
    servers: ServersConfig | None = MISSING
    """None for any other than `vllm_server`."""
    sync_path: str | None = MISSING
    """Directory that trainer and servers reach under the same name, through which the weights go;
    of one run at a time. None for any other than `vllm_server`."""
    max_staleness: int = MISSING
    """Updates that the policy may be ahead of the weights that sampled. 0: on-policy; 1: servers
    sample for the coming step while this one trains."""

    def __post_init__(self) -> None:
        require_positive(
            "stage.rollout",
            batch_size=self.batch_size,
            temperature=self.temperature,
            canary_tolerance=self.canary_tolerance,
            max_tokens_per_batch=self.max_tokens_per_batch,
            kv_cache_gib=self.kv_cache_gib,
        )
        in_process, over_http = {SamplerBackend.vllm}, {SamplerBackend.vllm_server}
        for name, owners in (
            ("batch_size", set(SamplerBackend) - over_http),
            ("max_tokens_per_batch", in_process),
            ("kv_cache_gib", in_process),
            ("servers", over_http),
            ("sync_path", over_http),
        ):
            named = " or ".join(sorted(owner.value for owner in owners))
            require(
                (getattr(self, name) is not None) == (self.backend in owners),
                f"stage.rollout.{name} is {getattr(self, name)} and stage.rollout.backend is "
                f"{self.backend.value}; give it with backend={named}, null with any other",
            )
        most = 1 if self.backend in over_http else 0
        require(
            0 <= self.max_staleness <= most,
            f"stage.rollout.max_staleness is {self.max_staleness}, and must lie between 0 and "
            f"{most} with backend={self.backend.value}: servers sample one step ahead, and a "
            "sampler in the trainer's process waits while it trains",
        )


@dataclass(kw_only=True)
class TeacherServersConfig(ServersConfig):
    """Servers that score."""

    owner: ClassVar[str] = "teacher.servers"

    max_rejected: float = MISSING
    """Share of a step's rollouts without a usable score that may be left out of the update."""

    def __post_init__(self) -> None:
        super().__post_init__()
        require(
            0 <= self.max_rejected < 1,
            f"teacher.servers.max_rejected is {self.max_rejected}, and must lie in [0, 1)",
        )


@dataclass(kw_only=True)
class TeacherConfig:
    """A frozen model that scores tokens."""

    backend: TeacherBackend = MISSING
    path: str = MISSING
    """Hugging Face directory; of `vllm_server`, its tokenizer and config are enough."""
    dtype: DType = MISSING
    """Of `vllm_server`, what the servers were started with."""
    max_tokens_per_batch: int = MISSING
    """Tokens of one forward pass of the teacher on one rank; of `hf`, with padding; not used by
    `vllm_server`."""
    expert_parallel_size: int = MISSING
    """Ranks that share the experts of a `moe` teacher; 1 for any other."""
    stop_id: int | None = MISSING
    """The token with which the teacher ends a turn, where the student does with another: the two
    trade places in every score. None: both end with the same."""
    kv_cache_gib: float | None = MISSING
    """Memory for keys and values of a `vllm` teacher. None for any other."""
    servers: TeacherServersConfig | None = MISSING
    """None for any other than `vllm_server`."""

    def __post_init__(self) -> None:
        require_positive(
            "teacher",
            max_tokens_per_batch=self.max_tokens_per_batch,
            expert_parallel_size=self.expert_parallel_size,
            kv_cache_gib=self.kv_cache_gib,
        )
        for name, owner in (
            ("kv_cache_gib", TeacherBackend.vllm),
            ("servers", TeacherBackend.vllm_server),
        ):
            require(
                (getattr(self, name) is not None) == (self.backend is owner),
                f"teacher.{name} is {getattr(self, name)} and teacher.backend is "
                f"{self.backend.value}; give it with backend={owner.value}, null with any other",
            )
        require(
            self.backend is TeacherBackend.moe or self.expert_parallel_size == 1,
            f"teacher.expert_parallel_size is {self.expert_parallel_size}, and a teacher of the "
            f"backend {self.backend.value} is whole on every rank: set it to 1, or backend=moe",
        )


@dataclass(kw_only=True)
class ScoreCacheConfig:
    """Teachers' scores kept on disk; see `teachers/cache.py`."""

    path: str | None = MISSING
    """Directory; may be shared by ranks and runs. None: every rollout is scored by its teacher."""
    max_gib: float = MISSING
    """Bound on its size; the oldest scores go first."""

    def __post_init__(self) -> None:
        require_positive("stage.score_cache", max_gib=self.max_gib)


@dataclass(kw_only=True)
class ConvergedConfig:
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
            "stage.cascade.*.converged",
            measure_every=self.measure_every,
            num_prompts=self.num_prompts,
            num_measures=self.num_measures,
        )
        require(
            0 <= self.min_fall < float("inf"),
            f"stage.cascade.*.converged.min_fall is {self.min_fall}, and must be 0 or more nats",
        )


@dataclass(kw_only=True)
class PhaseConfig:
    """One teacher of a cascade and how long it teaches."""

    teacher: TeacherConfig = MISSING
    """Of every rollout without a teacher of its own."""
    teacher_of: dict[str, TeacherConfig] = field(default_factory=dict)
    """Teachers of some rollouts, by `category_<name>` or `language_<code>`; the category decides
    where both have one."""
    num_steps: int = MISSING
    """Of which the learning rate's schedule knows; fewer where the phase converges."""
    converged: ConvergedConfig = field(default_factory=ConvergedConfig)

    def __post_init__(self) -> None:
        require_positive("stage.cascade.*", num_steps=self.num_steps)
        for group in self.teacher_of:
            require(
                group.startswith(("category_", "language_")),
                f"stage.cascade.*.teacher_of names {group!r}; name a group category_<name> or "
                "language_<code>",
            )


@dataclass(kw_only=True)
class OPDConfig(StageConfig):
    """On-policy distillation from a cascade of teachers."""

    objective: Objective = MISSING
    max_importance_ratio: float | None = MISSING
    """Cap on the weight policy/sampler of a token's gradient in the `sampled` objective, any number
    above 0. None: no cap."""
    max_advantage: float | None = MISSING
    """Bound on |log teacher - log sampler| in the `sampled` objective, in nats. None: no bound."""
    top_k: int | None = MISSING
    """Tokens that the `topk` objective tells apart; the others are one bucket. None: another
    objective is chosen."""
    top_k_from: TopKFrom = MISSING
    max_mismatch: float | None = MISSING
    """Mean |log policy - log sampler| of a step's tokens above which the run stops, in nats.
    None: no bound."""
    global_batch_size: int = MISSING
    """Prompts of one update, over all ranks."""
    responses_per_prompt: int = MISSING
    max_prompt_length: int = MISSING
    """Tokens; longer prompts are dropped and counted."""
    max_response_length: int = MISSING
    """Tokens; a longer response is cut and counted."""
    rollout: RolloutConfig = MISSING
    score_cache: ScoreCacheConfig = MISSING
    cascade: dict[str, PhaseConfig] = MISSING
    """Phases in their order, by name."""

    def __post_init__(self) -> None:
        super().__post_init__()
        require_positive(
            "stage",
            max_importance_ratio=self.max_importance_ratio,
            max_advantage=self.max_advantage,
            top_k=self.top_k,
            max_mismatch=self.max_mismatch,
            global_batch_size=self.global_batch_size,
            responses_per_prompt=self.responses_per_prompt,
            max_prompt_length=self.max_prompt_length,
            max_response_length=self.max_response_length,
        )
        require(len(self.cascade) > 0, "stage.cascade has no phase: name at least one teacher")
        for name, phase in self.cascade.items():
            require(
                not phase.teacher_of or self.objective is not Objective.full,
                f"stage.cascade.{name} has several teachers, and stage.objective=full multiplies "
                "hidden states by the head of one: choose sampled or topk",
            )
        require(
            (self.top_k is not None) == (self.objective is Objective.topk),
            f"stage.top_k is {self.top_k} and stage.objective is {self.objective.value}; give "
            "stage.top_k with stage.objective=topk, and null with any other",
        )
        require(
            self.objective is not Objective.sampled or self.rollout.temperature == 1.0,
            f"stage.rollout.temperature is {self.rollout.temperature}; the sampled-token "
            "objective is an unbiased estimate of the reverse KL at temperature 1.0 only: set it "
            "to 1.0",
        )
        require(
            self.rollout.temperature == 1.0,
            f"stage.rollout.temperature is {self.rollout.temperature}; at any other value than "
            "1.0 the responses are not the policy's own and the KL is of another distribution: "
            "set it to 1.0",
        )

    @property
    def num_sampler_topk(self) -> int:
        """How many of its likeliest tokens the sampler has to name in each place."""
        return (self.top_k or 0) if self.top_k_from is TopKFrom.sampler else 0


@dataclass(kw_only=True)
class EvaluateConfig(StageConfig):
    """Sampled accuracy and reverse KL of exported models on held-out prompts."""

    models: dict[str, str] = MISSING
    """Hugging Face directories of students, by name: accuracy and KL to each teacher."""
    teachers: dict[str, TeacherConfig] = MISSING
    """Accuracy only, and the yardsticks of the KL."""
    num_prompts: int = MISSING
    """Held-out prompts, shared among the categories by the mixture's weights."""
    responses_per_prompt: int = MISSING
    max_prompt_length: int = MISSING
    max_response_length: int = MISSING
    num_kl_responses: int = MISSING
    """How many of a prompt's responses the teachers score for the KL."""
    num_shown: int = MISSING
    """Prompts whose answers are written out for a reader."""
    signatures: bool = MISSING
    """Whether signatures.json tells which experts each language's prompts and answers used, over
    the responses that the teachers score."""
    rollout: RolloutConfig = MISSING

    def __post_init__(self) -> None:
        super().__post_init__()
        require_positive(
            "stage",
            num_prompts=self.num_prompts,
            responses_per_prompt=self.responses_per_prompt,
            max_prompt_length=self.max_prompt_length,
            max_response_length=self.max_response_length,
        )
        require(
            self.rollout.temperature == 1.0,
            f"stage.rollout.temperature is {self.rollout.temperature}; avg@n is measured at "
            "temperature 1.0 (Marco-MoE section 4.3): set it to 1.0",
        )
        require(
            self.rollout.backend is SamplerBackend.hf,
            f"stage.rollout.backend is {self.rollout.backend.value}, and an evaluation samples "
            "from exported weights in its own process: choose rollout@stage.rollout=hf",
        )
        require(
            not self.rollout.replay_routing,
            "stage.rollout.replay_routing is true, and an evaluation makes no update that could "
            "take the sampler's experts: set it to false",
        )
        both = sorted(self.models.keys() & self.teachers.keys())
        require(
            not both,
            f"stage.models and stage.teachers both name {', '.join(both)}: the report tells models "
            "apart by their names, so give each its own",
        )
        require(
            0 < self.num_kl_responses <= self.responses_per_prompt,
            f"stage.num_kl_responses is {self.num_kl_responses}, and must lie between 1 and "
            f"stage.responses_per_prompt {self.responses_per_prompt}",
        )


@dataclass(kw_only=True)
class OptimConfig:
    """AdamW and its schedule."""

    learning_rate: float = MISSING
    min_learning_rate: float = MISSING
    """Where the cosine ends; equal to `learning_rate` in the constant schedule."""
    schedule: Schedule = MISSING
    warmup_steps: int = MISSING
    beta1: float = MISSING
    beta2: float = MISSING
    eps: float = MISSING
    weight_decay: float = MISSING
    """On matrices; norms are not decayed."""
    clip_norm: float = MISSING
    """Bound on the global gradient norm."""
    balance_coefficient: float = MISSING
    """Of the load-balancing loss, summed over layers; see `losses/balance.py`. 0: off."""
    balance_scope: BalanceScope = MISSING
    router_z_coefficient: float = MISSING
    """Of the router z-loss, summed over layers. 0: off."""

    def __post_init__(self) -> None:
        require_positive(
            "optim", learning_rate=self.learning_rate, eps=self.eps, clip_norm=self.clip_norm
        )
        require(self.warmup_steps >= 0, f"optim.warmup_steps is {self.warmup_steps}, below 0")
        for name, coefficient in (
            ("balance_coefficient", self.balance_coefficient),
            ("router_z_coefficient", self.router_z_coefficient),
        ):
            require(
                0 <= coefficient < float("inf"),
                f"optim.{name} is {coefficient}, and must be a number from 0 (off) upwards",
            )
        for name, beta in (("beta1", self.beta1), ("beta2", self.beta2)):
            require(0 <= beta < 1, f"optim.{name} is {beta}, and must lie in [0, 1)")
        require(
            0 <= self.min_learning_rate <= self.learning_rate,
            f"optim.min_learning_rate {self.min_learning_rate} is above optim.learning_rate "
            f"{self.learning_rate}",
        )
        require(
            self.schedule is not Schedule.constant or self.min_learning_rate == self.learning_rate,
            "optim.schedule is constant, so optim.min_learning_rate "
            f"{self.min_learning_rate} must equal optim.learning_rate {self.learning_rate}",
        )

    def rate_at(self, step: int, num_steps: int) -> float:
        """Learning rate of an update, from 0, in a run of `num_steps` updates.

        Rises linearly over `warmup_steps`, the first update being at 1 / warmup_steps of the peak,
        then stays, or falls along half a cosine to `min_learning_rate` at the last update, where it
        stays.
        """
        if step < self.warmup_steps:
            return self.learning_rate * (step + 1) / self.warmup_steps
        if self.schedule is Schedule.constant:
            return self.learning_rate
        falling = max(1, num_steps - 1 - self.warmup_steps)
        progress = min(1.0, (step - self.warmup_steps) / falling)
        swing = self.learning_rate - self.min_learning_rate
        return self.min_learning_rate + swing * (1 + math.cos(math.pi * progress)) / 2


@dataclass(kw_only=True)
class ParallelConfig:
    """How the model and its optimizer are spread over the ranks."""

    expert_parallel_size: int = MISSING
    """Ranks that share the experts of a layer. 1: every rank holds all of them."""
    zero_stage: int = MISSING
    """1: optimizer state sharded over ranks; 2: gradients as well."""
    dispatch: Dispatch = MISSING
    """Without effect where expert_parallel_size is 1."""
    recompute: Recompute = MISSING

    def __post_init__(self) -> None:
        require_positive("parallel", expert_parallel_size=self.expert_parallel_size)
        require(
            self.zero_stage in {1, 2},
            f"parallel.zero_stage is {self.zero_stage}, and must be 1 or 2",
        )


@dataclass(kw_only=True)
class LoggingConfig:
    """What a person sees."""

    backend: LoggingBackend = MISSING
    console_every: int = MISSING
    """Steps between two printed lines; `metrics.jsonl` has every step."""
    project: str = MISSING
    mode: WandbMode = MISSING

    def __post_init__(self) -> None:
        require_positive("logging", console_every=self.console_every)


@dataclass(kw_only=True)
class CheckpointConfig:
    """When a run saves the state it can be resumed from."""

    save_every: int | None = MISSING
    """Steps. None: never."""
    keep_last: int = MISSING
    """Complete checkpoints kept; older ones are deleted after a new one is complete."""

    def __post_init__(self) -> None:
        require_positive("checkpoint", save_every=self.save_every, keep_last=self.keep_last)


@dataclass(kw_only=True)
class OnResumeConfig:
    """What a run that goes on from a checkpoint may change, beside what is free.

    Free is what learns the same or only measures: places, time-outs, memory, logs, servers, and
    files that moved. `resumption.py` says it of every field.
    """

    allow: list[ResumeChange] = field(default_factory=list)
    """Groups of fields that may differ from the checkpoint's.

    model: the student's config.json or its starting weights (those of the checkpoint are kept);
    data: rows, their mixture and rendering, batch sizes, limits of length, and the seed;
    objective: what is minimised, and when a phase has converged;
    optim: all of `optim`;
    teacher: the teachers of a cascade and the order of coming phases;
    rollout: who samples, and with which weights.
    """
    schedule: ChangedSchedule | None = None
    """Asked for where more or fewer steps change the learning rate. None: no choice was made."""


@dataclass(kw_only=True)
class TrainConfig:
    """One run."""

    name: str = MISSING
    seed: int = MISSING
    root: str = MISSING
    """Directory under which the runs of a recipe lie; experiments build their paths on it."""
    output_dir: str = MISSING
    resume: str = MISSING
    """auto: the newest complete checkpoint of output_dir, if any; never: from the start;
    otherwise the path of a checkpoint, also of another run's, with which an output_dir of its own
    begins."""
    on_resume: OnResumeConfig = field(default_factory=OnResumeConfig)
    model: ModelConfig = MISSING
    data: DataConfig = MISSING
    # The stage is one of StageConfig's subclasses, chosen by the config group `stage`.
    stage: Any = MISSING
    optim: OptimConfig = MISSING
    parallel: ParallelConfig = MISSING
    logging: LoggingConfig = MISSING
    checkpoint: CheckpointConfig = MISSING

    def __post_init__(self) -> None:
        require(
            0 <= self.seed < 2**31, f"seed is {self.seed}, and must lie between 0 and {2**31 - 1}"
        )
        require(
            isinstance(self.stage, StageConfig),
            "no stage was chosen: add experiment=<name>, or stage=sft|opd|evaluate",
        )
        architecture = self.model.architecture
        longest = longest_sequence(self.stage)
        if architecture is not None:
            check_expert_parallel(architecture, self.parallel.expert_parallel_size)
            check_positions(self.stage, architecture.max_position_embeddings, "the model")
            if isinstance(self.stage, OPDConfig):
                check_replay(self.stage.rollout, architecture)
        require(
            longest <= self.data.max_tokens_per_microbatch,
            f"data.max_tokens_per_microbatch is {self.data.max_tokens_per_microbatch}, below the "
            f"longest sequence the stage allows, {longest} tokens",
        )


def check_replay(rollout: RolloutConfig, student: ArchitectureConfig) -> None:
    """Refuse to replay the routing of a student without routers."""
    require(
        student.is_moe or not rollout.replay_routing,
        "stage.rollout.replay_routing is true, but the student is dense and has no experts: set it "
        "to false",
    )


def longest_sequence(stage: StageConfig) -> int:
    """Tokens of the longest sequence that a stage lets through."""
    match stage:
        case SFTConfig():
            return stage.max_length
        case OPDConfig() | EvaluateConfig():
            return stage.max_prompt_length + stage.max_response_length
    raise TypeError(f"no such stage: {type(stage).__name__}")


def check_positions(
    stage: StageConfig, positions: int | None, owner: str, num_extra: int = 0
) -> None:
    """Refuse a model that has fewer positions than the longest sequence of a stage needs.

    Args:
        stage: What is to be run.
        positions: Tokens of the longest sequence that the model can take. None: it does not say.
        owner: What the message calls the model.
        num_extra: Tokens that are made after a sequence, though nobody asks for them.
    """
    longest = longest_sequence(stage)
    if positions is None or longest + num_extra <= positions:
        return
    extra = f" and {num_extra} more to score them" if num_extra else ""
    lengths = "stage.max_prompt_length + stage.max_response_length"
    if isinstance(stage, SFTConfig):
        lengths = "stage.max_length"
    raise InputError(
        f"the stage allows sequences of {longest} tokens{extra}, and {owner} has {positions} "
        f"positions: bring {lengths} down to {positions - num_extra} or less, or take a model of "
        "more positions"
    )


def register_schemas() -> None:
    """Make the dataclasses known to Hydra, in groups of their own under `schema/`."""
    store = ConfigStore.instance()
    run = OmegaConf.structured(TrainConfig)
    run.model = ModelConfig
    # Any name may stand here, and without `+`.
    OmegaConf.set_struct(run.model.chat_template_kwargs, False)
    store.store(name="run", group="schema", node=run)
    for kind, node in (("sft", SFTConfig), ("opd", OPDConfig), ("evaluate", EvaluateConfig)):
        store.store(name=kind, group="schema/stage", node=node)


def to_run(composed: DictConfig) -> TrainConfig:
    """Make the typed config of what Hydra composed; every check between fields runs here.

    Raises:
        InputError: A value is out of its bounds, or a key is unknown.
        MissingMandatoryValue: A value that only the user can give was not given.
    """
    cfg = OmegaConf.to_object(composed)
    assert isinstance(cfg, TrainConfig)
    refuse_unknown_keys(cfg, "")
    return cfg


def refuse_unknown_keys(value: Any, where: str) -> None:
    """Refuse what `+key=value` added beside the schema: OmegaConf would carry it along unread."""
    if isinstance(value, dict):
        for key, item in value.items():
            refuse_unknown_keys(item, f"{where}{key}.")
    if not is_dataclass(value):
        return
    known = [field.name for field in fields(value)]
    for name, item in vars(value).items():
        require(name in known, f"there is no {where}{name}; known are {', '.join(known)}")
        refuse_unknown_keys(item, f"{where}{name}.")
