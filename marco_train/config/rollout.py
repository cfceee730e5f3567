"""Who samples the responses, and how."""

from dataclasses import dataclass
from enum import Enum

from omegaconf import MISSING

from marco_train.config.architecture import ArchitectureConfig
from marco_train.config.servers import ServersConfig
from marco_train.errors import require, require_positive


class SamplerBackend(Enum):
    """Who makes the rollouts.

    hf: our own model with a cache of keys and values; vllm: an engine of vLLM in each rank's
    process; vllm_server: servers of vLLM over HTTP.
    """

    hf = "hf"
    vllm = "vllm"
    vllm_server = "vllm_server"


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


def check_replay(rollout: RolloutConfig, student: ArchitectureConfig) -> None:
    """Refuse to replay the routing of a student without routers."""
    require(
        student.is_moe or not rollout.replay_routing,
        "stage.rollout.replay_routing is true, but the student is dense and has no experts: set it "
        "to false",
    )
