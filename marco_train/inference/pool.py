"""Requests to several servers that may be slow, busy, broken or away: all waiting happens here.

A request goes to the server with the fewest open ones and is made anew, after a jittered pause,
until it is answered: by another server, where there is one. A busy server (429, 503) halves the
number of open requests, answers raise it again. A server that failed, or gave an answer that cannot
be used, passes its health check before it is asked again. While no server answers, all ranks wait
together; the run is saved early, once in a wait, and in the end given up.

Requests are tasks of one event loop in a thread of its own: what they share needs no locks, and a
task that is cancelled ends its connection.
"""

import asyncio
import random
import time
from collections import Counter
from collections.abc import Callable, Coroutine, Iterator, Sequence
from concurrent.futures import Future, as_completed
from contextlib import suppress
from dataclasses import dataclass
from threading import Thread
from typing import Any, TypeVar

import httpx

from marco_train.config.servers import ServersConfig
from marco_train.distributed import is_main, reduce_max
from marco_train.errors import (
    InputError,
    RejectedError,
    ServersUnavailable,
    UntrustedServerError,
    UnusableAnswerError,
)
from marco_train.tracking import log_line

T = TypeVar("T")

CONNECT_SECONDS = 10.0
FIRST_PAUSE_SECONDS = 0.25
LONGEST_PAUSE_SECONDS = 20.0
# Seconds for which a server that failed is passed over while another one is at hand.
COOL_DOWN_SECONDS = 5.0
# Ranks agree at least this often, so that none waits for another one's servers for long.
TURN_SECONDS = 5.0
# How a rank's requests stand; the worst of all ranks counts.
DONE, WAITING, AWAY, GIVEN_UP = range(4)
# Times that a request is made whose answers cannot be used.
MAX_UNUSABLE = 3
BUSY = {429, 503}
JSON = {"content-type": "application/json"}
# What the lack of a field in an answer, or another type of it, raises.
MALFORMED = (AttributeError, EOFError, LookupError, TypeError, ValueError)


@dataclass(eq=False)
class Server:
    """One server as the pool sees it."""

    url: str
    num_open: int = 0
    healthy: bool = False
    health_check: asyncio.Task[None] | None = None  # the last one
    cool_until: float = 0.0

    def cool_down(self) -> None:
        """Note a failure."""
        self.healthy = False
        self.cool_until = time.monotonic() + COOL_DOWN_SECONDS


Work = Callable[[Server], Coroutine[Any, Any, T]]
"""Asks a server with `ServerPool.ask`, once or more, and makes a value of the answers.

It raises `UnusableAnswerError` or one of `MALFORMED` where it cannot, `UntrustedServerError` for
the server to be passed over like one that is away, and `InputError` to end the run.
"""
SaveEarly = Callable[[], bool]
"""Save the run, on all ranks; False where nothing was learnt since it was opened."""


def nothing_to_save() -> bool:
    """Stand for a run where there is none."""
    return False


class TransientError(Exception):
    """A request failed in a way that may pass."""


