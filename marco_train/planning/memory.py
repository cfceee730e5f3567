"""Bytes that a rank holds in each phase of a step, by what they are for.

    weights          of the policy
    gradients        DeepSpeed's buffers and what lies in parameters
    masters          this rank's partition of the float32 weights
    moments          of AdamW, of that partition
    activations      what backward needs, and what an operation holds for a while
    logits           tiles of them, and the loss's gradients of hidden states and head
    teacher          weights of a teacher in this process; of two where a phase of a cascade begins
    sampler_weights  of a sampler in this process
    kv_cache         its keys and values
    communicators    buffers of NCCL
    context          CUDA's context, kernels and workspaces

A phase is counted at its worst moment.
"""

import math
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass, replace
from functools import cache, cached_property
from itertools import pairwise

import torch

from marco_train.config import TrainConfig
from marco_train.config.architecture import ArchitectureConfig
from marco_train.config.lengths import longest_sequence
from marco_train.config.model import DType
from marco_train.config.opd import Objective, OPDConfig
from marco_train.config.parallel import REDUCE_BUCKET_ELEMENTS
from marco_train.config.rollout import (
    NativeRolloutConfig,
    VLLMRolloutConfig,
    kv_cache_bytes,
)
from marco_train.config.sft import SFTConfig
from marco_train.config.teacher import (
    HFTeacherConfig,
    NativeTeacherConfig,
    TeacherConfig,
    VLLMTeacherConfig,
)
from marco_train.config.trained import AnsweredStage
from marco_train.errors import InputError
from marco_train.models.attention import GROWTH
from marco_train.models.decoding_head import is_laid_out
from marco_train.models.weights import FUSED, meta_model, torch_dtype
from marco_train.planning.cards import Card
from marco_train.planning.shapes import teacher_architecture
from marco_train.planning.trace import (
    GradientKeeping,
    Held,
    Shapes,
    Traced,
    measure,
    trace_update,
)
from marco_train.rollout.native import draw_tokens
from marco_train.rollout.vllm import KV_CACHE_BYTES_ON_CPU, share_for_keys

GIB = 2**30
COMPONENTS = (
    "weights",
    "gradients",
    "masters",
    "moments",
    "activations",
    "logits",
    "teacher",
    "sampler_weights",
    "kv_cache",
    "communicators",
    "context",
)
Components = dict[str, int]

# Reckoned, and not measured yet; all on a GPU. CUDA's context, cuBLAS's workspaces, compiled
# kernels, and what the allocator rounds up:
CONTEXT = int(1.5 * GIB)
# of one communicator of NCCL:
COMMUNICATOR = int(0.4 * GIB)
# CUDA graphs and workspaces of an engine of vLLM, awake and asleep:
ENGINE_AWAKE, ENGINE_ASLEEP = int(2.6 * GIB), int(1.0 * GIB)

# Gradients that DeepSpeed lays flat before it adds them up over ranks, where it keeps those of all
# parameters in float32: its MEMORY_OPT_ALLREDUCE_SIZE, whatever `reduce_bucket_size` says.
ALLREDUCE_ELEMENTS = 500_000_000


@dataclass(frozen=True)
class Sizes:
    """Parameters of a model on a rank."""

    dense: int
    experts: int
    largest: int
    """Of one tensor."""
    largest_matrix: int
    """Of one layer's experts of one matrix, on this rank."""
    layer_experts: int
    """Of one layer, on this rank."""

    @property
    def total(self) -> int:
        """All of them."""
        return self.dense + self.experts


