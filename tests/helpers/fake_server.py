"""A real small HTTP server that scores like vLLM, and misbehaves on script."""

import base64
import io
import json
import math
import os
import socket
import threading
import time
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

VOCAB = 320
HANG_SECONDS = 3.0
# What a question says of sampling, so that no default of a server is left to it.
NEUTRAL = {
    "n": 1,
    "max_tokens": 1,
    "min_tokens": 0,
    "temperature": 1.0,
    "top_p": 1.0,
    "top_k": 0,
    "min_p": 0.0,
    "presence_penalty": 0.0,
    "frequency_penalty": 0.0,
    "repetition_penalty": 1.0,
}


def distribution(prefix: list[int], weights: int = 0) -> Tensor:
    """What the model behind the server says after a prefix, log-probabilities [V]."""
    seed = weights + sum((place + 1) * token for place, token in enumerate(prefix))
    return torch.randn(VOCAB, generator=torch.Generator().manual_seed(seed)).log_softmax(0)


class FakeServer:
    """Answers as long as it runs; `script` says what goes wrong with the next questions."""

    def __init__(self, port: int = 0) -> None:
        self.model = "teacher"
        self.window = 512
        self.weights = 0
        self.scores_given_ids = True
        self.slowness = 0.0  # seconds of an answer
        self.script: list[str] = []
        self.bodies: list[dict[str, Any]] = []  # of questions but the probes
        self.outcomes: Counter[str] = Counter()
        self.keys: set[str | None] = set()  # that came with requests
        self.key: str | None = None  # without which nothing is answered
        self._num_unanswered = 0
        self.num_open = self.most_open = 0
        self._lock = threading.Lock()
        self._stopping = threading.Event()
        self._port = port
        self._http: ThreadingHTTPServer | None = None
        self.start()

    @property
    def url(self) -> str:
        """Where it listens; the same after a restart."""
        return f"http://127.0.0.1:{self._port}"

    @property
    def is_up(self) -> bool:
        """Whether it listens."""
        return self._http is not None

    @property
    def socket(self) -> int:
        """The descriptor on which it listens."""
        assert self._http is not None
        return self._http.fileno()

    def start(self) -> None:
        """Listen."""
        server = self

        class Handler(BaseHTTPRequestHandler):
            def do_GET(self) -> None:
                if self.is_let_in():
                    server.send(self, 200, server.tell(self.path))

            def do_POST(self) -> None:
                body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
                if self.is_let_in():
                    server.answer(self, self.path, body)

            def is_let_in(self) -> bool:
                given = self.headers["Authorization"]
                server.keys.add(given)
                if server.key is None or given == f"Bearer {server.key}":
                    return True
                server.send(self, 401, {"error": "Unauthorized"})
                return False

            def log_message(self, *_: Any) -> None:
                pass

        ThreadingHTTPServer.allow_reuse_address = True
        self._http = ThreadingHTTPServer(("127.0.0.1", self._port), Handler)
        self._http.daemon_threads = True
        self._port = self._http.server_address[1]
        threading.Thread(target=self._http.serve_forever, args=(0.01,), daemon=True).start()

    def stop(self) -> None:
        """Refuse connections from now on."""
        if self._http is not None:
            self._http.shutdown()
            self._http.server_close()
            self._http = None

    def leave(self) -> None:
        """Stop, for good."""
        self.stop()
        self._stopping.set()
        while self.num_open:
            time.sleep(0.01)

    def send(self, handler: BaseHTTPRequestHandler, status: int, content: Any) -> None:
        """Send JSON."""
        data = content if isinstance(content, bytes) else json.dumps(content).encode()
        handler.send_response(status)
        handler.send_header("Content-Length", str(len(data)))
        handler.end_headers()
        handler.wfile.write(data)

    def tell(self, path: str) -> dict[str, Any]:
        """What the server says of itself."""
        return {"data": [{"id": self.model, "max_model_len": self.window}]}

    def is_probe(self, path: str, body: dict[str, Any]) -> bool:
        """Whether a question is a check of the server, which nothing happens to."""
        ids = body.get("prompt") or body["token_ids"]
        return ids[0] == 7 and len(ids) == 16

    def answer(self, handler: BaseHTTPRequestHandler, path: str, body: dict[str, Any]) -> None:
        """Answer, or do what the script says."""
        is_probe = self.is_probe(path, body)
        with self._lock:
            self.num_open += 1
            self._num_unanswered += 1
            self.most_open = max(self.most_open, self._num_unanswered)
            fault = "" if is_probe or not self.script else self.script.pop(0)
            if not is_probe:
                self.bodies.append(body | {"path": path})
                self.outcomes[fault or "fine"] += 1
        try:
            try:
                self._stopping.wait(HANG_SECONDS if fault == "hangs" else self.slowness)
            finally:  # before the answer, which a client may follow up at once
                with self._lock:
                    self._num_unanswered -= 1
            self._respond(handler, path, body, fault)
        except (BrokenPipeError, ConnectionResetError):
            pass
        finally:
            with self._lock:
                self.num_open -= 1

    def _respond(
        self,
        handler: BaseHTTPRequestHandler,
        path: str,
        body: dict[str, Any],
        fault: str,
    ) -> None:
        if fault.isdigit():
            self.send(handler, int(fault), {"error": {"message": f"status {fault}"}})
        elif fault == "dies mid-answer":
            handler.send_response(200)
            handler.send_header("Content-Length", "100000")
            handler.end_headers()
            handler.wfile.write(b'{"choices": [')
            handler.close_connection = True
        elif fault == "no JSON":
            self.send(handler, 200, b"<html>")
        elif fault == "no choices":
            self.send(handler, 200, {"choices": []})
        else:
            self.send(handler, *self.respond(path, body, fault))

    def respond(self, path: str, body: dict[str, Any], fault: str) -> tuple[int, Any]:
        """Status and content of an answer."""
        if not path.endswith("/generate"):
            return 200, self._completed(body, body["prompt"], fault)
        if self.scores_given_ids:
            return 200, self._generated(body, body["token_ids"], fault)
        return 404, {"detail": "Not Found"}

    def _completed(self, body: dict[str, Any], ids: list[int], fault: str) -> dict[str, Any]:
        places = self._places(ids, body["prompt_logprobs"])
        if fault == "one place short":
            places.pop()
        if fault == "NaN":
            places[-1] = {i: {"logprob": math.nan} for i in places[-1]}
        if fault == "minus infinity everywhere":
            places[1:] = [{i: {"logprob": -9999.0} for i in place} for place in places[1:]]
        if fault == "without the token":
            places[-1] = {}
        echoed = [*ids[:-1], (ids[-1] + 1) % VOCAB] if fault == "other ids" else ids
        return {"choices": [{"prompt_logprobs": places, "prompt_token_ids": echoed}]}

    def _places(self, ids: list[int], num_topk: int) -> list[Any]:
        places: list[Any] = [None]
        for end in range(1, len(ids)):
            logprobs = distribution(ids[:end], self.weights)
            named = {ids[end], *logprobs.topk(num_topk).indices.tolist()}
            places.append({str(i): {"logprob": float(logprobs[i])} for i in sorted(named)})
        return places

    def _generated(self, body: dict[str, Any], ids: list[int], fault: str) -> dict[str, Any]:
        params = body["sampling_params"]
        start = params["prompt_logprob_start"]
        rows = params["prompt_logprob_token_ids"]
        assert len(rows) == len(ids) - 1 - start
        found = [
            distribution(ids[: start + 1 + row], self.weights)[given].tolist()
            for row, given in enumerate(rows)
        ]
        if fault == "one place short":
            found.pop()
        if fault == "NaN":
            found[-1] = [math.nan] * len(found[-1])
        if fault == "minus infinity everywhere":
            found = [[-math.inf] * len(row) for row in found]
        content = io.BytesIO()
        np.save(content, np.array(found, dtype=np.float32))
        array = base64.b64encode(content.getvalue()).decode()
        if fault == "half of the array":
            array = array[: len(array) // 8 * 4]
        if fault == "no array":
            return {"prompt_token_id_logprobs": None}
        num_likeliest = params.get("prompt_logprobs")
        asked_for = (
            {} if num_likeliest is None else {"prompt_logprobs": self._places(ids, num_likeliest)}
        )
        echoed = {"prompt_token_ids": ids} if body["return_token_ids"] else {}
        return {"prompt_token_id_logprobs": array} | asked_for | echoed


@contextmanager
def fake_servers(count: int) -> Iterator[list[FakeServer]]:
    """Run several."""
    servers = [FakeServer() for _ in range(count)]
    try:
        yield servers
    finally:
        stop_all(servers)


def stop_all(servers: Sequence[FakeServer]) -> None:
    """Refuse connections, and wait for what is still being answered."""
    for server in servers:
        server.leave()


def connections(servers: Sequence[FakeServer]) -> int:
    """Connections of this process to servers."""
    ports = {int(server.url.rpartition(":")[2]) for server in servers}
    return sum(remote_port(int(file.name)) in ports for file in Path("/proc/self/fd").iterdir())


def remote_port(descriptor: int) -> int | None:
    """The port at the other end of a connection; None of anything else."""
    try:
        with socket.socket(fileno=os.dup(descriptor)) as found:
            is_tcp = found.family in (socket.AF_INET, socket.AF_INET6)
            return int(found.getpeername()[1]) if is_tcp else None
    except OSError:
        return None
