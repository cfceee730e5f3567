"""A real small HTTP server that samples from the weights it is given, and misbehaves on script."""

import base64
import io
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from marco_train.inference.layout import KEPT_ON_CPU
from marco_train.models.checksums import checksums_of
from marco_train.models.qwen3_moe import Qwen3Moe
from marco_train.models.routing import Routing
from marco_train.models.weights import named_weights, random_model, receive_weights
from marco_train.safetensors_io import read, read_header
from tests.helpers.fake_server import FakeServer, stop_all
from tests.helpers.models import architecture


@torch.no_grad()
def experts_of(model: Qwen3Moe, ids: list[int]) -> str:
    """Experts of all tokens but the last, as vLLM writes them, [S - 1, L, k] uint8."""
    routing = Routing()
    model(torch.tensor([ids[:-1]]), torch.arange(len(ids) - 1)[None], routing=routing)
    content = io.BytesIO()
    np.save(content, routing.expert_ids.transpose(0, 1).numpy().astype(np.uint8))
    return base64.b64encode(content.getvalue()).decode()


@torch.no_grad()
def logprobs_of(model: Qwen3Moe, ids: list[int]) -> Tensor:
    """What a model says after each token of a sequence, [T, V]."""
    hidden = model(torch.tensor([ids]), torch.arange(len(ids))[None])
    return model.logits(hidden).log_softmax(-1)


def draw(model: Qwen3Moe, prompt: list[int], params: dict[str, Any]) -> list[tuple[int, Tensor]]:
    """The tokens of a response, each with what it was drawn from, [V]."""
    generator = torch.Generator().manual_seed(params.get("seed", 0))
    found: list[tuple[int, Tensor]] = []
    while len(found) < params["max_tokens"]:
        logprobs = logprobs_of(model, prompt + [token for token, _ in found])[-1]
        allowed = params.get("allowed_token_ids", range(len(logprobs)))
        chances = torch.zeros_like(logprobs)
        chances[list(allowed)] = logprobs.exp()[list(allowed)]
        token = int(torch.multinomial(chances, 1, generator=generator))
        found.append((token, logprobs))
        if token in params.get("stop_token_ids", []):
            break
    return found


class FakeSampler(FakeServer):
    """Has random weights until some are loaded, and again after a restart."""

    def __init__(self) -> None:
        self.loads: list[str] = []  # versions, in turn
        self.num_loaded = 0  # of them from a file
        self.answered: list[tuple[str, list[int]]] = []  # version and prompt of each response
        self.spoil: Callable[[Qwen3Moe], None] = lambda _: None  # what a load does beside
        self.names_experts = False
        self.load_seconds = 0.0
        self.num_busy = 0  # times that its prefix cache cannot be reset
        self.keeps = KEPT_ON_CPU  # how the weights end of which it gives checksums
        self.deaf = False  # says that it loads, and does not
        self.begin_anew()
        super().__init__()

    def begin_anew(self) -> None:
        """Be a new process."""
        self.version = "default"
        self._shown = random_model(architecture(), torch.float32, seed=99)

    def tell(self, path: str) -> dict[str, Any]:
        """What the server says of itself; all is well, whatever happens to questions."""
        known = {"/weight_info": {"weight_version": self.version}, "/health": {}}
        return known.get(path) or super().tell(path)

    def is_probe(self, path: str, body: dict[str, Any]) -> bool:
        """Faults are for responses alone."""
        return "seed" not in body.get("sampling_params", {})

    def respond(self, path: str, body: dict[str, Any], fault: str) -> tuple[int, Any]:
        """Status and content of an answer."""
        match path:
            case "/collective_rpc" if body["method"] == "checksums":
                kept = (w for w in named_weights(self._shown) if w[0].endswith(self.keeps))
                return 200, {
                    "results": [{"version": self.loads[-1], "weights": checksums_of(kept)}]
                }
            case "/collective_rpc":
                assert body["method"] == "load_checkpoint"
                return self._load(**body["kwargs"])
            case "/update_weight_version":
                self.version = body["new_version"]
                return 200, {"success": True}
            case "/reset_prefix_cache":
                self.num_busy -= 1
                return 200, {"success": self.num_busy < 0}
        assert path == "/inference/v1/generate"
        params, ids = body["sampling_params"], body["token_ids"]
        if "prompt_logprobs" in params:
            return 200, self._scored(ids)
        return 200, self._response(ids, params, fault)

    def _load(self, path: str, num_weights: str) -> tuple[int, Any]:
        stored = read_header(Path(path))
        self.loads.append(Path(path).stem)
        self.num_loaded += 1
        time.sleep(self.load_seconds)
        if not self.deaf:
            assert len(stored) == int(num_weights)
            model = random_model(architecture(), torch.float32, seed=0)
            receive_weights(model, ((name, read(place)) for name, place in stored.items()))
            self.spoil(model)
            self._shown = model
        return 200, {"results": [num_weights]}

    def _scored(self, ids: list[int]) -> dict[str, Any]:
        logprobs = logprobs_of(self._shown, ids)
        pairs = zip(ids[1:], logprobs[:-1], strict=True)
        places = [{str(token): {"logprob": float(says[token])}} for token, says in pairs]
        choice = {"weight_versions": [{"version": self.version, "start": 0, "end": 1}]}
        return {"prompt_token_ids": ids, "prompt_logprobs": [None, *places], "choices": [choice]}

    def _response(self, prompt: list[int], params: dict[str, Any], fault: str) -> dict[str, Any]:
        version, drawn = self.version, draw(self._shown, prompt, params)
        if "seed" in params:
            self.answered.append((version, prompt))
        content: list[dict[str, Any]] = [
            {
                "token_id": token,
                "logprob": float(logprobs[token]),
                "top_logprobs": likeliest(token, logprobs, params["logprobs"]),
            }
            for token, logprobs in drawn
        ]
        ids = [token for token, _ in drawn]
        match fault:
            case "one place short":
                content.pop()
            case "NaN":
                content[-1]["logprob"] = None
            case "other ids":
                ids[0] = (ids[0] + 1) % 320
            case "cut":
                ids, content = ids[:-1], content[:-1]
            case "fewer candidates":
                content[-1]["top_logprobs"].pop()
            case "stale":  # well-formed, and of what other weights draw
                version, ids[0] = "default", (ids[0] + 1) % 320
                content[0]["token_id"] = ids[0]
        spans = [{"version": version, "start": 0, "end": len(ids)}]
        choice = {"token_ids": ids, "logprobs": {"content": content}, "weight_versions": spans}
        if self.names_experts:
            choice["routed_experts"] = experts_of(self._shown, prompt + ids)
        return {"choices": [choice]}


def likeliest(token: int, logprobs: Tensor, count: int) -> list[dict[str, Any]]:
    """As vLLM lists candidates: the drawn token, then the others by rank; `count` in all."""
    order = logprobs.argsort(descending=True, stable=True).tolist()
    named = [token, *(other for other in order[: count + 1] if other != token)][: max(1, count)]
    return [
        {"token_id": i, "logprob": float(logprobs[i]), "rank": order.index(i) + 1} for i in named
    ]


@contextmanager
def fake_samplers(count: int) -> Iterator[list[FakeSampler]]:
    """Run several."""
    servers = [FakeSampler() for _ in range(count)]
    try:
        yield servers
    finally:
        stop_all(servers)
