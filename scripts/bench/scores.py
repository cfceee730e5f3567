"""Bytes and processor time of scores that cross HTTP: JSON of every place against an array.

    python scripts/bench/scores.py --json scores.json

Sides: `array`, what a vllm_server teacher of vLLM on a GPU is asked; `json`, what one is asked that
does not score given token ids. The server's part is vLLM's own code from the numbers of its engine
to the bytes of the answer, and from the bytes of the request to its class; needs vLLM, no server.
"""

import json
import time
from collections.abc import Callable
from functools import partial
from statistics import median
from typing import Any

import torch
from harness import Bench, parser_of, span
from torch import Tensor

from marco_train.inference import protocol
from marco_train.inference.engine import neutral_sampling

# Tokens of a prompt and of its response: a mean of the second phase, and the longest.
SHAPES = {"mean": (300, 1_900), "longest": (2_048, 8_192)}
VOCAB = 151_936
SIDES = ("array", "json")


class Side:
    """One way to ask and to answer."""

    def __init__(self, name: str, ids: list[int], first: int, logprobs: Tensor) -> None:
        from vllm.entrypoints.openai.completion.protocol import CompletionRequest
        from vllm.entrypoints.scale_out.token_in_token_out.protocol import GenerateRequest

        self._in_array = name == "array"
        self._ids, self._first, self._logprobs = ids, first, logprobs
        self._request = GenerateRequest if self._in_array else CompletionRequest

    def ask(self) -> bytes:
        """Client: the request's bytes, as httpx makes them."""
        if self._in_array:
            return protocol.scoring(self._ids, self._first, None, None)[1]
        wanted = {"model": "teacher", "prompt": self._ids, "prompt_logprobs": 0}
        body = neutral_sampling(max_tokens=1) | wanted | {"return_token_ids": True}
        return json.dumps(body, separators=(",", ":")).encode()

    def understand(self, request: bytes) -> None:
        """Server: the request's class."""
        self._request(**json.loads(request))

    def answer(self) -> bytes:
        """Server: the answer's bytes, as FastAPI makes them of vLLM's classes."""
        content = self._array() if self._in_array else self._every_place()
        return json.dumps(content, ensure_ascii=False, separators=(",", ":")).encode()

    def _array(self) -> dict[str, Any]:
        from vllm.entrypoints.scale_out.token_in_token_out.protocol import (
            GenerateTokensChoice,
            GenerateTokensResponse,
        )
        from vllm.utils.serial_utils import numpy2base64

        array = numpy2base64(self._logprobs[self._first - 1 :, None].numpy())
        choice = GenerateTokensChoice(index=0, token_ids=[1], finish_reason="length")
        response = GenerateTokensResponse(
            request_id="1",
            created=1,
            model="teacher",
            usage=_usage(),
            choices=[choice],
            prompt_token_id_logprobs=array,
        )
        content: dict[str, Any] = response.model_dump()
        return content

    def _every_place(self) -> dict[str, Any]:
        from vllm.entrypoints.generate.base.serving import clamp_prompt_logprobs
        from vllm.entrypoints.openai.completion.protocol import (
            CompletionResponse,
            CompletionResponseChoice,
        )
        from vllm.logprobs import Logprob

        # As its engine makes them; every token has a text of four letters.
        places: list[Any] = [None]
        numbers = zip(self._ids[1:], self._logprobs.tolist(), strict=True)
        places += [{token: Logprob(logprob, 1, " the")} for token, logprob in numbers]
        choice = CompletionResponseChoice(
            index=0,
            text="",
            finish_reason="length",
            token_ids=[1],
            prompt_logprobs=clamp_prompt_logprobs(places),
            prompt_token_ids=self._ids,
        )
        response = CompletionResponse(model="teacher", choices=[choice], usage=_usage())
        content: dict[str, Any] = response.model_dump()
        return content

    def read(self, answer: bytes) -> Tensor:
        """Client: the log-probabilities of the response, [R]."""
        content = json.loads(answer)
        if self._in_array:
            num_rows = len(self._ids) - self._first
            return protocol.read_given(content, num_rows, 1)[:, 0]
        return protocol.read_tokens(content["choices"][0], self._ids, self._first)


def _usage() -> Any:
    from vllm.entrypoints.serve.engine.protocol import UsageInfo

    return UsageInfo(prompt_tokens=1, completion_tokens=1, total_tokens=2)


def seconds(call: Callable[[], Any]) -> tuple[float, Any]:
    """Processor time of one call, and what it gave."""
    start = time.process_time()
    value = call()
    return time.process_time() - start, value


def bench_scores(bench: Bench) -> None:
    """Ask, answer and read in turn; per token of a response."""
    for shape in bench.args.shapes:
        prompt, response = SHAPES[shape]
        # Of a text: the rank of a word is its number, and falls as Zipf says.
        ids = (VOCAB ** torch.rand(prompt + response, dtype=torch.float64)).long().tolist()
        logprobs = -torch.rand(len(ids) - 1) * 5
        sides = {name: Side(name, ids, prompt, logprobs) for name in SIDES}
        sent: dict[str, float] = {}
        took: dict[str, dict[str, list[float]]] = {
            name: {"client": [], "server": []} for name in SIDES
        }
        for number in range(bench.repeats + 1):
            for name, side in sides.items():
                asking, request = seconds(side.ask)
                understanding, _ = seconds(partial(side.understand, request))
                answering, answer = seconds(side.answer)
                reading, found = seconds(partial(side.read, answer))
                assert torch.allclose(found, logprobs[prompt - 1 :])
                sent[name] = (len(request) + len(answer)) / response
                if number > 0:  # the first imports
                    took[name]["client"].append(1e6 * (asking + reading) / response)
                    took[name]["server"].append(1e6 * (understanding + answering) / response)
        for name in SIDES:
            cells: dict[str, Any] = {"responses": shape, "side": name, "bytes a token": sent[name]}
            cells["bytes / array"] = sent[name] / sent["array"]
            for who, times in took[name].items():
                pairs = zip(times, took["array"][who], strict=True)
                ratios = [one / other for one, other in pairs]
                cells[f"{who}, us a token"] = median(times)
                cells[f"{who} / array"] = median(ratios)
                cells[f"{who} range"] = span(ratios)
            bench.add("scores", cells, took[name])


PARTS = {"scores": bench_scores}


def main() -> None:
    """Run the parts that are asked for."""
    args = parser_of(__doc__ or "", PARTS, SHAPES, list(SHAPES)).parse_args()
    Bench(args, torch.device("cpu")).run(PARTS)


if __name__ == "__main__":
    main()
