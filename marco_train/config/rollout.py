"""Who samples the responses: one dataclass a backend, chosen by rollout@stage.rollout=<backend>."""

from dataclasses import dataclass
from enum import Enum

from omegaconf import MISSING

from marco_train.config.architecture import ArchitectureConfig
from marco_train.config.model import DType
from marco_train.config.servers import SamplerServersConfig
from marco_train.errors import InputError, require, require_positive

# At any other the responses are not the policy's own: the sampled-token objective is no unbiased
# estimate of the reverse KL, and the other objectives are the KL of another distribution.
TEMPERATURE = 1.0
AUTO = "auto"
# Tokens of the largest block that vLLM gives out keys by: 128 on a CPU, 16 on a GPU.
KV_BLOCK_TOKENS = 128


class SamplerBackend(Enum):
    """Who makes the rollouts.

    native: our own model with a cache of keys and values; vllm: an engine of vLLM in each rank's
    process; vllm_server: servers of vLLM over HTTP.
    """

    native = "native"
    vllm = "vllm"
    vllm_server = "vllm_server"


class WeightsBy(Enum):
    """How weights reach servers.

    file: a file that trainer and servers reach; nccl: vLLM's weight transfer, from the first rank's
    GPU to those of the servers.
    """

    file = "file"
    nccl = "nccl"


@dataclass(kw_only=True)
class RolloutConfig:
    """What all samplers share."""

    backend: SamplerBackend = MISSING
    """What the group rollout@stage.rollout was set to."""
    canary_tolerance: float | None = None
    """Largest difference of a log-probability between policy and sampler after a sync, in nats.
    None: 1e-4 in float32; in bfloat16 mean and 90 % quantile are bounded by what the first sync
    gave, as `rollout/sync.py` says, and the largest is not."""
    replay_routing: bool = False
    """Whether the policy's update takes the experts that the sampler chose for each token, with
    the weights of its own routers."""

    def __post_init__(self) -> None:
        require(
            self.backend is type(self).backend,
            f"stage.rollout.backend is {self.backend.value}, and its other fields are not that "
            f"sampler's: choose rollout@stage.rollout={self.backend.value} instead",
        )
        require_positive("stage.rollout", canary_tolerance=self.canary_tolerance)


@dataclass(kw_only=True)
class NativeRolloutConfig(RolloutConfig):
    """Our own model, in the trainer's process, with weights of its own."""

    backend: SamplerBackend = SamplerBackend.native
    batch_size: int = 64
    """Responses decoded together on one rank."""

    def __post_init__(self) -> None:
        super().__post_init__()
        require_positive("stage.rollout", batch_size=self.batch_size)


@dataclass(kw_only=True)
class VLLMRolloutConfig(RolloutConfig):
    """An engine of vLLM in the trainer's process."""

    backend: SamplerBackend = SamplerBackend.vllm
    batch_size: int = 256
    """Responses decoded together on one rank."""
    max_tokens_per_batch: int = 16384
    """Tokens of one forward pass on one rank."""
    kv_cache_gib: int | float | str = AUTO
    """Memory for keys and values on one rank. auto: on a GPU what is free beside the trainer, the
    engine's weights, teachers in this process as they are planned, and reserve_gib, but not more
    than batch_size sequences need; on a CPU 4."""
    reserve_gib: float = 6.4
    """What kv_cache_gib=auto leaves free on a GPU: for vLLM's CUDA graphs and workspaces, of which
    a plan counts 2.6, and for what allocators cannot use."""
    expert_parallel: bool = False
    """Whether the engines share the student's experts: each holds an equal part of them instead of
    all, and computes it for the tokens of all ranks, up to max_tokens_per_batch of each; all
    sample as long as one does. With parallel.expert_parallel_size of all ranks a sync moves no
    experts between them. On GPUs only, where it has not been run."""

    def __post_init__(self) -> None:
        super().__post_init__()
        require_positive(
            "stage.rollout",
            batch_size=self.batch_size,
            max_tokens_per_batch=self.max_tokens_per_batch,
            reserve_gib=self.reserve_gib,
        )
        if not isinstance(self.kv_cache_gib, str):
            require_positive("stage.rollout", kv_cache_gib=self.kv_cache_gib)
        require(
            self.kv_cache_gib == AUTO or not isinstance(self.kv_cache_gib, str),
            f"stage.rollout.kv_cache_gib is {self.kv_cache_gib!r}, and must be a number or auto",
        )