class ServerPool:
    """Asks servers from a thread of its own."""

    def __init__(
        self, cfg: ServersConfig, name: str, health_check: Work[None], save_early: SaveEarly
    ) -> None:
        """Start the thread; no server is asked yet.

        Args:
            cfg: Servers and bounds.
            name: What messages call the one that they serve, as "teacher".
            health_check: Comes before a server's first answer and after a failure.
            save_early: Called on all ranks at once while servers are away.
        """
        self.servers = [Server(url.rstrip("/")) for url in cfg.urls]
        self.last_error = "no answer yet"
        self.counts: Counter[str] = Counter()
        self._cfg = cfg
        self._name = name
        self._health_check = health_check
        self._save_early = save_early
        timeout = httpx.Timeout(cfg.request_timeout_seconds, connect=CONNECT_SECONDS)
        limits = httpx.Limits(max_connections=cfg.max_requests)
        headers = {} if cfg.api_key is None else {"Authorization": f"Bearer {cfg.api_key}"}
        self._client = httpx.AsyncClient(
            timeout=timeout, limits=limits, headers=headers, trust_env=False
        )
        self._at_work = asyncio.Semaphore(cfg.max_requests)  # open, or in a pause
        self._max_open = float(cfg.max_requests)
        self._room = asyncio.Condition()
        self._num_waiting = 0
        self._silent_since = 0.0  # while requests wait
        self._jitter = random.Random()  # leaves the run's own generator alone
        self._loop = asyncio.new_event_loop()
        self._thread = Thread(target=self._loop.run_forever, name=f"asks {name}", daemon=True)
        self._thread.start()

    def submit(self, work: Work[T], server: Server | None = None) -> Future[T]:
        """Ask one server, or whichever has the fewest open requests, until the work succeeds.

        Returns:
            A future of its value. It fails with `RejectedError` where no answer could be used, and
            with `InputError` where a server refuses a request or is not fit.
        """
        return asyncio.run_coroutine_threadsafe(self._answer(work, server), self._loop)

    def check(self, servers: Sequence[Server]) -> None:
        """Have servers pass their health checks; ranks together name all servers.

        No request is open meanwhile.
        """
        for future in self.as_answered(self.submit_unchecked(self._health_check, servers)):
            future.result()

    def check_again(self) -> None:
        """Have each server pass its health check once more before its next answer."""
        for server in self.servers:
            server.healthy = False

    def submit_unchecked(self, work: Work[T], servers: Sequence[Server]) -> list[Future[T]]:
        """Ask each of several servers for what comes before their health checks."""
        for server in self.servers:
            server.healthy = True
        return [self.submit(work, server) for server in servers]

    def as_answered(
        self, futures: Sequence[Future[T]], may_reject: bool = False
    ) -> Iterator[Future[T]]:
        """Yield futures as each is answered, until all ranks have theirs; every rank takes part.

        Those that fail with `RejectedError` are yielded too where they may be rejected.

        Raises:
            InputError: A server refuses a request, is not fit, or gives no answer of use.
            ServersUnavailable: On every rank, after `give_up_after_seconds` without any answer.
        """
        waiting, limit = set(futures), self._cfg.save_after_seconds
        while True:
            turn_ends = time.monotonic() + TURN_SECONDS
            while waiting and (left := self._seconds_left(limit, turn_ends)) > 0:
                with suppress(TimeoutError):  # there may have been an answer since
                    for future in as_completed(waiting, left):
                        waiting.remove(future)
                        error = future.exception()
                        if isinstance(error, RejectedError) and not may_reject:
                            error = InputError(f"a {self._name} server does not work: {error}")
                        if isinstance(error, InputError):
                            raise error
                        yield future
            silent = self._silent_seconds()
            away = GIVEN_UP if silent >= self._cfg.give_up_after_seconds else AWAY
            worst = reduce_max(DONE if not waiting else WAITING if silent < limit else away)
            if worst == DONE:
                return
            if worst == WAITING:
                continue
            limit = self._cfg.give_up_after_seconds
            saved = self._save_early()
            message = (
                f"no answer for {silent:.0f} s from the {self._name}'s servers "
                f"{', '.join(self._cfg.urls)}, {len(waiting)} of {len(futures)} requests of this "
                f"rank are open; the last error: {self.last_error}"
            )
            if worst == GIVEN_UP:
                self.close()
                raise ServersUnavailable(message)
            if is_main():
                state = "the run is saved" if saved else "nothing was learnt yet that is not saved"
                log_line(f"{message}; {state}, and it waits")

    def _silent_seconds(self) -> float:
        """How long there have been requests and no answer to any."""
        return time.monotonic() - self._silent_since if self._num_waiting else 0.0

    def _seconds_left(self, limit: float, turn_ends: float) -> float:
        """How long this rank may wait before it agrees with the others."""
        return min(limit - self._silent_seconds(), turn_ends - time.monotonic())

    def close(self) -> None:
        """Cancel open requests, and end connections and thread; again changes nothing."""
        if not self._loop.is_closed():
            asyncio.run_coroutine_threadsafe(self._cancel_all(), self._loop).result()
            self._loop.call_soon_threadsafe(self._loop.stop)
            self._thread.join()
            self._loop.close()

    async def _cancel_all(self) -> None:
        tasks = asyncio.all_tasks() - {asyncio.current_task()}
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
        await self._client.aclose()

    async def _answer(self, work: Work[T], chosen: Server | None) -> T:
        if self._num_waiting == 0:
            self._silent_since = time.monotonic()
        self._num_waiting += 1
        pause, num_unusable = 0.0, 0
        try:
            async with self._at_work:
                while True:
                    await asyncio.sleep(self._jitter.uniform(0, pause))
                    try:
                        return await self._attempt(work, chosen)
                    except InputError:  # a `ValueError`, and no malformed answer
                        raise
                    except (TransientError, UntrustedServerError) as error:
                        self.last_error = str(error)
                    except (UnusableAnswerError, *MALFORMED) as error:
                        in_words = isinstance(error, UnusableAnswerError)
                        self.last_error = str(error) if in_words else f"malformed: {error!r}"
                        num_unusable += 1
                        if num_unusable == MAX_UNUSABLE:
                            raise RejectedError(self.last_error) from error
                    pause = min(max(FIRST_PAUSE_SECONDS, 2 * pause), LONGEST_PAUSE_SECONDS)
                    self.counts["repeated_requests"] += 1
        finally:
            self._num_waiting -= 1

    async def _attempt(self, work: Work[T], chosen: Server | None) -> T:
        """Wait for room, and ask the chosen server or the one with the fewest open requests."""
        async with self._room:
            await self._room.wait_for(
                lambda: sum(s.num_open for s in self.servers) < int(self._max_open)
            )
            now = time.monotonic()
            server = chosen or min(self.servers, key=lambda s: (now < s.cool_until, s.num_open))
            server.num_open += 1
        try:
            if not server.healthy:
                if server.health_check is None or server.health_check.done():
                    server.health_check = asyncio.create_task(self._health_check(server))
                await server.health_check  # one for all requests that need it
                server.healthy = True
            value = await work(server)
            self._silent_since = time.monotonic()
            self._max_open = min(self._cfg.max_requests, self._max_open + 1 / self._max_open)
            return value
        except UntrustedServerError:
            server.cool_down()
            raise
        except (UnusableAnswerError, *MALFORMED):
            server.healthy = False
            raise
        finally:
            server.num_open -= 1
            async with self._room:
                self._room.notify_all()

    async def ask(
        self, server: Server, path: str, body: dict[str, Any] | bytes | None = None
    ) -> Any:
        """POST a body, or one in JSON, to one server once, or GET without; the answer's JSON.

        Raises:
            InputError: The server refuses the request.
            TransientError: It did not answer, or said that it cannot now.
        """
        method, url = "GET" if body is None else "POST", server.url + path
        written = isinstance(body, bytes)
        sent: dict[str, Any] = {"content": body, "headers": JSON} if written else {"json": body}
        try:
            response = await self._client.request(method, url, **sent)
        except httpx.RequestError as error:
            server.cool_down()
            raise TransientError(f"{server.url}: {type(error).__name__}: {error}") from error
        status, text = response.status_code, response.text[:500]
        if status in BUSY:
            self._max_open = max(1.0, self._max_open / 2)
        elif status >= 500:
            server.cool_down()
        elif status == 401:
            raise InputError(
                f"{server.url} asks for a key, and "
                f"{'none was sent' if self._cfg.api_key is None else 'not for the one sent'}: set "
                "VLLM_API_KEY to what the server was started with, or servers.api_key"
            )
        elif status >= 400:
            raise InputError(f"{url} refuses a request with {status}: {text}")
        if status >= 400:
            raise TransientError(f"{server.url}: {status} {text}")
        return response.json()
