"""The sampler behind servers of vLLM: prompts go out as token ids, responses come back.

Weights go through a file that trainer and servers reach, or over NCCL with the file for those that
have none yet. A server that ends and comes back has random weights under another version: it is
found out before it answers anything, gets the file, and has to say of fixed sequences what the
others said. A request is made anew until it is answered. On a CPU its response is the same wherever
and whenever it is made; on GPUs only up to rounding by the batch, unless servers are started with
VLLM_BATCH_INVARIANT=1, which has not run.
"""

import asyncio
import json
import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from functools import partial
from pathlib import Path
from typing import Any, TypeVar
from uuid import uuid4

import torch
from torch import Tensor

from marco_train.config.model import DType
from marco_train.config.rollout import TEMPERATURE, VLLMServerRolloutConfig, WeightsBy
from marco_train.distributed import barrier, gather_objects, is_main, rank, world_size
from marco_train.errors import InputError, UntrustedServerError, UnusableAnswerError
from marco_train.inference import protocol
from marco_train.inference.engine import with_tied_head
from marco_train.inference.pool import SaveEarly, Server, ServerPool, TransientError, Work
from marco_train.inference.transfer import Join, Transfer, join_over_nccl
from marco_train.models.agreement import same_answer, spread_of
from marco_train.models.weights import (
    accounted,
    joined_shapes,
    meta_model,
    name_first,
    torch_dtype,
)
from marco_train.rollout.base import NO_WEIGHTS, Sampler, SamplerSpec, response_seed
from marco_train.rollout.sync import FLOAT32_TOLERANCE
from marco_train.rollout.vllm import rollout_of
from marco_train.safetensors_io import ShardFile
from marco_train.tracking import log_line
from marco_train.types import Prompt, Rollout

T = TypeVar("T")
Shape = tuple[int, ...]

PREFIX = "sync-"  # of the files that come and go
UNFINISHED = ".unfinished"
# What one request to a server raises.
UNANSWERED = (InputError, UnusableAnswerError, TransientError)
# What a server that cannot be met raises beside.
UNMET = (AttributeError, LookupError, OSError, RuntimeError, TypeError, ValueError)


