"""The sampler behind servers of vLLM: prompts go out as token ids, responses come back.

Weights go through a file that trainer and servers reach. A server that ends and comes back has
random weights under another version: it is found out before it answers anything, gets the file
again, and has to say of fixed sequences what the others said. A request is made anew until it is
answered, and its response is the same wherever and whenever it is made.

Legend: R tokens of a response, K likeliest tokens.
"""

import json
import math
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import Future
from functools import partial
from pathlib import Path
from typing import Any
from uuid import uuid4

import torch
from torch import Tensor

from marco_train.config.rollout import VLLMServerRolloutConfig
from marco_train.distributed import barrier, gather_objects, is_main, rank, world_size
from marco_train.errors import UnusableAnswerError, require
from marco_train.inference.engine import neutral_sampling
from marco_train.inference.pool import Ask, SaveEarly, ServerPool
from marco_train.inference.protocol import (
    CALL_WORKERS,
    GENERATE,
    MODELS,
    RESET_PREFIX_CACHE,
    UPDATE_WEIGHT_VERSION,
    WEIGHT_INFO,
    check_served,
    only_choice,
    read_array,
    read_number,
    read_tokens,
)
from marco_train.models.safetensors_io import ShardFile
from marco_train.models.weights import accounted, meta_model, torch_dtype, weight_shapes
from marco_train.rollout.base import NO_WEIGHTS, Sampler, SamplerSpec, response_seed
from marco_train.rollout.vllm import check_experts
from marco_train.types import FinishReason, Prompt, Rollout, no_experts

PREFIX = "sync-"  # of the files that come and go


