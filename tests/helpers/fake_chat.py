"""A small LLM behind the OpenAI API that answers by a function, and misbehaves on script."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

from tests.helpers.fake_server import FakeServer

Body = dict[str, Any]


def echo(body: Body) -> str:
    """Say the last message again."""
    return str(body["messages"][-1]["content"])


class FakeChat(FakeServer):
    """Answers chats.

    Beside the faults of `FakeServer`, `script` takes "refuses", "is cut at its length", "says
    nothing" and "nonsense", of the answers to the next questions.
    """

    def __init__(self, reply: Callable[[Body], str] = echo) -> None:
        self.reply = reply
        super().__init__()
        self.model = "llm"

    @property
    def base_url(self) -> str:
        """What an OpenAI client is given."""
        return f"{self.url}/v1"

    def is_probe(self, path: str, body: Body) -> bool:
        """Nothing is."""
        return False

    def respond(self, path: str, body: Body, fault: str) -> tuple[int, Any]:
        """A completion of a chat."""
        message: Body = {"role": "assistant", "content": self.reply(body)}
        finish_reason = "stop"
        match fault:
            case "refuses":
                message |= {"content": None, "refusal": "no"}
            case "is cut at its length":
                message["content"] = message["content"][: len(message["content"]) // 2]
                finish_reason = "length"
            case "says nothing":
                message["content"] = ""
            case "nonsense":
                message["content"] = "{'a': nonsense"
        choice = {"index": 0, "message": message, "finish_reason": finish_reason}
        usage = {"prompt_tokens": 10, "completion_tokens": 5, "total_tokens": 15}
        return 200, {
            "id": "x",
            "object": "chat.completion",
            "created": 0,
            "model": self.model,
            "choices": [choice],
            "usage": usage,
        }


@contextmanager
def fake_chat(reply: Callable[[Body], str] = echo) -> Iterator[FakeChat]:
    """Run one."""
    server = FakeChat(reply)
    try:
        yield server
    finally:
        server.leave()
