"""The sampler that needs no server: a copy of the model and a key-value cache, batched.

Legend: B responses decoded together, V vocabulary, L new tokens at most, T tokens of one forward
pass, S tokens of prompt and response, N layers, K experts a token.
"""

from collections.abc import Iterable, Iterator, Sequence

import torch
from torch import Tensor

from marco_train.config.rollout import TEMPERATURE, NativeRolloutConfig
from marco_train.distributed import device
from marco_train.losses.logprobs import sequence_logprobs
from marco_train.models.attention import KVCache
from marco_train.models.checksums import checksums_of
from marco_train.models.decoding_head import DecodingHead
from marco_train.models.qwen3_moe import Qwen3Moe
from marco_train.models.routing import Routing
from marco_train.models.weights import named_weights, receive_weights
from marco_train.rollout.base import NO_WEIGHTS, Sampler, response_seed
from marco_train.types import FinishReason, Prompt, Rollout, no_experts

# Tokens of a block that is drawn before one of them is.
BLOCK = 2048


class NativeSampler(Sampler):
    """Samples on this rank, alone: every rank holds all experts and its own prompts."""

    def __init__(
        self,
        cfg: NativeRolloutConfig,
        model: Qwen3Moe,
        stop_ids: Sequence[int],
        max_response_length: int,
        num_topk: int,
        seed: int,
        weight_version: int | None = None,
        temperature: float = TEMPERATURE,
    ) -> None:
        """Sample from `model`; its weights count as loaded if they have a version.

        Rollouts name the `num_topk` likeliest tokens in each place. Another temperature is for what
        is only read: log-probabilities are of what was drawn from.
        """
        self._model = model.eval()
        self._batch_size = cfg.batch_size
        self._replay_routing = cfg.replay_routing
        self._stop_ids = frozenset(stop_ids)
        self._max_response_length = max_response_length
        self._num_topk = num_topk
        self._seed = seed
        self._weight_version = weight_version
        self._temperature = temperature

    def load_weights(self, weights: Iterable[tuple[str, Tensor]], version: int) -> None:
        """Take a complete stream of named weights.

        Raises:
            InputError: A weight is missing, doubled, unknown or misshapen.
        """
        self._weight_version = None
        receive_weights(self._model, weights)
        self._weight_version = version

    def checksums(self) -> list[dict[str, int]]:
        """Digest every weight that this sampler holds."""
        return [checksums_of(named_weights(self._model))]

    @torch.inference_mode()
    def score(self, sequences: Sequence[list[int]]) -> Tensor:
        """Log-probabilities of the tokens of sequences; see `sequence_logprobs`."""
        return sequence_logprobs(self._model, self._model.head, sequences)

    def sample(
        self, prompts: Sequence[Prompt], num_responses: int, *, greedy: bool = False
    ) -> Iterator[Rollout]:
        """Sample responses of each prompt; see `Sampler.sample`.

        Raises:
            RuntimeError: No weights were loaded.
        """
        if self._weight_version is None:
            raise RuntimeError(NO_WEIGHTS)
        requests = [(prompt, n) for prompt in prompts for n in range(num_responses)]
        return self._sample_in_batches(requests, self._weight_version, greedy)

    def _sample_in_batches(
        self, requests: Sequence[tuple[Prompt, int]], weight_version: int, greedy: bool
    ) -> Iterator[Rollout]:
        # Neighbours of similar length waste little of the cache.
        by_length = sorted(range(len(requests)), key=lambda i: len(requests[i][0].input_ids))
        head = DecodingHead(self._model.head)
        for start in range(0, len(by_length), self._batch_size):
            batch = [requests[i] for i in by_length[start : start + self._batch_size]]
            yield from self._sample_batch(batch, head, weight_version, greedy)

    @torch.inference_mode()
    def _sample_batch(
        self,
        requests: Sequence[tuple[Prompt, int]],
        head: DecodingHead,
        weight_version: int,
        greedy: bool,
    ) -> Iterator[Rollout]:
        cache = KVCache(self._model.architecture.num_hidden_layers)
        uniforms = self._uniforms(requests)  # [B, L]
        response_ids: list[list[int]] = [[] for _ in requests]
        logprobs: list[list[float]] = [[] for _ in requests]
        topk_ids: list[list[list[int]]] = [[] for _ in requests]
        experts = ExpertRecord(len(requests), self._replay_routing)
        hidden = self._prefill([prompt.input_ids for prompt, _ in requests], cache, experts)
        logits = head.logits(hidden)
        # Room, as fresh memory takes longer than what fills it.
        probs = None if greedy else torch.empty_like(logits)
        active = list(range(len(requests)))
        for place in range(self._max_response_length):
            if greedy:
                tokens, token_lps = likeliest_tokens(logits)
            else:
                cooled = logits if self._temperature == 1 else logits / self._temperature
                tokens, token_lps = draw_tokens(cooled, uniforms[active, place], probs)
            likeliest = logits.topk(self._num_topk, dim=-1).indices.tolist()
            last = place + 1 == self._max_response_length
            running = []
            rows = zip(active, tokens.tolist(), token_lps.tolist(), likeliest, strict=True)
            for row, (request, token, lp, ids) in enumerate(rows):
                response_ids[request].append(token)
                logprobs[request].append(lp)
                topk_ids[request].append(ids)
                stopped = token in self._stop_ids
                if not stopped and not last:
                    running.append(row)
                    continue
                prompt, sample_index = requests[request]
                yield Rollout(
                    prompt=prompt,
                    sample_index=sample_index,
                    response_ids=response_ids[request],
                    sampler_logprobs=logprobs[request],
                    topk_ids=topk_ids[request],
                    finish_reason=FinishReason.stop if stopped else FinishReason.length,
                    weight_version=weight_version,
                    routed_experts=experts.of(request),
                )
            if not running:
                return
            if len(running) < len(active):
                kept = torch.tensor(running, device=tokens.device)
                cache.keep(kept)
                tokens = tokens[kept]
                active = [active[row] for row in running]
            routing = experts.routing()
            hidden = self._model(tokens[None], cache.advance(), cache, routing)
            experts.add(routing, active, lengths=[1] * len(active))
            logits = head.logits(hidden)

    def _prefill(
        self, prompts: Sequence[list[int]], cache: KVCache, experts: "ExpertRecord"
    ) -> Tensor:
        """Run the packed prompts; hidden states [B, D] of each one's last token."""
        lengths = torch.tensor([len(ids) for ids in prompts])
        input_ids = torch.tensor([[token for ids in prompts for token in ids]], device=device())
        positions = torch.cat([torch.arange(n) for n in lengths.tolist()])[None].to(device())
        cache.start(positions)
        routing = experts.routing()
        hidden: Tensor = self._model(input_ids, positions, cache, routing)
        experts.add(routing, range(len(prompts)), lengths.tolist())
        return hidden[(lengths.cumsum(0) - 1).to(device())]

    def _uniforms(self, requests: Sequence[tuple[Prompt, int]]) -> Tensor:
        """One number for each place of each response, [B, L] float64, from its own seed."""
        rows = []
        for prompt, sample_index in requests:
            seed = response_seed(self._seed, prompt.index, sample_index)
            generator = torch.Generator().manual_seed(seed)
            rows.append(
                torch.rand(self._max_response_length, generator=generator, dtype=torch.float64)
            )
        return torch.stack(rows).to(device())


