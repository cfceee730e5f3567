"""Servers that a run asks over HTTP."""

from dataclasses import dataclass
from typing import ClassVar

from omegaconf import MISSING

from marco_train.errors import require, require_positive


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
