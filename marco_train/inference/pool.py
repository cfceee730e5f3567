"""Requests to several servers that may be slow, busy, broken or away: all waiting happens here.

A request goes to the server with the fewest open ones and is made anew, after a jittered pause,
until it is answered: by another server, where there is one. A busy server (429, 503) halves the
number of open requests, answers raise it again. A server that failed, or gave an answer that cannot
be used, passes its health check before it is asked again. While no server answers, all ranks wait
together; the run is saved early, once in a wait, and in the end given up.
"""

import random
import socket
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, wait
from contextlib import suppress
from dataclasses import dataclass, field
from functools import partial
from queue import SimpleQueue
from threading import Thread
from typing import Any, TypeVar
from weakref import WeakSet

import httpx

from marco_train.config.servers import ServersConfig
from marco_train.distributed import is_main, reduce_max
from marco_train.errors import (
    InputError,
    RejectedError,
    ServersUnavailable,
    UnusableAnswerError,
)
from marco_train.tracking import log_line

T = TypeVar("T")

CONNECT_SECONDS = 10.0
FIRST_PAUSE_SECONDS = 0.25
LONGEST_PAUSE_SECONDS = 20.0
# Seconds for which a server that failed is passed over while another one is at hand.
COOL_DOWN_SECONDS = 5.0
# Times that a request is made whose answers cannot be used.
MAX_UNUSABLE = 3
BUSY = {429, 503}

Body = dict[str, Any] | None
Ask = Callable[[str, Body], Any]
"""POST a body to a path of one server, or GET without one; the JSON of the answer."""
HealthCheck = Callable[[str, Ask], None]
"""Check a server, given its URL; raises `InputError` to end the run."""
SaveEarly = Callable[[], bool]
"""Save the run, on all ranks; False where nothing was learnt since it was opened."""


def nothing_to_save() -> bool:
    """Stand for a run where there is none."""
    return False


class _AgainError(Exception):
    """A request failed in a way that may pass."""


@dataclass
class Server:
    """One server as the pool sees it."""

    url: str
    num_open: int = 0
    healthy: bool = False
    checking: threading.Lock = field(default_factory=threading.Lock)
    num_failures: int = 0
    cool_until: float = 0.0

    def cool_down(self) -> None:
        """Note a failure."""
        self.healthy = False
        self.num_failures += 1
        self.cool_until = time.monotonic() + COOL_DOWN_SECONDS


