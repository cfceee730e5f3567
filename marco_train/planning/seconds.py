"""Seconds of each phase, by arithmetic: what is computed, read and sent over what a card can.

Every factor is an assumption that a plan states and its caller may change; none is measured on a
GPU yet.
"""

import math
from dataclasses import asdict, dataclass, fields

from marco_train.config.architecture import ArchitectureConfig
from marco_train.config.lengths import longest_sequence
from marco_train.config.opd import OPDConfig
from marco_train.config.rollout import NativeRolloutConfig, VLLMRolloutConfig, key_bytes_a_token
from marco_train.config.sft import SFTConfig
from marco_train.config.teacher import VLLMServerTeacherConfig
from marco_train.errors import require
from marco_train.planning.memory import Memory, sizes_of
from marco_train.planning.trace import Traced, Work, trace_update

# An engine's work for each tensor of a sync: 0.4 ms, measured on a CPU (rollout/sync.py).
SECONDS_A_TENSOR = 4e-4
# Bytes a second of a card's link to the host.
HOST_LINK = 25e9
# Equal ones, of the steps at which a batch shrinks; the middle of each stands for it.
PARTS = 100


@dataclass(frozen=True, kw_only=True)
class Assumptions:
    """What a plan takes for granted."""

    training_efficiency: float = 0.17
    """Share of the card's peak that an update's products reach."""
    scoring_efficiency: float = 0.25
    """Share of it that a teacher's forward pass reaches."""
    sampling_efficiency: float = 0.8
    """Share of the memory's bandwidth at which weights and keys are read while sampling."""
    server_tokens_per_second: float = 1e5
    """That all servers of a teacher score together."""
    mean_share_of_conversation: float = 0.12
    """Mean length of a conversation, over stage.max_length."""
    mean_share_of_prompt: float = 0.15
    """Mean length of a prompt, over stage.max_prompt_length."""
    mean_share_of_response: float = 0.2
    """Mean length of a response, over stage.max_response_length; the longest takes all of it, and
    between them the share that is longer than a part t of it is (1 - t) ** (1 / this - 1)."""
    imbalance: float = 1.0
    """Rows of this rank's experts, over the mean of the ranks."""
    disk_gib_per_second: float = 2.0
    """At which a node writes checkpoints."""
    host_gib_per_node: float = 1900.0
    """Memory of a node."""
    ranks_per_node: int = 8

    def __post_init__(self) -> None:
        for name, value in asdict(self).items():
            require(
                math.isfinite(value) and value > 0,
                f"{name} is {value}, and must be greater than 0",
            )
            shares = ("efficiency", "mean_share")
            require(
                value <= 1 or not any(word in name for word in shares),
                f"{name} is {value}, and must be a share up to 1",
            )


NAMES = {field.name: field.type for field in fields(Assumptions)}


def executed(work: Work) -> float:
    """Operations of a pass on a card, whose kernels leave out half of causal attention."""
    return work.layers + work.attention / 2 + work.head


def weights_a_step(architecture: ArchitectureConfig, batch: float) -> int:
    """Weights that a step of decoding reads: all dense ones, and the experts that a batch takes."""
    sizes = sizes_of(architecture, 1)
    if architecture.num_experts is None or architecture.num_experts_per_tok is None:
        return sizes.dense
    missed = (1 - architecture.num_experts_per_tok / architecture.num_experts) ** batch
    return sizes.dense + int(sizes.experts * (1 - missed))