@dataclass(kw_only=True)
class VLLMServerRolloutConfig(RolloutConfig):
    """Servers of vLLM, as scripts/serve_sampler.sh starts them."""

    backend: SamplerBackend = SamplerBackend.vllm_server
    servers: SamplerServersConfig = MISSING
    sync_path: str = MISSING
    """Directory that trainer and servers reach under the same name, through which the weights go;
    of one run at a time."""
    weights_by: WeightsBy = WeightsBy.file
    """nccl takes servers that were started with --weight-transfer-config '{"backend": "nccl"}', and
    memory of the first rank's machine for all weights: the file is then written from there, while
    servers sample, for one that comes back, that was lost on the way or that cannot be met. It has
    not been run."""
    max_staleness: int = 0
    """Updates that the policy may be ahead of the weights that sampled. 0: on-policy; 1: servers
    sample for the coming step while this one trains."""

    def __post_init__(self) -> None:
        super().__post_init__()
        require(
            0 <= self.max_staleness <= 1,
            f"stage.rollout.max_staleness is {self.max_staleness}, and must be 0 or 1: servers "
            "sample one step ahead at most",
        )


def check_replay(rollout: RolloutConfig, student: ArchitectureConfig) -> None:
    """Refuse to replay the routing of a student without routers."""
    require(
        student.is_moe or not rollout.replay_routing,
        "stage.rollout.replay_routing is true, but the student is dense and has no experts: set it "
        "to false",
    )


def check_expert_shares(
    rollout: RolloutConfig, student: ArchitectureConfig, num_ranks: int
) -> None:
    """Refuse engines that cannot share a student's experts over `num_ranks` evenly."""
    if not isinstance(rollout, VLLMRolloutConfig) or not rollout.expert_parallel:
        return
    if student.num_experts is None:
        raise InputError(
            "stage.rollout.expert_parallel is true, but the student is dense and has no experts to "
            "share: set it to false"
        )
    require(
        student.num_experts % num_ranks == 0,
        f"stage.rollout.expert_parallel shares the student's {student.num_experts} experts over "
        f"all {num_ranks} ranks of this launch, which do not divide them: launch another number, "
        "or set it to false",
    )


def kv_cache_bytes(architecture: ArchitectureConfig, dtype: DType, max_length: int) -> int:
    """Memory for keys and values of one sequence of `max_length` tokens in an engine of vLLM."""
    # One block more is never given out.
    blocks = -(-max_length // KV_BLOCK_TOKENS) + 1
    return blocks * KV_BLOCK_TOKENS * key_bytes_a_token(architecture, dtype)


def check_kv_cache(
    cfg: VLLMRolloutConfig, architecture: ArchitectureConfig, dtype: DType, max_length: int
) -> None:
    """Refuse memory for keys and values that does not hold one sequence of `max_length` tokens.

    Raises:
        InputError: Gives both numbers; with kv_cache_gib=auto, what is free decides later.
    """
    if isinstance(cfg.kv_cache_gib, str):
        return
    needed = kv_cache_bytes(architecture, dtype, max_length)
    a_token = key_bytes_a_token(architecture, dtype)
    require(
        cfg.kv_cache_gib * 2**30 >= needed,
        f"stage.rollout.kv_cache_gib is {cfg.kv_cache_gib}, and one sequence of {max_length} "
        f"tokens needs {needed / 2**30:.4f}, {a_token} bytes a token: "
        "give as much or more, or lower stage.max_prompt_length + stage.max_response_length",
    )


def key_bytes_a_token(architecture: ArchitectureConfig, dtype: DType) -> int:
    """Memory for the keys and values of one token."""
    width = architecture.num_key_value_heads * architecture.head_dim
    return 2 * architecture.num_hidden_layers * width * dtype.num_bytes
