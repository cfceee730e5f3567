"""Requests to several servers that may be slow, busy, broken or away.

A request goes to the server with the fewest open ones and is made anew, after a jittered pause,
until it is answered: by another server, where there is one. A busy server (429, 503) halves the
number of open requests, answers raise it again. A server that failed, or gave an answer that cannot
be used, is checked before it is trusted again. Whoever waits decides how long; see `Patience`.
"""

import threading
import time
from collections import Counter
from collections.abc import Callable, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, wait
from dataclasses import dataclass, field
from functools import partial
from queue import SimpleQueue
from threading import Thread
from typing import Any, Generic, TypeVar

import httpx
from tenacity import (
    Retrying,
    retry_if_exception_type,
    sleep_using_event,
    stop_when_event_set,
    wait_random_exponential,
)

from marco_train.config.servers import ServersConfig
from marco_train.distributed import reduce_max
from marco_train.errors import AwayError, InputError

T = TypeVar("T")

CONNECT_SECONDS = 10.0
FIRST_PAUSE_SECONDS = 0.25
LONGEST_PAUSE_SECONDS = 20.0
# Seconds for which a server that failed is passed over while another one is at hand.
PASSED_OVER_SECONDS = 5.0
# Times that a question is asked whose answers cannot be used.
MAX_UNUSABLE = 3
# Seconds between two looks at how long servers have been silent.
POLL_SECONDS = 1.0
BUSY = {429, 503}


class UnusableAnswerError(ValueError):
    """A server answered with something else than what it was asked for."""


class RejectedError(RuntimeError):
    """No answer to a question could be used, as often as it was asked."""


class _AgainError(RuntimeError):
    """A request failed in a way that may pass."""


class _AwayJustNowError(_AgainError):
    """Another question found the server away while this one waited to ask."""


@dataclass
class Server:
    """One server as the pool sees it."""

    url: str
    num_open: int = 0
    trusted: bool = False
    checking: threading.Lock = field(default_factory=threading.Lock)
    num_failures: int = 0
    passed_over_until: float = 0.0


@dataclass(frozen=True)
class _Question(Generic[T]):
    """What `ServerPool.submit` was given."""

    path: str
    body: dict[str, Any] | None
    read: Callable[[Any], T]
    server: Server | None


Ask = Callable[[str, dict[str, Any] | None], Any]
"""POST a body to a path of one server, or GET without one; the JSON of the answer."""