class Time:
    """Seconds of a step's phases on one rank, and of a run."""

    def __init__(self, memory: Memory, assumed: Assumptions) -> None:
        self._memory = memory
        self._cfg = memory.cfg
        self._assumed = assumed

    @property
    def mean_length(self) -> float:
        """Tokens of a sequence."""
        stage = self._cfg.stage
        if isinstance(stage, OPDConfig):
            prompt = self._assumed.mean_share_of_prompt * stage.max_prompt_length
            return prompt + self._mean_response
        assert isinstance(stage, SFTConfig)
        return self._assumed.mean_share_of_conversation * stage.max_length

    @property
    def _mean_response(self) -> float:
        stage = self._cfg.stage
        assert isinstance(stage, OPDConfig)
        return self._assumed.mean_share_of_response * stage.max_response_length

    @property
    def tokens_a_step(self) -> float:
        """Over all ranks."""
        stage = self._cfg.stage
        sequences = stage.global_batch_size
        if isinstance(stage, OPDConfig):
            sequences *= stage.responses_per_prompt
        return float(sequences * self.mean_length)

    def _work_of(self, traced: Traced, num_tokens: int, longest: int) -> float:
        """Operations of a rank's tokens of a step, whose sequences are shorter than the longest."""
        work = traced.work
        mean = Work(work.layers, work.attention * min(1, 2 * self.mean_length / longest), work.head)
        share = self.tokens_a_step / self._memory.gpus / num_tokens
        return executed(mean) * share

    def train(self) -> float:
        """Of an update."""
        card = self._memory.card
        num_tokens = self._cfg.data.max_tokens_per_microbatch
        longest = longest_sequence(self._cfg.stage)
        work = self._work_of(self._memory.update, num_tokens, longest)
        seconds = work / (card.tflops * 1e12 * self._assumed.training_efficiency)
        if self._cfg.parallel.offload_while_sampling:
            seconds += 2 * 12 * self._memory.partition / HOST_LINK
        return seconds

    def sync(self) -> float:
        """Of a hand-over to the sampler."""
        memory = self._memory
        cfg = memory.architecture
        experts = 3 * (cfg.num_experts or 0) if cfg.is_moe else 3
        tensors = cfg.num_hidden_layers * (experts + 9)
        weights = sizes_of(cfg, 1).total * self._cfg.model.dtype.num_bytes
        rate = HOST_LINK
        if isinstance(memory.opd and memory.opd.rollout, NativeRolloutConfig | VLLMRolloutConfig):
            rate = memory.card.bandwidth_gb * 1e9 / 4
        return float(tensors * SECONDS_A_TENSOR + weights / rate)

    @property
    def sampled_together(self) -> int:
        """Responses that a rank decodes at a time, while there are enough of them."""
        memory, opd = self._memory, self._memory.opd
        assert opd is not None
        responses = math.ceil(memory.num_responses / memory.gpus)
        batch = min(responses, getattr(opd.rollout, "batch_size", responses))
        keys = memory.sample()["kv_cache"]
        if keys:
            batch = min(batch, max(1, int(keys / (self._bytes_a_token * self.mean_length))))
        return batch

    @property
    def _bytes_a_token(self) -> int:
        """Of keys and values."""
        return key_bytes_a_token(self._memory.architecture, self._cfg.model.dtype)

    def sample(self) -> float:
        """Until the last response has ended.

        While responses wait, one takes the place of each that ends; then the batch shrinks for as
        many steps as the longest has tokens, by the lengths that are assumed, down to one. A step
        reads all dense weights and the experts that its batch takes. The keys that a response
        reads, of its prompt at every token and of half itself, are as many in any batch.
        """
        memory, opd, share = self._memory, self._memory.opd, self._assumed.mean_share_of_response
        assert opd is not None
        responses = math.ceil(memory.num_responses / memory.gpus)
        batch, response = self.sampled_together, self._mean_response
        going_on = [(1 - (n + 0.5) / PARTS) ** (1 / share - 1) for n in range(PARTS)]
        shrinking = [weights_a_step(memory.architecture, max(1, batch * s)) for s in going_on]
        weights = (responses / batch - 1) * response * weights_a_step(memory.architecture, batch)
        weights += opd.max_response_length * sum(shrinking) / PARTS
        # Half the mean square of a response's length is response ** 2 / (1 + share).
        keys = response * (self.mean_length - response + response / (1 + share))
        read = weights * self._cfg.model.dtype.num_bytes + responses * keys * self._bytes_a_token
        return read / (memory.card.bandwidth_gb * 1e9 * self._assumed.sampling_efficiency)

    def score(self) -> float:
        """Of the slowest phase's teacher; of servers what sampling does not hide is not known."""
        memory, opd = self._memory, self._memory.opd
        assert opd is not None
        found = [0.0]
        for phase in opd.cascade.values():
            shapes = memory.score_shapes(phase.teacher)
            if shapes is not None:
                traced = trace_update(shapes)
                work = self._work_of(traced, shapes.num_tokens, shapes.longest)
                rate = memory.card.tflops * 1e12 * self._assumed.scoring_efficiency
                found.append(work / rate)
            if isinstance(phase.teacher, VLLMServerTeacherConfig):
                found.append(self.tokens_a_step / self._assumed.server_tokens_per_second)
        return max(found)

    def checkpoint(self) -> float:
        """Of one checkpoint."""
        if self._cfg.checkpoint.save_every is None:
            return 0.0
        ranks = min(self._memory.gpus, self._assumed.ranks_per_node)
        return ranks * self._memory.state / 2**30 / self._assumed.disk_gib_per_second

    def phases(self) -> dict[str, float]:
        """Seconds of each phase when it is due."""
        found = {"train": self.train(), "checkpoint": self.checkpoint()}
        if self._memory.opd is None:
            return found
        return {"sync": self.sync(), "sample": self.sample(), "score": self.score(), **found}

    def step(self) -> float:
        """Of a step, with its share of a checkpoint."""
        phases = self.phases()
        every = self._cfg.checkpoint.save_every
        saved = phases.pop("checkpoint") / every if every else 0.0
        return sum(phases.values()) + saved

    def num_steps(self, epoch_rows: int | None) -> int | None:
        """Of the run. None: an epoch's rows have to be counted first.

        Args:
            epoch_rows: Rows of an epoch. None: they were not counted.
        """
        stage = self._cfg.stage
        assert isinstance(stage, SFTConfig | OPDConfig)
        if epoch_rows is None and stage.counts_epochs:
            return None
        return stage.total_steps(epoch_rows)

    def wire_gib(self) -> dict[str, float]:
        """What a rank sends in a step, over each wire."""
        memory = self._memory
        size, gpus = memory.expert_parallel_size, memory.gpus
        microbatches = math.ceil(
            self.tokens_a_step / gpus / self._cfg.data.max_tokens_per_microbatch
        )
        replicas = gpus // size
        ring = memory.sizes.dense * (gpus - 1) / gpus + memory.sizes.experts * (
            (replicas - 1) / replicas
        )
        # Gradients in float32 to the partitions' owners, and new weights back.
        found = {
            "experts": microbatches * memory.update.wire_bytes,
            "gradients": ring * (8 if self._cfg.parallel.zero_stage == 1 else 4 * microbatches),
            "new_weights": ring * self._cfg.model.dtype.num_bytes,
        }
        if memory.opd is not None:
            num_bytes = memory.sizes.experts * self._cfg.model.dtype.num_bytes
            found["sync"] = num_bytes * (size - 1)
        if self._cfg.parallel.offload_while_sampling:
            found["host"] = 2 * 12 * memory.partition
        return {name: round(value / 2**30, 3) for name, value in found.items()}
