"""Who samples the responses: one dataclass a backend, chosen by rollout@stage.rollout=<backend>."""

from dataclasses import dataclass
from enum import Enum

from omegaconf import MISSING

from marco_train.config.architecture import ArchitectureConfig
from marco_train.config.servers import SamplerServersConfig
from marco_train.errors import require, require_positive

# At any other the responses are not the policy's own: the sampled-token objective is no unbiased
# estimate of the reverse KL, and the other objectives are the KL of another distribution.
TEMPERATURE = 1.0


class SamplerBackend(Enum):
    """Who makes the rollouts.

    native: our own model with a cache of keys and values; vllm: an engine of vLLM in each rank's
    process; vllm_server: servers of vLLM over HTTP.
    """

    native = "native"
    vllm = "vllm"
    vllm_server = "vllm_server"


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
    kv_cache_gib: float = 4
    """Memory for keys and values on one rank."""

    def __post_init__(self) -> None:
        super().__post_init__()
        require_positive(
            "stage.rollout",
            batch_size=self.batch_size,
            max_tokens_per_batch=self.max_tokens_per_batch,
            kv_cache_gib=self.kv_cache_gib,
        )


@dataclass(kw_only=True)
class VLLMServerRolloutConfig(RolloutConfig):
    """Servers of vLLM, as scripts/serve_sampler.sh starts them."""

    backend: SamplerBackend = SamplerBackend.vllm_server
    servers: SamplerServersConfig = MISSING
    sync_path: str = MISSING
    """Directory that trainer and servers reach under the same name, through which the weights go;
    of one run at a time."""
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