@cache
def _sizes(fields: tuple[tuple[str, object], ...], expert_parallel_size: int) -> Sizes:
    model = meta_model(ArchitectureConfig(**dict(fields)))  # type: ignore[arg-type]
    dense: list[int] = []
    fused: list[int] = []
    for name, parameter in model.named_parameters():
        (fused if FUSED.match(name) else dense).append(parameter.numel())
    fused = [size // expert_parallel_size for size in fused]
    num_layers = dict(fields)["num_hidden_layers"]
    assert isinstance(num_layers, int)
    return Sizes(
        sum(dense),
        sum(fused),
        max(dense + fused),
        max(fused, default=0),
        sum(fused) // num_layers,
    )


def sizes_of(architecture: ArchitectureConfig, expert_parallel_size: int) -> Sizes:
    """Count parameters of this rank's share of a model, from the model itself."""
    return _sizes(tuple(asdict(architecture).items()), expert_parallel_size)


class Memory:
    """What a run holds on one rank."""

    def __init__(
        self,
        cfg: TrainConfig,
        architecture: ArchitectureConfig,
        gpus: int,
        card: Card,
        imbalance: float,
    ) -> None:
        """Look at a run.

        Args:
            cfg: Checked.
            architecture: The student's.
            gpus: Ranks of the run.
            card: Of each rank.
            imbalance: Rows of this rank's experts, over the mean of the ranks.
        """
        self.cfg = cfg
        self.architecture = architecture
        self.gpus = gpus
        self.card = card
        self.imbalance = imbalance
        self.expert_parallel_size = cfg.parallel.expert_parallel_size
        self.sizes = sizes_of(architecture, self.expert_parallel_size)

    @property
    def opd(self) -> OPDConfig | None:
        """The stage, where it distils."""
        return self.cfg.stage if isinstance(self.cfg.stage, OPDConfig) else None

    @property
    def _sampled(self) -> OPDConfig | AnsweredStage | None:
        """What is sampled in the run, if anything is."""
        stage = self.cfg.stage
        if isinstance(stage, SFTConfig):
            return stage.answers if stage.eval.suite is not None else None
        return self.opd

    @property
    def _bfloat16(self) -> bool:
        return self.cfg.model.dtype is DType.bfloat16

    @cached_property
    def partition(self) -> int:
        """Parameters whose masters and moments are this rank's."""
        experts = self.sizes.experts * self.expert_parallel_size // self.gpus
        return self.sizes.dense // self.gpus + experts

    @property
    def weights(self) -> int:
        """Bytes of the policy's weights."""
        return self.sizes.total * self.cfg.model.dtype.num_bytes

    @property
    def optimizer(self) -> Components:
        """Bytes of masters and moments."""
        return {"masters": 4 * self.partition, "moments": 8 * self.partition}

    @property
    def _keeps_gradients(self) -> bool:
        """Whether the optimizer's class keeps float32 gradients from update to update."""
        return self._bfloat16 and self.cfg.parallel.zero_stage == 1

    @property
    def gradient_buffer(self) -> int:
        """Bytes of gradients in the optimizer's buffers, while backward runs."""
        # In float32 this rank's part of the sum over microbatches.
        return 4 * (self.sizes.total if self._keeps_gradients else self.partition)

    def update_shapes(self) -> Shapes:
        """What a microbatch of an update is traced by."""
        keeping = GradientKeeping.buffer if self._bfloat16 else GradientKeeping.parameter
        shapes = Shapes(
            architecture=tuple(asdict(self.architecture).items()),
            dtype=self.cfg.model.dtype,
            is_gpu=self.card.is_gpu,
            num_tokens=self.cfg.data.max_tokens_per_microbatch,
            longest=longest_sequence(self.cfg.stage),
            expert_parallel_size=self.expert_parallel_size,
            dispatch=self.cfg.parallel.dispatch,
            imbalance=self.imbalance,
            recompute=self.cfg.parallel.recompute,
            gradients=keeping,
        )
        if self.opd is None:
            return shapes
        width = 0
        if self.opd.objective is Objective.full:
            width = max(shape.hidden_size for shape in self._teacher_shapes())
        return replace(
            shapes,
            objective=self.opd.objective,
            top_k=self.opd.top_k or 0,
            teacher_width=width,
        )

    @cached_property
    def update(self) -> Traced:
        """One microbatch of an update."""
        return trace_update(self.update_shapes())

    def _components(self, **parts: int) -> Components:
        """What is held in every phase, and more."""
        found = dict.fromkeys(COMPONENTS, 0)
        found["weights"] = self.weights
        if self.card.is_gpu:
            found["context"] = CONTEXT
            found["communicators"] = self._num_communicators * COMMUNICATOR
        for name, size in parts.items():
            found[name] += size
        return found

    @property
    def _num_communicators(self) -> int:
        """Of NCCL: all ranks, DeepSpeed's copy of them, those that share experts, and replicas."""
        if self.gpus == 1:
            return 0
        shares = self.expert_parallel_size > 1
        teachers = [t for t in self._teachers() if isinstance(t, NativeTeacherConfig)]
        sizes = {t.expert_parallel_size for t in teachers} - {1, self.expert_parallel_size}
        return 2 + shares + (shares and self.gpus > self.expert_parallel_size) + len(sizes)

    def _resting(self) -> Components:
        """Optimizer and gradients between updates."""
        if self.cfg.parallel.offload_while_sampling:
            return {}
        kept = 4 * self.sizes.total if self._keeps_gradients else 0
        return {**self.optimizer, "gradients": kept}

    def train(self) -> Components:
        """The worst moment of an update: of a backward pass, or of the optimizer's step."""
        teacher, asleep = self.teacher_bytes(), self._asleep()
        state = {} if self.cfg.parallel.offload_while_sampling else self.optimizer
        held = self.update.backward
        backward = self._components(
            gradients=self.gradient_buffer + held.gradients + self._reduction(held),
            activations=held.activations,
            logits=held.logits,
            teacher=teacher,
            **state,
            **asleep,
        )
        step = self._components(
            gradients=self._step_gradients(), teacher=teacher, **self.optimizer, **asleep
        )
        return max(backward, step, key=lambda parts: sum(parts.values()))

    def _reduction(self, held: Held) -> int:
        """Bytes by which a gradient reaches the optimizer's buffer."""
        if self._keeps_gradients:
            return 4 * self.sizes.largest if held.gradients else 0
        filled = min(REDUCE_BUCKET_ELEMENTS, self.sizes.total)
        # The whole of it is a card's, and of a host's memory what is written.
        bucket = REDUCE_BUCKET_ELEMENTS if self.card.is_gpu else filled
        if self._bfloat16:
            # A bucket in bfloat16, a flat copy of it, and that in float32.
            return 2 * bucket + 6 * max(filled, self.sizes.largest)
        return 4 * bucket

    def _step_gradients(self) -> int:
        """Bytes of gradients after backward: as they are added up over ranks, and in the step."""
        apart = self.expert_parallel_size > 1  # what is laid flat: experts, and all others
        if self._keeps_gradients:
            flat = max(self.sizes.dense, self.sizes.experts) if apart else self.sizes.total
            return self.gradient_buffer + 4 * min(flat, ALLREDUCE_ELEMENTS + self.sizes.largest)
        if self._bfloat16:
            return self.gradient_buffer
        # Each group's are laid flat beside those of all groups.
        experts = self.sizes.experts * self.expert_parallel_size // self.gpus
        dense = self.sizes.dense // self.gpus
        return 4 * (self.partition + (max(dense, experts) if apart else dense + experts))

    # Teachers.

    def _phases(self) -> list[list[TeacherConfig]]:
        if self.opd is None:
            return []
        cascade = self.opd.cascade.values()
        return [[phase.teacher, *phase.teachers_by_group.values()] for phase in cascade]

    def _teachers(self) -> list[TeacherConfig]:
        return [teacher for phase in self._phases() for teacher in phase]

    def _teacher_shapes(self) -> list[ArchitectureConfig]:
        return [teacher_architecture(teacher.path) for teacher in self._teachers()]

    def _bytes_of_teacher(self, teacher: TeacherConfig) -> int:
        """Bytes of a teacher's weights in this process; of one on servers, none."""
        match teacher:
            case NativeTeacherConfig():
                size = teacher.expert_parallel_size
            case HFTeacherConfig() | VLLMTeacherConfig():
                size = 1
            case _:
                return 0
        sizes = sizes_of(teacher_architecture(teacher.path), size)
        found = sizes.total * teacher.dtype.num_bytes
        if isinstance(teacher, VLLMTeacherConfig):
            found += int(teacher.kv_cache_gib * GIB)
        return found

    def teacher_bytes(self) -> int:
        """Bytes of the teachers in this process, of the phase where they are largest."""
        return max((sum(map(self._bytes_of_teacher, p)) for p in self._phases()), default=0)

    def _teachers_at_a_switch(self) -> int:
        """The former teacher is closed once the next is checked."""
        phases = [sum(map(self._bytes_of_teacher, phase)) for phase in self._phases()]
        both = [sum(pair) for pair in pairwise(phases)]
        return max([*phases, *both], default=0)

    def score_shapes(self, teacher: TeacherConfig) -> Shapes | None:
        """What a teacher's pass is traced by. None: it is not in this process."""
        assert self.opd is not None
        size = 1
        if isinstance(teacher, NativeTeacherConfig):
            size = teacher.expert_parallel_size
        elif not isinstance(teacher, HFTeacherConfig):
            return None
        longest = longest_sequence(self.opd)
        return Shapes(
            architecture=tuple(asdict(teacher_architecture(teacher.path)).items()),
            dtype=teacher.dtype,
            is_gpu=self.card.is_gpu,
            num_tokens=max(teacher.max_tokens_per_batch, longest),
            longest=longest,
            expert_parallel_size=size,
            imbalance=self.imbalance,
            scores_only=True,
        )

    def score(self) -> Components:
        """Teachers score, and one may take another's place."""
        passes = [trace_update(s).backward for t in self._teachers() if (s := self.score_shapes(t))]
        worst = max(passes, key=lambda held: held.total, default=Held())
        return self._components(
            **_added(self._resting(), self._asleep()),
            teacher=self._teachers_at_a_switch(),
            activations=worst.activations,
            logits=worst.logits,
        )

    # Samplers.

    @property
    def _sampler_weights(self) -> int:
        """Bytes of a sampler's copy of the whole model in this process."""
        if self._sampled is None:
            return 0
        if not isinstance(self._sampled.rollout, NativeRolloutConfig | VLLMRolloutConfig):
            return 0
        return sizes_of(self.architecture, 1).total * self.cfg.model.dtype.num_bytes

    def _asleep(self) -> Components:
        """What a sampler keeps while it does not sample."""
        if self._sampled is None:
            return {}
        rollout = self._sampled.rollout
        if isinstance(rollout, VLLMRolloutConfig) and self.card.is_gpu:
            return {"context": ENGINE_ASLEEP}
        return {"sampler_weights": self._sampler_weights, "kv_cache": self._engine_keys()}

    def _engine_keys(self) -> int:
        """Bytes that an engine of vLLM reserves for keys and values."""
        assert self._sampled is not None
        rollout = self._sampled.rollout
        if not isinstance(rollout, VLLMRolloutConfig):
            return 0
        if not isinstance(rollout.kv_cache_gib, str):
            return int(rollout.kv_cache_gib * GIB)
        if not self.card.is_gpu:
            return KV_CACHE_BYTES_ON_CPU
        try:
            return self._keys_left(rollout)
        except InputError:
            return self.bytes_a_sequence  # the least that an engine needs

    def _keys_left(self, rollout: VLLMRolloutConfig) -> int:
        """Bytes that kv_cache_gib=auto finds on a GPU.

        Raises:
            InputError: They do not hold one sequence.
        """
        # As at the start of a run, before a teacher is opened.
        held = sum(self._components(**self._resting()).values())
        reserve = int(rollout.reserve_gib * GIB) + self.teacher_bytes()
        return share_for_keys(
            int(self.card.capacity_gib * GIB) - held,
            self._sampler_weights,
            reserve,
            self.bytes_a_sequence,
            rollout.batch_size,
        )

    @property
    def lack_of_keys(self) -> str | None:
        """Why kv_cache_gib=auto would end the run at its start. None: it would not."""
        rollout = None if self._sampled is None else self._sampled.rollout
        if not isinstance(rollout, VLLMRolloutConfig) or not self.card.is_gpu:
            return None
        try:
            if isinstance(rollout.kv_cache_gib, str):
                self._keys_left(rollout)
        except InputError as refused:
            return str(refused)
        return None

    @property
    def bytes_a_sequence(self) -> int:
        """Keys and values of one sequence of the longest."""
        assert self._sampled is not None
        return kv_cache_bytes(
            self.architecture, self.cfg.model.dtype, longest_sequence(self._sampled) + 1
        )

    def sync(self) -> Components:
        """Weights on their way to the sampler: what is gathered, and what an engine lays out."""
        assert self._sampled is not None
        size = self.expert_parallel_size
        layer = self.sizes.layer_experts * size * self.cfg.model.dtype.num_bytes
        moving = 0
        rollout = self._sampled.rollout
        sampler = {"sampler_weights": self._sampler_weights}
        if isinstance(rollout, VLLMRolloutConfig):
            # What was gathered is kept until the layer is complete, which is then laid out.
            moving = 2 * layer if size > 1 else layer
        elif size > 1:
            moving = self.sizes.largest_matrix * size * self.cfg.model.dtype.num_bytes
        resting = self._resting()
        # At the first sync the engine has its keys, and no teacher is open yet; later neither.
        first = self._components(
            **resting, **sampler, activations=moving, kv_cache=self._engine_keys()
        )
        keys = 0 if self.card.is_gpu else self._engine_keys()
        later = self._components(
            **resting, **sampler, activations=moving, kv_cache=keys, teacher=self.teacher_bytes()
        )
        return max(first, later, key=lambda parts: sum(parts.values()))

    def sample(self) -> Components:
        """Responses are sampled, beside an open teacher."""
        assert self._sampled is not None
        rollout = self._sampled.rollout
        keys, working, logits = self._engine_keys(), 0, 0
        if isinstance(rollout, VLLMRolloutConfig) and self.card.is_gpu:
            working = ENGINE_AWAKE
        if isinstance(rollout, NativeRolloutConfig):
            keys, working, logits = self._native_sampling(rollout)
        return self._components(
            **self._resting(),
            teacher=self.teacher_bytes(),
            sampler_weights=self._sampler_weights,
            kv_cache=keys,
            activations=working,
            logits=logits,
        )

    def _native_sampling(self, rollout: NativeRolloutConfig) -> tuple[int, int, int]:
        """Keys at their longest, a layer copied as they grow; the head, and the draw of tokens."""
        assert self._sampled is not None
        cfg, rows = self.architecture, rollout.batch_size
        if self.cfg.stage.eval.suite is None:  # of which there may be more than of a step's
            rows = min(rows, math.ceil(self.num_responses / self.gpus))
        longest = longest_sequence(self._sampled) + GROWTH
        width = 2 * cfg.num_key_value_heads * cfg.head_dim * self.cfg.model.dtype.num_bytes
        keys = rows * longest * width * cfg.num_hidden_layers

        def draw() -> object:
            logits = torch.empty(rows, cfg.vocab_size)
            return draw_tokens(logits, torch.empty(rows, dtype=torch.float64))

        logits, weights = measure(self.card.is_gpu, draw), cfg.vocab_size * cfg.hidden_size
        if is_laid_out(weights, torch_dtype(self.cfg.model.dtype), on_cpu=not self.card.is_gpu):
            logits += 4 * weights
        return keys, rows * longest * width // 2, logits

    @property
    def num_responses(self) -> int:
        """Of a step, over all ranks."""
        assert self.opd is not None
        return self.opd.global_batch_size * self.opd.responses_per_prompt

    def checkpoint(self) -> Components:
        """State is written, tensor by tensor from where it lies."""
        return self._components(
            **_added(self._resting(), self._asleep()), teacher=self.teacher_bytes()
        )

    def phases(self) -> dict[str, Components]:
        """Bytes of a rank by phase and component."""
        if self.opd is None:
            found = {"train": self.train(), "checkpoint": self.checkpoint()}
            measuring = {} if self._sampled is None else {"sample": self.sample()}
            return found | measuring
        return {
            "sync": self.sync(),
            "sample": self.sample(),
            "score": self.score(),
            "train": self.train(),
            "checkpoint": self.checkpoint(),
        }

    # Beside the card.

    @property
    def state(self) -> int:
        """Bytes of this rank's state in a checkpoint."""
        return 12 * self.partition

    def host(self, ranks_per_node: int) -> int:
        """Bytes of a node's memory at the worst moment, with the processes themselves."""
        offloaded = 12 * self.partition if self.cfg.parallel.offload_while_sampling else 0
        saves = self.cfg.checkpoint
        saved = self.state if saves.asynchronous and saves.save_every is not None else 0
        # transformers loads a teacher on the CPU first.
        loaded = max(
            (self._bytes_of_teacher(t) for t in self._teachers() if isinstance(t, HFTeacherConfig)),
            default=0,
        )
        process = PROCESS if self.card.is_gpu else 0
        return ranks_per_node * (offloaded + saved + (loaded if self.card.is_gpu else 0) + process)

    @property
    def num_checkpoints(self) -> int:
        """That lie on the disk at a time, the one that is being written too, without milestones."""
        cfg = self.cfg.checkpoint
        if cfg.save_every is None:
            return 0
        # The last phase's end is the run's.
        ends = max(0, len(self._phases()) - 1) * cfg.keep_phase_ends
        return cfg.keep_last + 1 + ends + (cfg.best.metric is not None)

    @property
    def exports(self) -> int:
        """Bytes of exported weights, of each phase and of the run."""
        whole = sizes_of(self.architecture, 1).total * self.cfg.model.dtype.num_bytes
        return whole * (1 + len(self._phases()) + self.cfg.checkpoint.best.export)

    def disk(self) -> int:
        """Bytes of checkpoints and exports, and of a score cache."""
        found = self.exports + self.num_checkpoints * self.state * self.gpus
        if self.opd is not None and self.opd.score_cache.path is not None:
            found += int(self.opd.score_cache.max_gib * GIB)
        return found


# Of a rank's process with CUDA, and of what it reads rows through.
PROCESS = 6 * GIB


def _added(*parts: Mapping[str, int]) -> Components:
    """Sum components."""
    names = {name for part in parts for name in part}
    return {name: sum(part.get(name, 0) for part in parts) for name in names}


def total(parts: Iterable[int]) -> float:
    """Sum bytes, in GiB."""
    return sum(parts) / GIB