class ExpertRecord:
    """The experts that the tokens of a batch take while it is sampled, if they are wanted."""

    def __init__(self, num_requests: int, wanted: bool) -> None:
        self._wanted = wanted
        self._parts: list[list[Tensor]] = [[] for _ in range(num_requests)]  # [tokens, N, K]

    def routing(self) -> Routing | None:
        """Make what a forward pass fills. None: nothing is wanted of it."""
        return Routing() if self._wanted else None

    def add(self, routing: Routing | None, requests: Sequence[int], lengths: Sequence[int]) -> None:
        """Take what a forward pass filled, whose T tokens are `lengths` of each request."""
        if routing is None:
            return
        taken = routing.expert_ids.transpose(0, 1).to("cpu", torch.int16)  # [T, N, K]
        parts = torch.split(taken, list(lengths))
        for request, part in zip(requests, parts, strict=True):
            self._parts[request].append(part)

    def of(self, request: int) -> Tensor:
        """Experts of all tokens of a request so far, [S - 1, N, K] int16 at its end."""
        return torch.cat(self._parts[request]) if self._wanted else no_experts()


def draw_tokens(
    logits: Tensor, uniforms: Tensor, room: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """Invert the cumulative distribution of each row at its uniform number.

    Of a large vocabulary first a block of tokens is drawn, and then one of the block, so that only
    sums of blocks and one block a row are added up in float64.

    Args:
        logits: [B, V] float32.
        uniforms: [B] float64 in [0, 1).
        room: [B or more, V] float32, where the probabilities may be written.

    Returns:
        Token ids [B] int64 and their log-probabilities [B] float32.
    """
    probs = torch.softmax(logits, -1, out=None if room is None else room[: len(logits)])
    vocab_size = probs.shape[1]
    if vocab_size <= BLOCK:
        tokens, _ = _draw(probs, uniforms)
    else:
        whole = vocab_size // BLOCK * BLOCK
        of_blocks = probs[:, :whole].reshape(len(probs), -1, BLOCK).sum(-1)
        of_rest = probs[:, whole:].sum(-1, keepdim=True)
        block, uniforms = _draw(torch.cat([of_blocks, of_rest], 1), uniforms)
        ids = block[:, None] * BLOCK + torch.arange(BLOCK, device=probs.device)
        of_ids = probs.gather(1, ids.clamp(max=vocab_size - 1))
        place, _ = _draw(of_ids.masked_fill_(ids >= vocab_size, 0), uniforms)
        tokens = (block * BLOCK + place).clamp(max=vocab_size - 1)  # lies beyond if all are NaN
    return tokens, probs.gather(1, tokens[:, None])[:, 0].log()


def _draw(masses: Tensor, uniforms: Tensor) -> tuple[Tensor, Tensor]:
    """Draw a column of each row of masses [B, N] by its uniform number [B] float64.

    Returns:
        Columns [B] int64, of positive mass; and how far in the column's mass each number lies, [B]
        float64 in [0, 1), which is a uniform number again.
    """
    ends = masses.cumsum(-1, dtype=torch.float64)
    # Scaled by the total, so that rounding cannot push a draw past the last mass.
    wanted = uniforms[:, None] * ends[:, -1:]
    column = torch.searchsorted(ends, wanted, right=True).clamp(max=masses.shape[1] - 1)
    mass = masses.gather(1, column).double()
    begins = ends.gather(1, column) - mass
    return column[:, 0], ((wanted - begins) / mass).clamp(min=0)[:, 0]


def likeliest_tokens(logits: Tensor) -> tuple[Tensor, Tensor]:
    """Take the likeliest token of each row of logits [B, V]; ids and log-probabilities [B]."""
    logprobs, tokens = logits.log_softmax(-1).max(-1)
    return tokens, logprobs
