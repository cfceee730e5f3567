"""What servers of vLLM are asked, and how their answers are read.

Written after vLLM 0.32. Readers take the fields that they need as they should be: what is raised
where one is missing or of another type says that the answer cannot be used, as the pool knows.

Legend: R tokens of a response, K likeliest tokens.
"""

import base64
import io
import json
import math
from typing import Any

import numpy as np
import torch
from torch import Tensor

from marco_train.errors import UnusableAnswerError, require
from marco_train.inference.engine import Generation, neutral_sampling

# What JSON has no sign for: vLLM writes minus infinity as this.
NO_NUMBER = -9999.0
# Where numbers are written into JSON.
IDS, ROWS = "<ids>", "<rows>"
# By which a log-probability may lie above 0.
ROUNDING = 1e-3


def generation(ids: list[int], sampling: dict[str, Any]) -> tuple[str, dict[str, Any]]:
    """Path and body of a request for what follows ids: one token unless `sampling` says more."""
    params = neutral_sampling(max_tokens=1) | sampling
    body = {"token_ids": ids, "sampling_params": params, "return_token_ids": True}
    return "/inference/v1/generate", body


def scoring(
    ids: list[int], first: int, given: list[list[int]] | None, num_likeliest: int | None
) -> tuple[str, bytes]:
    """Path and body of a request for log-probabilities of given tokens, as an array.

    Args:
        ids: A prompt and its response.
        first: Where the response begins.
        given: Token ids that are told of in each place of the response, [R, K]. None: the
            response's own, K is 1.
        num_likeliest: Likeliest tokens to be named in every place beside them, as JSON; None:
            nothing but the array.
    """
    wanted: dict[str, Any] = {"prompt_logprob_start": first - 1}
    if num_likeliest is not None:
        wanted["prompt_logprobs"] = num_likeliest
    path, body = generation([], wanted)
    # Without likeliest tokens a server need not say what it scored: it refuses rows that are not
    # those of the prompt.
    body["return_token_ids"] = num_likeliest is not None
    # Each id is written once: most of a client's time went into lists of one.
    words = list(map(str, ids))
    rows = f"[[{'],['.join(words[first:])}]]" if given is None else _compact(given)
    body["sampling_params"]["prompt_logprob_token_ids"] = ROWS
    body["token_ids"] = IDS
    text = _compact(body).replace(f'"{ROWS}"', rows).replace(f'"{IDS}"', f"[{','.join(words)}]")
    return path, text.encode()


def _compact(value: Any) -> str:
    return json.dumps(value, separators=(",", ":"))


def served_model(url: str, answer: Any, needed: int) -> str:
    """Name the model that a server lists at /v1/models.

    Raises:
        InputError: Its longest sequence is shorter than `needed` tokens.
    """
    model = answer["data"][0]
    window = model.get("max_model_len")
    require(
        window is None or window >= needed,
        f"{url} takes sequences of {window} tokens, and the longest prompt with its "
        f"response and one token needs {needed}: start it with --max-model-len {needed}",
    )
    return str(model["id"])


def read_places(holder: Any, ids: list[int], first: int) -> list[dict[int, float]]:
    """What a server says of each place from `first` on: log-probabilities by token id."""
    places = holder["prompt_logprobs"]
    if holder["prompt_token_ids"] != ids or len(places) != len(ids):
        raise UnusableAnswerError(f"scores of other tokens than the {len(ids)} that were sent")
    return [{int(i): read_number(x["logprob"]) for i, x in p.items()} for p in places[first:]]


def read_number(value: Any) -> float:
    """A log-probability; not a number for whatever cannot be one."""
    found = math.nan if value is None else float(value)
    return found if NO_NUMBER < found < ROUNDING else math.nan


def read_tokens(holder: Any, ids: list[int], first: int) -> Tensor:
    """Log-probabilities of the tokens from `first` on, [R] float32; not a number where absent."""
    places = read_places(holder, ids, first)
    return torch.tensor([p.get(i, math.nan) for i, p in zip(ids[first:], places, strict=True)])


def read_likeliest(holder: Any, ids: list[int], first: int, top_k: int) -> tuple[Tensor, Tensor]:
    """The K likeliest tokens from `first` on and their log-probabilities, [R, K] each."""
    named, logprobs = [], []
    for place in read_places(holder, ids, first):
        # The token that stands there comes as well, whether it is among them or not.
        best = sorted(place, key=lambda i: -place[i] if place[i] < ROUNDING else math.inf)[:top_k]
        gaps = top_k - len(best)
        named.append(best + [0] * gaps)
        logprobs.append([place[i] for i in best] + [math.nan] * gaps)
    return torch.tensor(named), torch.tensor(logprobs)


def read_given(answer: Any, num_rows: int, num_ids: int) -> Tensor:
    """Log-probabilities of given tokens, [R, K] float32; not a number for what cannot be one."""
    found = torch.from_numpy(read_array(answer, "prompt_token_id_logprobs")).float()
    if found.shape != (num_rows, num_ids):
        raise UnusableAnswerError(
            f"log-probabilities of shape {list(found.shape)} for {[num_rows, num_ids]} given ids"
        )
    return torch.where((found > NO_NUMBER) & (found < ROUNDING), found, math.nan)


def read_response(answer: Any, num_topk: int = 0, with_experts: bool = False) -> Generation:
    """A sampled response, with all that was asked for; experts may be missing."""
    choice = answer["choices"][0]
    ids, places = [int(token) for token in choice["token_ids"]], choice["logprobs"]["content"]
    logprobs = [read_number(place["logprob"]) for place in places]
    scored_ids = [place["token_id"] for place in places]
    if not ids or scored_ids != ids or not all(math.isfinite(each) for each in logprobs):
        raise UnusableAnswerError(f"{len(places)} log-probabilities of {len(ids)} tokens")
    ranked = [sorted(place["top_logprobs"], key=lambda t: t["rank"]) for place in places]
    topk_ids = [[int(token["token_id"]) for token in place[:num_topk]] for place in ranked]
    if any(len(named) != num_topk for named in topk_ids):
        raise UnusableAnswerError(f"not the {num_topk} likeliest tokens of every place")
    named_experts = with_experts and choice.get("routed_experts") is not None
    experts = read_array(choice, "routed_experts") if named_experts else None
    return Generation(ids, logprobs, topk_ids, experts)


def read_array(holder: Any, name: str) -> Any:
    """An array that a server writes as base64 of numpy's format."""
    return np.load(io.BytesIO(base64.b64decode(holder[name])), allow_pickle=False)