class ServerSampler(Sampler):
    """Samples over HTTP; every rank asks for its own prompts."""

    def __init__(
        self,
        cfg: VLLMServerRolloutConfig,
        spec: SamplerSpec,
        save_early: SaveEarly,
        join: Join = join_over_nccl,
    ) -> None:
        """Nothing is asked yet: servers may still be starting."""
        self._spec = spec
        self._shapes = joined_shapes(meta_model(spec.architecture))
        self._tolerance = cfg.canary_tolerance or (
            FLOAT32_TOLERANCE if spec.dtype is DType.float32 else math.inf
        )
        # Servers may outlive runs: no version of one run is also another's.
        name = f"{PREFIX}{gather_objects(uuid4().hex[:12])[0]}"
        self._file_prefix = self._file = Path(cfg.sync_path).resolve() / name
        # What servers hold and say with the weights in the file, whose name is their version.
        self._held: dict[str, int] | None = None
        self._canary: tuple[Sequence[list[int]], Tensor] | None = None
        self._in_flight: list[Future[Rollout]] = []
        self._weight_version: int | None = None
        self._pool = ServerPool(cfg.servers, "sampler", self._health_check, save_early)
        self._join = join if cfg.weights_by is WeightsBy.nccl else None
        # Of the first rank, to servers that could be met; the others get the file.
        self._transfers: dict[Server, Transfer] = {}
        self._unmet: set[Server] = set()
        self._writer = ThreadPoolExecutor(1, "writes weights")
        self._written: Future[None] | None = None  # the file, where it is written by the way

    def load_weights(self, weights: Iterable[tuple[str, Tensor]], version: int) -> None:
        """Have every server take a complete stream of named weights.

        Raises:
            InputError: A weight is missing, doubled, unknown or misshapen; or a server cannot
                serve this run.
            ServersUnavailable: A server does not answer.
        """
        self._weight_version = self._canary = self._held = None
        self._file = Path(f"{self._file_prefix}-{version}.safetensors")
        if self._join is not None:
            self._open_transfers(self._join)
        stream = accounted(weights, self._shapes)  # every rank takes part in it
        sent: list[Future[bool]] = []
        if is_main():
            sent = self._send(stream)
        else:
            for _ in stream:
                pass
        arrived = [future.result() for future in self._pool.as_answered(sent)]
        if self._written is not None and not all(arrived):
            self._written.result()
        barrier()
        # Other ranks have theirs load these; every answer is checked for its weight version.
        self._pool.check(self._pool.servers[rank() :: world_size()])
        self._weight_version = version

    def _open_transfers(self, join: Join) -> None:
        """Have the first rank meet the workers of each server that it has not met; collective."""
        missing = [s for s in self._pool.servers if s not in self._transfers.keys() | self._unmet]
        asked = self._pool.submit_unchecked(partial(self._open, join), missing if is_main() else [])
        list(self._pool.as_answered(asked))

    async def _open(self, join: Join, server: Server) -> None:
        await self._pool.ask(server, "/v1/models")  # it may still be starting
        try:
            self._transfers[server] = await Transfer.open(self._pool, server, join)
        except (*UNANSWERED, *UNMET) as error:
            self._unmet.add(server)
            log_line(
                f"{server.url} cannot be met over NCCL, and gets its weights by "
                f"{self._file.parent}: {type(error).__name__}: {error}"
            )

    def _send(self, stream: Iterable[tuple[str, Tensor]]) -> list[Future[bool]]:
        """Write the file, or send the weights to servers that were met and write it by the way.

        Returns:
            Of each such server, whether it took them all.
        """
        if self._written is not None:
            self._written.result()
            self._written = None
        self._file.parent.mkdir(parents=True, exist_ok=True)
        for former in self._file.parent.glob(f"{PREFIX}*"):  # of this run, or of one that died
            former.unlink()
        unfinished = self._file.with_suffix(UNFINISHED)
        shard = ShardFile(unfinished, torch_dtype(self._spec.dtype), self._shapes)
        shard.create()
        if not self._transfers:
            for name, weight in stream:
                shard.write(name, weight)
            unfinished.rename(self._file)
            return []
        transfers = list(self._transfers.values())
        # A server that is lost on the way is met again at the next sync.
        asked = self._pool.submit_unchecked(self._receive, list(self._transfers))
        writes, announced = [], iter(_with_tied_head(self._shapes))
        try:
            for name, weight in with_tied_head(stream, self._shapes):
                in_order = name == next(announced, None)
                for transfer in transfers:
                    if in_order:
                        transfer.send(weight)
                    else:  # something is missing; `accounted` says what
                        transfer.close()
                if name in self._shapes:
                    writes.append(self._writer.submit(shard.write, name, _on_host(weight)))
        except BaseException:
            for transfer in transfers:
                transfer.close()
            raise
        self._written = self._writer.submit(_finish, writes, unfinished, self._file)
        return asked

    async def _receive(self, server: Server) -> bool:
        """Have a server take the weights that are sent; whether it did."""
        dtype = torch_dtype(self._spec.dtype)
        noted = {
            "version": self._file.stem,
            "shapes": json.dumps(self._shapes),
            "dtype": str(dtype).removeprefix("torch."),
        }
        try:
            await self._transfers[server].receive(_with_tied_head(self._shapes), dtype)
            rpc = {"method": "note_transfer", "kwargs": noted}
            await self._pool.ask(server, "/collective_rpc", rpc)
            await self._take_version(server)
        except UNANSWERED as error:
            self._transfers.pop(server).close()
            log_line(f"{server.url} was lost on the way, and gets the file: {error}")
            return False
        return True

    async def _take_version(self, server: Server) -> None:
        """Have a server answer with the weights that it has taken."""
        if not (await self._pool.ask(server, "/reset_prefix_cache", {}))["success"]:
            raise UnusableAnswerError(f"{server.url} is still computing with old weights")
        new = {"new_version": self._file.stem}
        await self._pool.ask(server, "/update_weight_version", new)

    async def _health_check(self, server: Server) -> None:
        """See that a server has the weights that it has to have, by its word and by numbers.

        Raises:
            InputError: It serves something else.
            UntrustedServerError: Its numbers are not those that were proved at the sync.
        """
        ask, version = partial(self._pool.ask, server), self._file.stem
        protocol.served_model(server.url, await ask("/v1/models"), self._spec.max_length)
        # The server has to be started with VLLM_SERVER_DEV_MODE=1.
        if (await ask("/weight_info"))["weight_version"] != version:
            given = {"path": str(self._file), "num_weights": str(len(self._shapes))}
            await ask("/collective_rpc", {"method": "load_checkpoint", "kwargs": given})
            await self._take_version(server)
        if self._held is not None:
            self._compare_held(server, await self._checksums(server))
        if self._canary is not None:
            self._compare_canary(server, await self._score(self._canary[0], server))

    def _compare_held(self, server: Server, found: list[dict[str, int]]) -> None:
        """See that a server that came back holds the weights that were proved at the sync."""
        known = self._held or {}
        differing = {n for held in found for n in held if known.get(n, held[n]) != held[n]}
        if differing:
            raise UntrustedServerError(
                f"{server.url} came back, and {len(differing)} of the weights of "
                f"{self._file.stem} that it holds are not those that were proved at the sync: "
                f"{name_first(sorted(differing))}"
            )

    def _compare_canary(self, server: Server, found: Tensor) -> None:
        """See that a server that came back says of the canary what was proved at the sync."""
        assert self._canary is not None
        apart = spread_of(found, self._canary[1])
        bound = same_answer(self._spec.dtype, self._spec.architecture.num_hidden_layers)
        bound = bound._replace(largest=min(bound.largest, self._tolerance))
        if not apart.within(bound):
            raise UntrustedServerError(
                f"{server.url} came back, and with the weights of {self._file.stem} its "
                f"log-probabilities of the canary are off what was proved at the sync by {apart}; "
                f"bounds: {bound}"
            )

    def checksums(self) -> list[dict[str, int]]:
        """Digest what this rank's servers keep as a checkpoint has it, in their memory.

        All ranks together ask all servers. What the first says is kept: a restarted server must
        hold the same.
        """
        found = self._ask_mine(self._checksums)
        self._held = found[0][0]
        return [held for of_server in found for held in of_server]

    async def _checksums(self, server: Server) -> list[dict[str, int]]:
        """Ask each worker of a server for the weights that it holds, of the last sync's version."""
        asked = {"method": "checksums"}
        results = (await self._pool.ask(server, "/collective_rpc", asked))["results"]
        versions = {held["version"] for held in results}
        if versions != {self._file.stem}:
            raise UnusableAnswerError(f"checksums of the weights {sorted(versions)}")
        return [held["weights"] for held in results]

    def _ask_mine(self, work: Work[T]) -> list[T]:
        """Ask this rank's servers, so that all ranks together ask all; every rank takes part."""
        every = self._pool.servers
        mine = every[rank() :: world_size()] or [every[rank() % len(every)]]
        asked = [self._pool.submit(work, server) for server in mine]
        list(self._pool.as_answered(asked))
        return [future.result() for future in asked]

    def score(self, sequences: Sequence[list[int]]) -> Tensor:
        """Log-probabilities of the tokens of sequences, [servers, N], of this rank's servers.

        All ranks together ask all servers. The first token of each sequence has none. The result is
        kept: a restarted server must reproduce it.
        """
        found = torch.stack(self._ask_mine(partial(self._score, sequences)))
        self._canary = sequences, found[0]
        return found

    async def _score(self, sequences: Sequence[list[int]], server: Server) -> Tensor:
        """Log-probabilities of the tokens of sequences, [N], of one server.

        The last token of all is sampled: only sampling reads keys that a server has cached.
        """
        *prompt, last = sequences[-1]
        scored = [*sequences[:-1], prompt]
        drawn = {"allowed_token_ids": [last], "logprobs": 0, "ignore_eos": True}
        *answers, response = await asyncio.gather(
            *(self._generate(server, ids, {"prompt_logprobs": 0}) for ids in scored),
            self._generate(server, prompt, drawn),
        )
        parts = [protocol.read_tokens(a, ids, 1) for a, ids in zip(answers, scored, strict=True)]
        return torch.cat([*parts, torch.tensor(protocol.read_response(response).logprobs)])

    async def _generate(self, server: Server, ids: list[int], sampling: dict[str, Any]) -> Any:
        """Ask for what follows ids, and refuse what other weights than the last sync's computed."""
        answer = await self._pool.ask(server, *protocol.generation(ids, sampling))
        versions = {span["version"] for span in answer["choices"][0]["weight_versions"]}
        if versions != {self._file.stem}:
            raise UnusableAnswerError(f"an answer of the weights {sorted(versions)}")
        return answer

    def sample(
        self, prompts: Sequence[Prompt], num_responses: int, *, greedy: bool = False
    ) -> Iterator[Rollout]:
        """Ask for responses of each prompt at once; see `Sampler.sample`.

        Every rank takes part, to the end.

        Raises:
            RuntimeError: No weights were loaded.
            ServersUnavailable: No server has answered for long.
            InputError: A server refuses a request, or no server gives a usable answer.
        """
        if self._weight_version is None:
            raise RuntimeError(NO_WEIGHTS)
        asked = [
            self._pool.submit(partial(self._sample, prompt, number, self._weight_version, greedy))
            for prompt in prompts
            for number in range(num_responses)
        ]
        self._in_flight = [each for each in self._in_flight if not each.done()] + asked
        return (future.result() for future in self._pool.as_answered(asked))

    async def _sample(
        self, prompt: Prompt, sample_index: int, version: int, greedy: bool, server: Server
    ) -> Rollout:
        spec = self._spec
        params = {
            "max_tokens": spec.max_response_length,
            "seed": response_seed(spec.seed, prompt.index, sample_index),
            "temperature": 0.0 if greedy else TEMPERATURE,
            "stop_token_ids": spec.stop_ids,
            "ignore_eos": True,
            "skip_reading_prefix_cache": True,
            "logprobs": spec.num_topk + 1 if spec.num_topk else 0,  # the drawn token takes a place
        }
        answer = await self._generate(server, prompt.input_ids, params)
        found = protocol.read_response(answer, spec.num_topk, spec.replay_routing)
        length, limit = len(found.token_ids), spec.max_response_length
        if found.token_ids[-1] not in spec.stop_ids and length != limit:
            raise UnusableAnswerError(f"{length} tokens without an end, of {limit}")
        try:
            return rollout_of(prompt, sample_index, found, version, spec)
        except RuntimeError as error:
            raise UnusableAnswerError(
                f"no experts to replay (start servers with --enable-return-routed-experts and "
                f"--enable-prefix-caching): {error}"
            ) from error

    def drain(self) -> None:
        """Wait for all responses that were asked for; every rank takes part."""
        list(self._pool.as_answered(self._in_flight))

    def close(self) -> None:
        """Drop the connections and the file of weights."""
        self._pool.close()
        for transfer in self._transfers.values():
            transfer.close()
        self._writer.shutdown()
        if is_main():
            for file in (self._file, self._file.with_suffix(UNFINISHED)):
                file.unlink(missing_ok=True)


def _with_tied_head(shapes: Mapping[str, Shape]) -> dict[str, Shape]:
    """The shapes of `with_tied_head`'s stream."""
    return dict(with_tied_head(shapes.items(), shapes))


def _on_host(weight: Tensor) -> Tensor:
    """A copy in the host's memory, where a GPU copies to fast and torch keeps what is freed."""
    copy = torch.empty(weight.shape, dtype=weight.dtype, pin_memory=weight.is_cuda)
    return copy.copy_(weight)


def _finish(writes: Sequence[Future[None]], unfinished: Path, file: Path) -> None:
    """Give a file its name once it is whole."""
    for write in writes:
        write.result()
    unfinished.rename(file)
