"""What servers of vLLM are asked, and how their answers are read.

Written after vLLM 0.32. Whatever is not as it has to be is an answer that cannot be used.
"""

import base64
import io
import math
from typing import Any

import numpy as np
import torch
from torch import Tensor

from marco_train.errors import UnusableAnswerError, require

COMPLETIONS = "/v1/completions"
GENERATE = "/inference/v1/generate"
MODELS = "/v1/models"
# Of servers whose weights change; they have to be started with VLLM_SERVER_DEV_MODE=1.
CALL_WORKERS = "/collective_rpc"
RESET_PREFIX_CACHE = "/reset_prefix_cache"
WEIGHT_INFO = "/weight_info"
UPDATE_WEIGHT_VERSION = "/update_weight_version"
# What JSON has no sign for: vLLM writes minus infinity as this.
NO_NUMBER = -9999.0
# By which a log-probability may lie above 0.
ROUNDING = 1e-3


def check_served(url: str, answer: Any, needed: int) -> str:
    """Name the model that a server says it serves.

    Args:
        url: Of the server.
        answer: To `MODELS`.
        needed: Tokens of the longest sequence.

    Raises:
        InputError: Its sequences are too short.
        UnusableAnswerError: There is no model.
    """
    try:
        served = answer["data"][0]
        model, window = str(served["id"]), served.get("max_model_len")
    except (AttributeError, KeyError, IndexError, TypeError) as error:
        raise UnusableAnswerError(f"{url}{MODELS} lists no model") from error
    require(
        window is None or window >= needed,
        f"{url} takes sequences of {window} tokens, and the longest prompt with its "
        f"response and one token needs {needed}: start it with --max-model-len {needed}",
    )
    return model


def only_choice(answer: Any) -> Any:
    """The one choice of an answer."""
    try:
        return answer["choices"][0]
    except (KeyError, IndexError, TypeError) as error:
        raise UnusableAnswerError("an answer without choices") from error


def read_places(holder: Any, ids: list[int], first: int) -> list[dict[int, float]]:
    """What a server says of each place from `first` on: log-probabilities by token id."""
    echoed, places = holder.get("prompt_token_ids"), holder.get("prompt_logprobs")
    if echoed != ids:
        raise UnusableAnswerError(f"scores of other tokens than the {len(ids)} that were sent")
    if not isinstance(places, list) or len(places) != len(ids):
        count = len(places) if isinstance(places, list) else "no"
        raise UnusableAnswerError(f"{count} places with log-probabilities for {len(ids)} tokens")
    try:
        return [{int(i): read_number(x["logprob"]) for i, x in p.items()} for p in places[first:]]
    except (AttributeError, KeyError, TypeError, ValueError) as error:
        raise UnusableAnswerError(f"log-probabilities in another form: {error}") from error


def read_number(value: Any) -> float:
    """A log-probability; not a number for whatever cannot be one."""
    found = math.nan if value is None else float(value)
    return found if NO_NUMBER < found < ROUNDING else math.nan


def read_tokens(holder: Any, ids: list[int], first: int) -> Tensor:
    """Log-probabilities of the tokens from `first` on, [R] float32; not a number where absent."""
    places = read_places(holder, ids, first)
    return torch.tensor([p.get(i, math.nan) for i, p in zip(ids[first:], places, strict=True)])


def read_array(holder: Any, name: str) -> Any:
    """An array that a server writes as base64 of numpy's format."""
    try:
        content = base64.b64decode(holder[name])
        return np.load(io.BytesIO(content), allow_pickle=False)
    except (KeyError, TypeError, ValueError) as error:
        raise UnusableAnswerError(f"no {name} that can be read: {error}") from error
