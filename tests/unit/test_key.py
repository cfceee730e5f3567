"""Servers answer those who send their key."""

import asyncio
from typing import Any

import httpx
import pytest

from marco_train.inference.key import Receive, RequireKey, Send


async def app(scope: dict[str, Any], receive: Receive, send: Send) -> None:
    await send({"type": "http.response.start", "status": 200, "headers": []})
    await send({"type": "http.response.body", "body": b"answered"})


@pytest.mark.parametrize("path", ["/v1/models", "/collective_rpc", "/health", "//v1/models"])
@pytest.mark.parametrize(
    ("given", "status"),
    [
        ({"Authorization": "Bearer the-key"}, 200),
        ({"Authorization": "Bearer another"}, 401),
        ({"Authorization": "the-key"}, 401),
        ({}, 401),
    ],
)
def test_without_the_key_no_path_is_answered(
    path: str, given: dict[str, str], status: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("VLLM_API_KEY", "the-key")

    async def ask() -> httpx.Response:
        transport = httpx.ASGITransport(RequireKey(app))  # type: ignore[arg-type]
        async with httpx.AsyncClient(transport=transport, base_url="http://server") as client:
            return await client.post(path, headers=given)

    found = asyncio.run(ask())
    assert found.status_code == status
    assert (found.text == "answered") == (status == 200)
