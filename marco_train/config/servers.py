"""Servers that a run asks over HTTP."""

from dataclasses import dataclass
from typing import ClassVar

from omegaconf import MISSING

from marco_train.errors import require, require_positive


@dataclass(kw_only=True)
class ServersConfig:
    """Servers of vLLM over HTTP, all of one model; see `inference/pool.py`."""

    owner: ClassVar[str]

    urls: list[str] = MISSING
    """As http://host:port; requests go to the one with the fewest open."""
    max_requests: int = MISSING
    """Open at once from one rank, over all servers."""
    request_timeout_seconds: float = MISSING
    """Silence of a server after which a request is made anew."""
    save_after_seconds: float = 120
    """Without any answer, after which the run saves a checkpoint and goes on waiting."""
    give_up_after_seconds: float = 1200
    """Without any answer, after which the run ends; it can be resumed."""
    api_key: str | None = None
    """Sent to each server as a bearer token. None: they take requests without one."""

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
class SamplerServersConfig(ServersConfig):
    """Servers that sample."""

    owner: ClassVar[str] = "stage.rollout.servers"

    max_requests: int = 256
    request_timeout_seconds: float = 600
    """As above: long enough for the longest response, and for reading the weights."""


@dataclass(kw_only=True)
class TeacherServersConfig(ServersConfig):
    """Servers that score."""

    owner: ClassVar[str] = "teacher.servers"

    max_requests: int = 64
    request_timeout_seconds: float = 300
    max_rejected: float = 0.02
    """Share of a step's rollouts without a usable score that may be left out of the update."""

    def __post_init__(self) -> None:
        super().__post_init__()
        require(
            0 <= self.max_rejected < 1,
            f"teacher.servers.max_rejected is {self.max_rejected}, and must lie in [0, 1)",
        )