class ServerSampler(Sampler):
    """Samples over HTTP; every rank asks for its own prompts."""

    def __init__(
        self, cfg: VLLMServerRolloutConfig, sampling: SamplerSpec, save_early: SaveEarly
    ) -> None:
        """Nothing is asked yet: servers may still be starting."""
        self._sampling = sampling
        self._replay_routing = cfg.replay_routing
        self._shapes = weight_shapes(meta_model(sampling.architecture))
        self._dtype = torch_dtype(sampling.dtype)
        self._tolerance = cfg.canary_tolerance
        self._directory = Path(cfg.sync_path).resolve()
        # Servers may outlive runs: no version of one run is also another's.
        self._run = gather_objects(uuid4().hex[:12])[0]
        self._file: Path | None = None  # the weights that servers have to have
        self._canary: tuple[list[list[int]], Tensor] | None = None  # and what they say with them
        self._in_flight: list[Future[Rollout]] = []
        self._weight_version: int | None = None
        self._pool = ServerPool(cfg.servers, "sampler", self._health_check, save_early)

    def load_weights(self, weights: Iterable[tuple[str, Tensor]], version: int) -> None:
        """Write a complete stream of named weights and have every server load it.

        Raises:
            InputError: A weight is missing, doubled, unknown or misshapen; or a server cannot
                serve this run.
            ServersUnavailable: A server does not answer.
        """
        self._weight_version = self._canary = None
        file = self._directory / f"{PREFIX}{self._run}-{version}.safetensors"
        self._write(accounted(weights, self._shapes), file)
        barrier()
        self._file = file
        self._pool.invalidate()
        mine = self._pool.servers[rank() :: world_size()]
        list(self._pool.answers([self._pool.submit(WEIGHT_INFO, None, bool, s) for s in mine]))
        # Other ranks had theirs load these; every answer is checked for its weight version.
        self._pool.mark_healthy()
        self._weight_version = version

    def _write(self, weights: Iterator[tuple[str, Tensor]], file: Path) -> None:
        """Write a file on the first rank; the others take part in the stream."""
        if is_main():
            file.parent.mkdir(parents=True, exist_ok=True)
            for former in file.parent.glob(f"{PREFIX}*"):  # of this run, or of one that died
                former.unlink()
            shard = ShardFile(file, self._dtype, self._shapes)
            shard.create()
        for name, weight in weights:
            if is_main():
                shard.write(name, weight)

    def _health_check(self, url: str, ask: Ask) -> None:
        """See that a server has the weights that it has to have, by its word and by numbers.

        Raises:
            InputError: It serves something else, or its numbers are not those of the others.
        """
        assert self._file is not None
        check_served(url, ask(MODELS, None), self._sampling.max_length)
        version = self._file.stem
        if ask(WEIGHT_INFO, None).get("weight_version") != version:
            given = {"path": str(self._file), "num_weights": str(len(self._shapes))}
            ask(CALL_WORKERS, {"method": "load_checkpoint", "kwargs": given})
            if not ask(RESET_PREFIX_CACHE, {}).get("success"):
                raise UnusableAnswerError(f"{url} keeps keys of old weights: it is still computing")
            ask(UPDATE_WEIGHT_VERSION, {"new_version": version})
        if self._canary is None:
            return
        sequences, known = self._canary
        parts = [read(ask(GENERATE, body)) for body, read in self._score_requests(sequences)]
        difference = float((torch.cat(parts) - known).abs().max())
        require(
            difference <= self._tolerance,
            f"{url} came back, and with the weights of {version} its log-probabilities of the "
            f"canary are {difference:.3g} nats from what was proved at the sync, more than "
            f"stage.rollout.canary_tolerance {self._tolerance:.3g}",
        )

    def score(self, sequences: Sequence[list[int]]) -> Tensor:
        """Log-probabilities of the tokens of sequences, [servers, N], of this rank's servers.

        All ranks together ask all servers. The first token of each sequence has none, the last of
        the longest is sampled. The result is kept: a restarted server must reproduce it.
        """
        servers = self._pool.servers
        mine = servers[rank() :: world_size()] or [servers[rank() % len(servers)]]
        futures = [
            [self._pool.submit(GENERATE, body, read, server) for body, read in requests]
            for server in mine
            for requests in [self._score_requests(sequences)]
        ]
        list(self._pool.answers([future for each in futures for future in each]))
        found = torch.stack([torch.cat([f.result() for f in each]) for each in futures])
        self._canary = list(sequences), found[0]
        return found

    def _score_requests(self, sequences: Sequence[list[int]]) -> list[tuple[dict[str, Any], Any]]:
        """Bodies that ask for log-probabilities, and how their answers are read."""
        longest = max(range(len(sequences)), key=lambda i: len(sequences[i]))

        def scores(answer: Any, ids: list[int], num_cut: int) -> Tensor:
            self._check_version(only_choice(answer))
            return read_tokens(answer, ids, 1)[: len(ids) - 1 - num_cut]

        requests: list[tuple[dict[str, Any], Any]] = []
        for number, ids in enumerate(sequences):
            params = neutral_sampling(max_tokens=1) | {"prompt_logprobs": 0}
            read = partial(scores, ids=ids, num_cut=int(number == longest))
            requests.append((_body(ids, params), read))
            if number == longest:
                *prompt, token = ids
                drawn = {"allowed_token_ids": [token], "logprobs": 0, "ignore_eos": True}
                requests.append(
                    (
                        _body(prompt, neutral_sampling(max_tokens=1) | drawn),
                        lambda answer: torch.tensor(self._read_response(answer, 0)[1]),
                    )
                )
        return requests

    def sample(self, prompts: Sequence[Prompt], num_responses: int) -> Iterator[Rollout]:
        """Ask for responses of each prompt at temperature 1, at once; yields each as it ends.

        Every rank takes part, to the end.

        Raises:
            RuntimeError: No weights were loaded.
            ServersUnavailable: No server has answered for long.
            InputError: A server refuses a request, or no server gives a usable answer.
        """
        if self._weight_version is None:
            raise RuntimeError(NO_WEIGHTS)
        version = self._weight_version
        asked = [self._ask(prompt, n, version) for prompt in prompts for n in range(num_responses)]
        self._in_flight = [each for each in self._in_flight if not each.done()] + asked
        return self._pool.answers(asked)

    def drain(self) -> None:
        """Wait for all responses that were asked for; every rank takes part."""
        self._pool.wait(self._in_flight)

    def _ask(self, prompt: Prompt, sample_index: int, version: int) -> "Future[Rollout]":
        params = neutral_sampling(self._sampling.max_response_length) | {
            "seed": response_seed(self._sampling.seed, prompt.index, sample_index),
            "stop_token_ids": self._sampling.stop_ids,
            "ignore_eos": True,
            "skip_reading_prefix_cache": True,
            # The drawn token takes the place of one.
            "logprobs": self._sampling.num_topk + 1 if self._sampling.num_topk else 0,
        }

        def read(answer: Any) -> Rollout:
            ids, logprobs, topk_ids = self._read_response(answer, self._sampling.num_topk)
            stopped = ids[-1] in self._sampling.stop_ids
            if not stopped and len(ids) != self._sampling.max_response_length:
                raise UnusableAnswerError(
                    f"a response of {len(ids)} tokens without an end, of "
                    f"{self._sampling.max_response_length} that were asked for"
                )
            experts = no_experts()
            if self._replay_routing:
                experts = self._read_experts(answer, len(prompt.input_ids) + len(ids) - 1)
            return Rollout(
                prompt=prompt,
                sample_index=sample_index,
                response_ids=ids,
                sampler_logprobs=logprobs,
                topk_ids=topk_ids,
                finish_reason=FinishReason.stop if stopped else FinishReason.length,
                weight_version=version,
                routed_experts=experts,
            )

        return self._pool.submit(GENERATE, _body(prompt.input_ids, params), read)

    def _read_experts(self, answer: Any, num_inputs: int) -> Tensor:
        """Experts of the inputs of a sequence, [S - 1, L, k] int16.

        Raises:
            UnusableAnswerError: They are not there or cannot be.
        """
        try:
            found = read_array(only_choice(answer), "routed_experts")
            return check_experts(found, num_inputs, self._sampling.architecture)
        except (UnusableAnswerError, RuntimeError) as error:
            raise UnusableAnswerError(
                f"no experts to replay (start servers with --enable-return-routed-experts and "
                f"--enable-prefix-caching): {error}"
            ) from error

    def _read_response(
        self, answer: Any, num_topk: int
    ) -> tuple[list[int], list[float], list[list[int]]]:
        """Tokens [R] of a response, their log-probabilities [R] and the likeliest [R, K].

        Raises:
            UnusableAnswerError: It is not complete, or of other weights.
        """
        choice = only_choice(answer)
        try:
            ids = [int(token) for token in choice["token_ids"]]
            places = choice["logprobs"]["content"]
            logprobs = [read_number(place["logprob"]) for place in places]
            ranked = [sorted(p["top_logprobs"], key=lambda t: t["rank"]) for p in places]
            topk_ids = [[int(t["token_id"]) for t in p[:num_topk]] for p in ranked]
            drawn = [place["token_id"] for place in places]
        except (KeyError, TypeError, ValueError) as error:
            raise UnusableAnswerError(f"a response in another form: {error}") from error
        if not ids or drawn != ids or not all(math.isfinite(x) for x in logprobs):
            raise UnusableAnswerError(f"{len(drawn)} log-probabilities of {len(ids)} tokens")
        self._check_version(choice)
        if any(len(named) != num_topk for named in topk_ids):
            raise UnusableAnswerError(f"not the {num_topk} likeliest tokens of every place")
        return ids, logprobs, topk_ids

    def _check_version(self, choice: Any) -> None:
        """Refuse what other weights than those of the last sync computed."""
        assert self._file is not None
        try:
            versions = {span["version"] for span in choice["weight_versions"]}
        except (KeyError, TypeError) as error:
            raise UnusableAnswerError("an answer that names no weights") from error
        if versions != {self._file.stem}:
            raise UnusableAnswerError(f"an answer of the weights {json.dumps(sorted(versions))}")

    def close(self) -> None:
        """Drop the connections and the file of weights."""
        self._pool.close()
        if is_main() and self._file is not None:
            self._file.unlink(missing_ok=True)


def _body(ids: list[int], params: dict[str, Any]) -> dict[str, Any]:
    return {"token_ids": ids, "sampling_params": params, "return_token_ids": True}
