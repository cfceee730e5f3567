"""Lets a server of vLLM answer those alone who send its key, whatever they ask for.

vLLM's own check (0.32.0, entrypoints/serve/middleware/authenticate.py) leaves out all paths but
/v1, /v2 and /inference: whoever reached /collective_rpc could replace the weights.
"""

import os
import secrets
from collections.abc import Awaitable, Callable
from typing import Any

Send = Callable[[dict[str, Any]], Awaitable[None]]
Receive = Callable[[], Awaitable[dict[str, Any]]]
App = Callable[[dict[str, Any], Receive, Send], Awaitable[None]]


class RequireKey:
    """ASGI middleware, as vLLM's --middleware takes it; the key is $VLLM_API_KEY."""

    def __init__(self, app: App) -> None:
        self._app = app
        self._wanted = f"Bearer {os.environ['VLLM_API_KEY']}".encode()

    async def __call__(self, scope: dict[str, Any], receive: Receive, send: Send) -> None:
        """Pass a request on, or refuse it with 401."""
        given = dict(scope.get("headers", [])).get(b"authorization", b"")
        if scope["type"] == "lifespan" or secrets.compare_digest(given, self._wanted):
            await self._app(scope, receive, send)
            return
        if scope["type"] == "http":
            await send({"type": "http.response.start", "status": 401, "headers": []})
        await send(
            {"type": "http.response.body", "body": b"this server asks for a key"}
            if scope["type"] == "http"
            else {"type": "websocket.close", "code": 1008}
        )
