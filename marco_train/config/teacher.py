"""Who scores the responses, and how."""

from dataclasses import dataclass
from enum import Enum
from typing import ClassVar

from omegaconf import MISSING

from marco_train.config.model import DType
from marco_train.config.servers import ServersConfig
from marco_train.errors import require, require_positive


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