class ServerPool:
    """Asks servers from threads of its own."""

    def __init__(self, cfg: ServersConfig, trust: Callable[[str, Ask], None]) -> None:
        """Open connections.

        Args:
            cfg: Servers and bounds.
            trust: Checks a server, given its URL, before its first answer and after a failure;
                raises `InputError` to end the run.
        """
        self.servers = [Server(url.rstrip("/")) for url in cfg.urls]
        self._trust = trust
        timeout = httpx.Timeout(cfg.request_timeout_seconds, connect=CONNECT_SECONDS)
        limits = httpx.Limits(max_connections=cfg.max_requests)
        self._client = httpx.Client(timeout=timeout, limits=limits, trust_env=False)
        self._requests: SimpleQueue[tuple[Future[Any], Callable[[], Any]] | None] = SimpleQueue()
        # Daemons, since a request that hangs must not hold up the end of the run.
        self._threads = [Thread(target=self._work, daemon=True) for _ in range(cfg.max_requests)]
        for thread in self._threads:
            thread.start()
        self._closing = threading.Event()
        self._changed = threading.Condition()
        self._max_open = float(cfg.max_requests)
        self._bound = float(cfg.max_requests)
        self._num_waiting = 0
        self._answered = 0.0
        self.last_error = "no answer yet"
        self._counts: Counter[str] = Counter()

    def submit(
        self,
        path: str,
        body: dict[str, Any] | None,
        read: Callable[[Any], T],
        server: Server | None = None,
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
        question = _Question(path, body, read, server)
        future: Future[T] = Future()
        with self._changed:
            if self._num_waiting == 0:
                self._answered = time.monotonic()
            self._num_waiting += 1
        self._requests.put((future, partial(self._until_answered, question)))
        return future

    def check_anew(self) -> None:
        """Trust no server any more until it was checked; while no question is open."""
        for server in self.servers:
            server.trusted = False

    def trust_all(self) -> None:
        """Take all servers as checked: other ranks have."""
        for server in self.servers:
            server.trusted = True

    def seconds_without_answer(self) -> float:
        """How long there have been questions and no answer to any."""
        with self._changed:
            return time.monotonic() - self._answered if self._num_waiting else 0.0

    def take_counts(self) -> Counter[str]:
        """Repeated requests since last taken."""
        with self._changed:
            counts, self._counts = self._counts, Counter()
        return counts

    def close(self) -> None:
        """Drop open requests and let the threads go."""
        self._closing.set()
        with self._changed:
            self._changed.notify_all()
        for _ in self._threads:
            self._requests.put(None)

    def _work(self) -> None:
        """Answer requests in turn; one thread."""
        while (request := self._requests.get()) is not None:
            future, ask = request
            try:
                future.set_result(ask())
            except BaseException as error:
                future.set_exception(error)
            finally:
                with self._changed:
                    self._num_waiting -= 1

    def _until_answered(self, question: _Question[T]) -> T:
        num_attempts = num_unusable = 0

        def attempt() -> T:
            nonlocal num_attempts, num_unusable
            num_attempts += 1
            if num_attempts > 1:
                self._count("repeated_requests")
            try:
                return self._attempt(question)
            except UnusableAnswerError as error:
                self.last_error = str(error)
                num_unusable += 1
                if num_unusable == MAX_UNUSABLE:
                    raise RejectedError(str(error)) from error
                raise

        attempts = Retrying(
            retry=retry_if_exception_type((_AgainError, UnusableAnswerError)),
            wait=wait_random_exponential(FIRST_PAUSE_SECONDS, LONGEST_PAUSE_SECONDS),
            stop=stop_when_event_set(self._closing),
            sleep=sleep_using_event(self._closing),
            reraise=True,
        )
        answer: T = attempts(attempt)
        return answer

    def _attempt(self, question: _Question[T]) -> T:
        server = self._take(question.server)
        try:
            self._check(server)
            value = question.read(self._request(server, question.path, question.body))
        except _AwayJustNowError:
            raise
        except _AgainError as error:
            self.last_error = f"{server.url}: {error}"
            raise
        except UnusableAnswerError:
            server.trusted = False
            raise
        finally:
            self._give_back(server)
        self._answered = time.monotonic()
        with self._changed:
            self._max_open = min(self._bound, self._max_open + 1 / self._max_open)
        return value

    def _check(self, server: Server) -> None:
        """See that a server is trusted; of many that ask for it, one does the work."""
        known = server.num_failures
        with server.checking:
            if server.trusted:
                return
            if server.num_failures > known:
                raise _AwayJustNowError
            self._trust(server.url, lambda path, body: self._request(server, path, body))
            server.trusted = True

    def _request(self, server: Server, path: str, body: dict[str, Any] | None) -> Any:
        """Ask one server once."""
        try:
            if body is None:
                response = self._client.get(server.url + path)
            else:
                response = self._client.post(server.url + path, json=body)
        except httpx.TransportError as error:
            self._pass_over(server)
            raise _AgainError(f"{type(error).__name__}: {error}") from error
        if response.status_code in BUSY:
            with self._changed:
                self._max_open = max(1.0, self._max_open / 2)
            raise _AgainError(f"busy ({response.status_code})")
        if response.status_code >= 500:
            self._pass_over(server)
            raise _AgainError(f"{response.status_code} {response.text[:200]}")
        if response.status_code >= 400:
            raise InputError(
                f"{server.url}{path} refuses a request with {response.status_code}: "
                f"{response.text[:500]}"
            )
        try:
            return response.json()
        except ValueError as error:
            raise UnusableAnswerError(f"{server.url}{path} answers with no JSON") from error

    def _take(self, chosen: Server | None) -> Server:
        """Wait for room, and choose the server with the fewest open requests."""
        with self._changed:
            while sum(s.num_open for s in self.servers) >= max(1, int(self._max_open)):
                self._changed.wait()
                if self._closing.is_set():
                    raise _AgainError("closed")
            now = time.monotonic()
            server = chosen or min(
                self.servers, key=lambda s: (now < s.passed_over_until, s.num_open)
            )
            server.num_open += 1
            return server

    def _give_back(self, server: Server) -> None:
        with self._changed:
            server.num_open -= 1
            self._changed.notify_all()

    def _pass_over(self, server: Server) -> None:
        server.trusted = False
        server.num_failures += 1
        server.passed_over_until = time.monotonic() + PASSED_OVER_SECONDS

    def _count(self, name: str) -> None:
        with self._changed:
            self._counts[name] += 1


class Patience:
    """How long servers may be silent, which all ranks decide together."""

    def __init__(self, pool: ServerPool, cfg: ServersConfig, name: str) -> None:
        """Wait for a pool until `cfg` gives up; `name` is what its servers are to a reader."""
        self._pool = pool
        self._cfg = cfg
        self._name = name
        self._save_at = cfg.give_up_after_seconds  # nothing is there to be saved yet

    def renew(self) -> None:
        """New questions were asked: from now on the run is to be saved while it waits."""
        self._save_at = self._cfg.save_after_seconds

    @property
    def is_over(self) -> bool:
        """Whether this rank has waited long enough to ask the others."""
        limit = min(self._save_at, self._cfg.give_up_after_seconds)
        return self._pool.seconds_without_answer() >= limit

    def wait(self, futures: Sequence[Future[Any]], fatal: tuple[type[Exception], ...]) -> None:
        """Wait until all ranks have their answers; every rank takes part.

        Raises:
            AwayError: As `agree`.
            fatal: What a question failed with, of these types; others are left in the futures.
        """
        waiting = set(futures)
        while waiting and not self.is_over:
            done, waiting = wait(waiting, POLL_SECONDS, return_when=FIRST_COMPLETED)
            for future in done:
                if isinstance(error := future.exception(), fatal):
                    raise error
        self.agree(len(waiting), len(futures))

    def agree(self, num_open: int, num_asked: int) -> None:
        """Go on if no rank waits for an answer any more; every rank takes part.

        Args:
            num_open: Questions of this rank that are not answered.
            num_asked: All that it asked.

        Raises:
            AwayError: On every rank, where any still waits; `final` says that the time is up.
        """
        silent = self._pool.seconds_without_answer()
        given_up = silent >= self._cfg.give_up_after_seconds
        worst = reduce_max(0 if not num_open else 2 if given_up else 1)
        if worst == 0:
            return
        self._save_at = silent + self._cfg.save_after_seconds
        raise AwayError(
            f"no answer for {silent:.0f} s from {self._name} "
            f"{', '.join(self._cfg.urls)}, {num_open} of {num_asked} requests of this "
            f"rank are open; the last error: {self._pool.last_error}",
            final=worst == 2,
        )