class ServerPool:
    """Asks servers from threads of its own."""

    def __init__(
        self, cfg: ServersConfig, name: str, health_check: HealthCheck, save_early: SaveEarly
    ) -> None:
        """Open connections.

        Args:
            cfg: Servers and bounds.
            name: What messages call the one that they serve, as "teacher".
            health_check: Made before a server's first answer and after a failure.
            save_early: Called on all ranks at once while servers are away.
        """
        self.servers = [Server(url.rstrip("/")) for url in cfg.urls]
        self.last_error = "no answer yet"
        self._cfg = cfg
        self._name = name
        self._health_check = health_check
        self._save_early = save_early
        timeout = httpx.Timeout(cfg.request_timeout_seconds, connect=CONNECT_SECONDS)
        limits = httpx.Limits(max_connections=cfg.max_requests)
        self._client = httpx.Client(timeout=timeout, limits=limits, trust_env=False)
        self._sockets: WeakSet[socket.socket] = WeakSet()
        self._changed = threading.Condition()
        self._closing = threading.Event()
        self._max_open = float(cfg.max_requests)
        self._num_waiting = 0
        self._silent_since = 0.0  # while requests wait
        self._counts: Counter[str] = Counter()
        self._jitter = random.Random()
        self._requests: SimpleQueue[tuple[Future[Any], Callable[[], Any]] | None] = SimpleQueue()
        # Daemons, since a connection that is being made must not hold up the end of the run.
        self._threads = [Thread(target=self._work, daemon=True) for _ in range(cfg.max_requests)]
        for thread in self._threads:
            thread.start()

    def submit(
        self, path: str, body: Body, read: Callable[[Any], T], server: Server | None = None
    ) -> Future[T]:
        """Ask any server, until one answers.

        Args:
            path: Of the request, behind the server's URL.
            body: JSON to post; None to get instead.
            read: Makes a value of an answer's JSON, or raises `UnusableAnswerError`.
            server: The one to ask. None: whichever has the fewest open requests.

        Returns:
            A future of the value. It fails with `RejectedError` where no answer could be used, and
            with `InputError` where a server refuses the request.
        """
        future: Future[T] = Future()
        with self._changed:
            if self._num_waiting == 0:
                self._silent_since = time.monotonic()
            self._num_waiting += 1
        self._requests.put((future, partial(self._attempt, path, body, read, server)))
        return future

    def answers(self, futures: Sequence[Future[T]]) -> Iterator[T]:
        """Yield answers as they come, none of which may be missing; see `as_answered`."""
        for future in self.as_answered(futures):
            try:
                answer = future.result()
            except RejectedError as error:
                said = f"a server of the {self._name} does not work: {error}"
                raise InputError(said) from error
            yield answer

    def wait(self, futures: Sequence[Future[Any]]) -> None:
        """Wait until all ranks have their answers; see `as_answered`."""
        for _ in self.as_answered(futures):
            pass

    def as_answered(self, futures: Sequence[Future[T]]) -> Iterator[Future[T]]:
        """Yield futures as each is answered, until all ranks have theirs; every rank takes part.

        Raises:
            InputError: A server refuses a request, or is not fit.
            ServersUnavailable: On every rank, after `give_up_after_seconds` without any answer.
        """
        waiting, limit = set(futures), self._cfg.save_after_seconds
        while True:
            while waiting and (left := limit - self._silent_seconds()) > 0:
                done, waiting = wait(waiting, left, return_when=FIRST_COMPLETED)
                for future in done:
                    if isinstance(error := future.exception(), InputError):
                        raise error
                    yield future
            silent, limit = self._silent_seconds(), self._cfg.give_up_after_seconds
            worst = reduce_max(0 if not waiting else 1 if silent < limit else 2)
            if worst == 0:
                return
            saved = self._save_early()
            message = (
                f"no answer for {silent:.0f} s from the {self._name}'s servers "
                f"{', '.join(self._cfg.urls)}, {len(waiting)} of {len(futures)} requests of this "
                f"rank are open; the last error: {self.last_error}"
            )
            if worst == 2:
                self.close()
                raise ServersUnavailable(message)
            if is_main():
                state = "the run is saved" if saved else "nothing was learnt yet that is not saved"
                log_line(f"{message}; {state}, and it waits")

    def _silent_seconds(self) -> float:
        """How long there have been requests and no answer to any."""
        with self._changed:
            return time.monotonic() - self._silent_since if self._num_waiting else 0.0

    def invalidate(self) -> None:
        """Have every server checked before its next answer; while no request is open."""
        for server in self.servers:
            server.healthy = False

    def mark_healthy(self) -> None:
        """Take all servers as checked: other ranks have."""
        for server in self.servers:
            server.healthy = True

    def take_counts(self) -> Counter[str]:
        """Repeated requests since last taken."""
        with self._changed:
            counts, self._counts = self._counts, Counter()
        return counts

    def close(self) -> None:
        """Drop open requests, connections and threads; again changes nothing."""
        self._closing.set()
        for _ in self._threads:
            self._requests.put(None)
        with self._changed:
            self._changed.notify_all()
            for each in self._sockets:
                _end(each)
        deadline = time.monotonic() + CONNECT_SECONDS  # one may still be connecting
        for thread in self._threads:
            thread.join(max(0.0, deadline - time.monotonic()))
        self._client.close()

    def _work(self) -> None:
        """Answer requests in turn; one thread."""
        while (request := self._requests.get()) is not None:
            future, attempt = request
            try:
                found, failed = self._until_answered(attempt), None
            except BaseException as error:
                found, failed = None, error
            with self._changed:
                self._num_waiting -= 1  # before whoever waits goes on and asks more
            if failed is None:
                future.set_result(found)
            else:
                future.set_exception(failed)

    def _until_answered(self, attempt: Callable[[], T]) -> T:
        pause, num_unusable = 0.0, 0
        while not self._closing.wait(self._jitter.uniform(0, pause)):
            try:
                return attempt()
            except UnusableAnswerError as error:
                self.last_error = str(error)
                num_unusable += 1
                if num_unusable == MAX_UNUSABLE:
                    raise RejectedError(str(error)) from error
            except _AgainError:
                pass
            pause = min(max(FIRST_PAUSE_SECONDS, 2 * pause), LONGEST_PAUSE_SECONDS)
            with self._changed:
                self._counts["repeated_requests"] += 1
        raise ServersUnavailable(f"the {self._name}'s servers are asked no more")

    def _attempt(self, path: str, body: Body, read: Callable[[Any], T], chosen: Server | None) -> T:
        server = self._acquire(chosen)
        try:
            self._check_health(server)
            value = read(self._request(server, path, body))
        except UnusableAnswerError:
            server.healthy = False
            raise
        finally:
            self._release(server)
        with self._changed:
            self._silent_since = time.monotonic()
            self._max_open = min(self._cfg.max_requests, self._max_open + 1 / self._max_open)
        return value

    def _check_health(self, server: Server) -> None:
        """Run the health check once; concurrent callers wait for its result."""
        known = server.num_failures
        with server.checking:
            if server.healthy:
                return
            if server.num_failures > known:
                raise _AgainError("the server failed while this request waited for its check")
            self._health_check(server.url, partial(self._request, server))
            server.healthy = True

    def _request(self, server: Server, path: str, body: Body) -> Any:
        """Ask one server once."""
        method, url = "GET" if body is None else "POST", server.url + path
        try:
            response = self._client.request(
                method, url, json=body, extensions={"trace": self._keep_socket}
            )
        except httpx.TransportError as error:
            server.cool_down()
            raise self._again(server, f"{type(error).__name__}: {error}") from error
        if response.status_code in BUSY:
            with self._changed:
                self._max_open = max(1.0, self._max_open / 2)
            raise self._again(server, f"busy ({response.status_code})")
        if response.status_code >= 500:
            server.cool_down()
            raise self._again(server, f"{response.status_code} {response.text[:200]}")
        if response.status_code >= 400:
            raise InputError(
                f"{url} refuses a request with {response.status_code}: {response.text[:500]}"
            )
        try:
            return response.json()
        except ValueError as error:
            raise UnusableAnswerError(f"{url} answers with no JSON") from error

    def _again(self, server: Server, reason: str) -> _AgainError:
        self.last_error = f"{server.url}: {reason}"
        return _AgainError(reason)

    def _keep_socket(self, event: str, info: dict[str, Any]) -> None:
        """Know every connection, so that a request that hangs can be ended."""
        if event in {"connection.connect_tcp.complete", "connection.start_tls.complete"}:
            opened = info["return_value"].get_extra_info("socket")
            with self._changed:
                self._sockets.add(opened)
            if self._closing.is_set():
                _end(opened)

    def _acquire(self, chosen: Server | None) -> Server:
        """Wait for room, and choose the server with the fewest open requests."""
        with self._changed:
            while sum(s.num_open for s in self.servers) >= max(1, int(self._max_open)):
                self._changed.wait()
                if self._closing.is_set():
                    raise _AgainError("closed")
            now = time.monotonic()
            server = chosen or min(self.servers, key=lambda s: (now < s.cool_until, s.num_open))
            server.num_open += 1
            return server

    def _release(self, server: Server) -> None:
        with self._changed:
            server.num_open -= 1
            self._changed.notify_all()


def _end(connection: socket.socket) -> None:
    """End a request that hangs in another thread."""
    with suppress(OSError):  # of one that is closed already
        connection.shutdown(socket.SHUT_RDWR)
