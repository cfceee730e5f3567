"""vLLM in this process, beside the trainer: the one module that knows it.

Its side effects on the process are undone: building an engine reseeds every generator, changes
LOCAL_WORLD_SIZE and makes changing the number of threads a no-op; shutting one down destroys
the trainer's process group. Every value that vLLM would take from a model's generation_config.json
is given explicitly.
"""

import gc
import importlib.util
import math
import os
import random
from collections.abc import Callable, Container, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from enum import Enum
from functools import cache, partial
from typing import Any, NamedTuple, TypeVar

import numpy as np
import torch
from safetensors import SafetensorError
from torch import Tensor

from marco_train import distributed
from marco_train.config.rollout import TEMPERATURE
from marco_train.errors import InputError, require
from marco_train.inference.layout import kept_weights
from marco_train.models.checksums import checksums_of
from marco_train.models.weights import ALL_EXPERTS, ExpertShare

T = TypeVar("T")

# Settings of the process that vLLM reads; each is as in the engines that were measured.
ENVIRONMENT = {
    "VLLM_ENABLE_V1_MULTIPROCESSING": "0",  # the engine runs in this process
    "VLLM_CPU_OMP_THREADS_BIND": "nobind",  # ranks share the cores as the launcher says
    "VLLM_LOGGING_LEVEL": "ERROR",
    "VLLM_NO_USAGE_STATS": "1",
    "VLLM_ALLOW_INSECURE_SERIALIZATION": "0",  # no pickles between its processes
}
# Overrides the size that an engine is given.
KV_CACHE_VARIABLE = "VLLM_CPU_KVCACHE_SPACE"
# The share of a GPU that has to be free when an engine starts, 0.92 by default, which is never so
# beside a trainer. Nothing else reads it where the size of the KV cache is given.
# Source: vLLM 0.32.0, v1/worker/utils.py, request_memory; v1/worker/gpu_worker.py, init_device and
# determine_available_memory.
MEMORY_SHARE = 0.01
MAX_SEQUENCES = 256
EMBEDDINGS, HEAD = "model.embed_tokens.weight", "lm_head.weight"
LOAD_FORMAT = "marco_whole"
LOADED_TYPES = {torch.float32, torch.bfloat16, torch.float16}
MAX_REASON = 500  # characters; vLLM's may name every weight of a model


class Purpose(Enum):
    """What an engine is built for; it cannot do the other."""

    generate = "generate"  # tokens, and log-probabilities of given ones
    hidden_states = "hidden_states"


class Generation(NamedTuple):
    """One response."""

    token_ids: list[int]  # [R], with the stop token, if there is one
    logprobs: list[float]  # [R], at temperature 1
    topk_ids: list[list[int]]  # [R, K], the likeliest tokens in each place
    routed_experts: Any  # as vLLM gives them, if the engine was asked for them; else None


def require_vllm() -> None:
    """Refuse to go on without vLLM; costs nothing where it is there.

    Raises:
        InputError: Says what to install.
    """
    require(
        importlib.util.find_spec("vllm") is not None,
        "vLLM is not installed: pip install 'marco-train[vllm]' on a machine with a GPU, "
        "scripts/setup_vllm_cpu for trials without one, or choose another kind: native samples "
        "without it, and hf and native score",
    )


def require_one_engine(owners: Sequence[str], on: torch.device) -> None:
    """Refuse several engines in one process on a GPU; on a CPU they do not disturb each other.

    There all layers of experts of a process take their scratch memory from one workspace, which
    each new engine replaces and locks at its own size.
    Source: vLLM 0.32.0, v1/worker/workspace.py, init_workspace_manager and lock_workspace.

    Args:
        owners: What messages call those that want an engine.
        on: Where the engines would compute.

    Raises:
        InputError: Names them.
    """
    require(
        on.type == "cpu" or len(owners) <= 1,
        f"{', '.join(owners)} want {len(owners)} engines of vLLM in each process, and on a GPU one "
        "is the most: the memory that it computes experts in is replaced by the next one's; "
        "keep the backend vllm for one of them, and take vllm_server or native for the others",
    )


def require_shared_experts(on: torch.device) -> None:
    """Refuse engines that share their experts where vLLM cannot compute with a share.

    Source: vLLM 0.32.0, distributed/device_communicators/cpu_communicator.py, which lacks the
    all_gatherv and reduce_scatterv of base_device_communicator.py, and model_executor/layers/
    fused_moe/experts/cpu_moe.py, apply, which does not look at expert_map.

    Raises:
        InputError: Says what is lacking.
    """
    require(
        on.type != "cpu",
        "stage.rollout.expert_parallel is true, and there is no GPU: vLLM on a CPU has neither the "
        "exchange of tokens between ranks that share experts, all_gatherv and reduce_scatterv, nor "
        "kernels for a share of them; set it to false",
    )


# The engines of this process; vLLM's groups are theirs together.
_OPEN: set[int] = set()


class VLLMEngine:
    """One engine on this rank; every rank builds one at the same time, as building exchanges."""

    def __init__(
        self,
        path: str,
        dtype: str,
        max_length: int,
        max_tokens_per_batch: int,
        kv_cache_bytes: int,
        max_sequences: int = MAX_SEQUENCES,
        purpose: Purpose = Purpose.generate,
        with_weights: bool = True,
        with_experts: bool = False,
        prefix_caching: bool = False,
        share_experts: bool = False,
    ) -> None:
        """Build an engine.

        Args:
            path: Hugging Face directory.
            dtype: float32 or bfloat16.
            max_length: Tokens of the longest sequence, what is generated included.
            max_tokens_per_batch: Of one forward pass.
            kv_cache_bytes: Memory for keys and values.
            max_sequences: Computed together.
            purpose: What it can do.
            with_weights: Whether to load them; else `load_weights` has to bring them, and
                config.json is enough under `path`.
            with_experts: Whether generations name the experts that their tokens took; on a GPU
                only.
            prefix_caching: Whether keys of prompts that begin alike are kept.
            share_experts: Whether each rank's engine holds an equal share of the experts of an MoE
                model, those of its number, and computes it for the tokens of all. Then engines
                step together: every rank makes each call of `generate`, `token_logprobs` and
                `next_logprob`, with any number of requests or none, and iterates it to its end. A
                rank that fails ends the others as its process ends, or by their time limit.

        Raises:
            InputError: vLLM is not installed, or the files do not give all weights of the model.
        """
        require_vllm()
        options: dict[str, Any] = _shared_over_ranks() if share_experts else {}
        # Only an engine that gets its weights again and again can let go of them.
        self._sleeps = torch.cuda.is_available() and not with_weights
        self._asleep = False
        max_tokens_per_batch = max(max_tokens_per_batch, max_length)
        with _process_left_alone():
            from vllm import LLM

            if purpose is Purpose.hidden_states:
                from vllm.config import PoolerConfig

                options |= {
                    "runner": "pooling",
                    "convert": "embed",
                    "pooler_config": PoolerConfig(task="token_embed"),
                }
            self._llm = LLM(
                model=path,
                dtype=dtype,
                max_model_len=max_length,
                max_num_batched_tokens=max_tokens_per_batch,
                max_num_seqs=min(max_sequences, max_tokens_per_batch),
                load_format=_load_format_of_whole_models() if with_weights else "dummy",
                enable_sleep_mode=self._sleeps,
                skip_tokenizer_init=purpose is Purpose.generate,
                kv_cache_memory_bytes=kv_cache_bytes,
                gpu_memory_utilization=MEMORY_SHARE,
                enforce_eager=not torch.cuda.is_available(),
                enable_return_routed_experts=with_experts,
                # vLLM keeps the experts beside the keys, and insists; nothing reads them.
                enable_prefix_caching=with_experts or prefix_caching,
                # A prompt that is split over steps breaks seeds on a CPU; on a GPU they count from
                # a token's place (0.32.0, v1/worker/gpu/sample/gumbel.py).
                enable_chunked_prefill=torch.cuda.is_available() and purpose is Purpose.generate,
                # Takes LOCAL_RANK for its device; the default would put all ranks on the first.
                distributed_executor_backend="external_launcher",
                tensor_parallel_size=1,
                generation_config="vllm",
                # Logits are not rounded, as the trainer's are not on a GPU.
                hf_overrides={"head_dtype": "float32"},
                logprobs_mode="raw_logprobs",
                max_logprobs=-1,
                seed=0,
                disable_log_stats=True,
                **options,
            )
        _OPEN.add(id(self))

    def load_weights(self, weights: Iterable[tuple[str, Tensor]]) -> None:
        """Replace all weights by a stream under checkpoint names, layer by layer.

        Whoever sends them sees to it that the stream is complete, and compares numbers afterwards:
        this path has lost weights without an error before.

        Args:
            weights: Tensors that nobody changes meanwhile; some are kept until their layer is
                complete, and then copied.

        Raises:
            RuntimeError: The engine has weights that the stream did not reach.
        """
        config = self._llm.llm_engine.vllm_config
        if self._asleep:
            self._llm.wake_up(tags=["weights"])
        self._llm.apply_model(partial(replace_weights, weights=weights, config=config))
        if self._asleep:
            self._llm.wake_up(tags=["kv_cache"])
            self._asleep = False
        self.forget_keys()

    def checksums(
        self,
        shapes: Mapping[str, Sequence[int]],
        dtype: torch.dtype,
        share: ExpertShare = ALL_EXPERTS,
    ) -> dict[str, int]:
        """Digest the weights that are kept as a checkpoint has them; see `layout.kept_weights`."""
        digest = partial(checksums_kept, shapes=shapes, dtype=dtype, share=share)
        found: dict[str, int] = self._llm.apply_model(digest)[0]  # of the one worker
        return found

    def forget_keys(self) -> None:
        """Drop kept keys, which would outlive the weights that they were computed with."""
        self._llm.reset_prefix_cache()

    def sleep(self) -> bool:
        """Give the memory of weights, keys and values to the trainer until `load_weights`.

        Returns:
            Whether it did; it cannot on a CPU.
        """
        if self._sleeps and not self._asleep:
            self._llm.sleep(level=2)
            self._asleep = True
        return self._asleep

    def generate(
        self,
        requests: Sequence[tuple[list[int], int]],
        max_tokens: int,
        stop_ids: Sequence[int],
        num_topk: int,
        *,
        greedy: bool,
    ) -> Iterator[tuple[int, Generation]]:
        """Sample one response to each request at temperature 1, or take the likeliest tokens.

        Args:
            requests: Token ids of a prompt and the seed of its response, below 2**63.
            max_tokens: Of a response.
            stop_ids: With which a response ends; no other token ends one.
            num_topk: Likeliest tokens to name in each place.
            greedy: Whether to take the likeliest tokens.

        Yields:
            The number of a request and its response, as each ends.
        """
        from vllm import SamplingParams
        from vllm.sampling_params import RequestOutputKind

        engine = self._llm.llm_engine
        for number, (prompt, seed) in enumerate(requests):
            params = SamplingParams(
                **neutral_sampling(max_tokens) | ({"temperature": 0.0} if greedy else {}),
                seed=seed,
                stop_token_ids=list(stop_ids),
                ignore_eos=True,
                logprobs=num_topk,
                detokenize=False,
                output_kind=RequestOutputKind.FINAL_ONLY,
                skip_reading_prefix_cache=True,
            )
            engine.add_request(str(number), {"prompt_token_ids": prompt}, params)
        while engine.has_unfinished_requests():
            with _generators_left_alone():
                outputs = engine.step()
            for output in outputs:
                if output.finished:
                    yield int(output.request_id), _generation(output.outputs[0], num_topk)

    def token_logprobs(
        self, sequences: Sequence[list[int]], num_topk: int
    ) -> list[tuple[Tensor, Tensor]]:
        """Score every token of sequences given those before it.

        Args:
            sequences: Token ids, two or more each.
            num_topk: Likeliest tokens to name beside it in each place.

        Returns:
            For each sequence of T tokens: ids [T - 1, 1 + K] int64, the sequence's own first, and
            their log-probabilities [T - 1, 1 + K] float32.
        """
        from vllm import SamplingParams

        params = SamplingParams(
            **neutral_sampling(max_tokens=1),
            prompt_logprobs=num_topk,
            flat_logprobs=True,
            detokenize=False,
        )
        with _generators_left_alone():  # the one token that it makes is drawn
            found = self._llm.generate(_token_prompts(sequences), params, use_tqdm=False)
        pairs = []
        for ids, output in zip(sequences, found, strict=True):
            flat = output.prompt_logprobs
            shape = (len(ids) - 1, 1 + num_topk)
            # The first token has nothing before it, and no entry.
            named = torch.tensor(flat.token_ids, dtype=torch.int64).view(shape)
            pairs.append((named, torch.tensor(flat.logprobs, dtype=torch.float32).view(shape)))
        return pairs

    def next_logprob(self, prompt: list[int], token: int) -> float:
        """Log-probability with which the engine, as it samples, draws a token after a prompt."""
        from vllm import SamplingParams

        params = SamplingParams(
            **neutral_sampling(max_tokens=1),
            allowed_token_ids=[token],
            logprobs=0,
            ignore_eos=True,
            detokenize=False,
        )
        with _generators_left_alone():
            (found,) = self._llm.generate(_token_prompts([prompt]), params, use_tqdm=False)
        return float(found.outputs[0].logprobs[0][token].logprob)

    def hidden_states(self, sequences: Sequence[list[int]]) -> list[Tensor]:
        """Last hidden states [T, D] float32 of sequences, after the final norm, on the CPU."""
        from vllm import PoolingParams

        found = self._llm.encode(
            _token_prompts(sequences),
            PoolingParams(use_activation=False),  # else they are normalised
            pooling_task="token_embed",
            use_tqdm=False,
        )
        return [output.outputs.data.cpu() for output in found]

    def close(self) -> None:
        """Shut the engine down, and leave the trainer's process group as it is."""
        import vllm.v1.engine.core as engine_core

        _OPEN.discard(id(self))
        theirs = engine_core.cleanup_dist_env_and_memory
        engine_core.cleanup_dist_env_and_memory = _cleanup_of_their_groups
        try:
            self._llm.llm_engine.engine_core.shutdown()
        finally:
            engine_core.cleanup_dist_env_and_memory = theirs
        del self._llm


def _shared_over_ranks() -> dict[str, Any]:
    """Options of engines that share their experts over all ranks of this launch.

    Experts lie in their order, an equal number on each rank, and tokens cross by all-gather and
    reduce-scatter; all ranks go on stepping until none has requests.
    Source: vLLM 0.32.0, config/parallel.py, __post_init__ with external_launcher;
    v1/engine/llm_engine.py, has_unfinished_requests_dp and step; model_executor/layers/fused_moe/
    expert_map_manager.py, determine_expert_map, linear.
    """
    if distributed.world_size() == 1:
        return {}
    limit = distributed.Groups.timeout
    seconds = None if limit is None else math.ceil(limit.total_seconds())
    return {
        "data_parallel_size": distributed.world_size(),
        "enable_expert_parallel": True,
        # Else a step may only take the result of an earlier one, and the others wait in their
        # forward pass: v1/engine/core.py, step_with_batch_queue; on a GPU nothing stands in for it:
        # v1/worker/gpu/model_runner.py, execute_model, total_num_scheduled_tokens == 0.
        "async_scheduling": False,
        # Of the groups in which ranks wait for each other; theirs are not the trainer's.
        "distributed_timeout_seconds": seconds,
        "cpu_distributed_timeout_seconds": seconds,
    }


@cache
def _load_format_of_whole_models() -> str:
    """Tell vLLM of a loader that refuses a model which did not arrive whole; give its name.

    vLLM's own checks neither single experts nor single matrices of those that it joins, like the
    three of queries, keys and values; what does not arrive is whatever lay in memory.
    """
    from vllm.model_executor.model_loader import register_model_loader
    from vllm.model_executor.model_loader.default_loader import DefaultModelLoader

    @register_model_loader(LOAD_FORMAT)
    class WholeModelLoader(DefaultModelLoader):  # type: ignore[misc]
        def __init__(self, load_config: Any) -> None:
            super().__init__(replace(load_config, load_format="auto"))

        def load_weights(self, model: Any, model_config: Any) -> None:
            load = partial(super().load_weights, model, model_config)
            load_whole(model, load, model_config.model)

    return LOAD_FORMAT


def load_whole(model: Any, load: Callable[[], None], path: str) -> None:
    """Load a model's weights, and refuse it where some did not arrive or are not finite.

    Args:
        model: Of vLLM, with weights of any value.
        load: Loads them.
        path: What the message calls the model.

    Raises:
        InputError: Names the first ten, under vLLM's names; or gives vLLM's reason.
    """
    weights = {name: w for name, w in model.named_parameters() if w.dtype in LOADED_TYPES}
    for weight in weights.values():
        weight.data.fill_(torch.nan)
    try:
        load()
    except (AssertionError, KeyError, OSError, RuntimeError, SafetensorError, ValueError) as error:
        said = " ".join(str(error).split())[:MAX_REASON]
        raise InputError(f"vLLM cannot load the weights under {path}: {said}") from error
    absent = [name for name, weight in weights.items() if not weight.isfinite().all()]
    require(
        not absent,
        f"{len(absent)} weights under {path} did not arrive in vLLM whole, or are not finite: "
        f"{', '.join(absent[:10])}; fetch the model again",
    )


def replace_weights(model: Any, weights: Iterable[tuple[str, Tensor]], config: Any) -> None:
    """Load a complete stream over a model that vLLM has in use.

    Args:
        model: Of vLLM.
        weights: Under checkpoint names, the head of a tied model included.
        config: The `VllmConfig` that it was built with.

    Raises:
        RuntimeError: The model has weights that the stream did not reach.
    """
    from vllm.config import set_current_vllm_config
    from vllm.model_executor.model_loader.reload import layerwise

    for layer in model.modules():
        left = layerwise.get_layerwise_info(layer)
        if left.can_load():  # of a reload that broke off; what came would count towards this one
            layerwise._place_kernel_tensors(layer, left)
            left.reset()
    needed = {name for name, _ in model.named_parameters()}
    if next(model.parameters()).device.type == "cpu":
        forget_packed_experts(model)
    # Kernels that are built anew ask for it, as in vLLM's own reload.
    with set_current_vllm_config(config):
        layerwise.initialize_layerwise_reload(model)
        loaded = model.load_weights(weights)
        layerwise.finalize_layerwise_reload(model, config.model_config)
    if not_reached := sorted(needed - loaded):
        raise RuntimeError(f"vLLM took no new {', '.join(not_reached[:10])}")


def checksums_kept(
    model: Any,
    shapes: Mapping[str, Sequence[int]],
    dtype: torch.dtype,
    share: ExpertShare = ALL_EXPERTS,
) -> dict[str, int]:
    """Digest the weights of a model of vLLM that it keeps as a checkpoint has them.

    Its experts are those of `share`, and `shapes` are theirs.
    """
    from vllm.platforms import current_platform

    platform = "cpu" if current_platform.is_cpu() else "cuda"
    return checksums_of(kept_weights(model, shapes, dtype, platform), share)


def forget_packed_experts(model: Any) -> None:
    """Have experts packed anew: vLLM on a CPU silently keeps the old expert weights."""
    for module in model.modules():
        method: Any = getattr(module, "quant_method", None)
        if hasattr(method, "moe_kernel"):
            method.moe_kernel = None


def with_tied_head(
    weights: Iterable[tuple[str, T]], names: Container[str]
) -> Iterator[tuple[str, T]]:
    """Pass on a stream with the head of a model that ties it, whose `names` have none.

    On a CPU vLLM packs it for a kernel of its own, which would go on with the old one.
    """
    for name, weight in weights:
        yield name, weight
        if name == EMBEDDINGS and HEAD not in names:
            yield HEAD, weight


def neutral_sampling(max_tokens: int) -> dict[str, Any]:
    """Every field that generation_config.json could set, at the value that changes nothing."""
    return {
        "n": 1,
        "max_tokens": max_tokens,
        "min_tokens": 0,
        "temperature": TEMPERATURE,
        "top_p": 1.0,
        "top_k": 0,
        "min_p": 0.0,
        "presence_penalty": 0.0,
        "frequency_penalty": 0.0,
        "repetition_penalty": 1.0,
    }


def _token_prompts(sequences: Sequence[list[int]]) -> list[dict[str, list[int]]]:
    return [{"prompt_token_ids": ids} for ids in sequences]


def _generation(output: Any, num_topk: int) -> Generation:
    ids = list(output.token_ids)
    logprobs, likeliest = [], []
    for token, place in zip(ids, output.logprobs, strict=True):
        logprobs.append(place[token].logprob)
        ranked = sorted(place, key=lambda i: place[i].rank)  # with the token, whatever its rank
        likeliest.append(ranked[:num_topk])
    return Generation(ids, logprobs, likeliest, output.routed_experts)


@contextmanager
def _process_left_alone() -> Iterator[None]:
    """Put generators, environment and the number of threads back to what they were."""
    distributed.start()
    environment = dict(os.environ)
    set_num_threads = torch.set_num_threads
    os.environ.pop(KV_CACHE_VARIABLE, None)
    os.environ.update(ENVIRONMENT)
    try:
        with _generators_left_alone():
            yield
    finally:
        torch.set_num_threads = set_num_threads
        os.environ.clear()
        os.environ.update(environment)
        gc.unfreeze()


@contextmanager
def _generators_left_alone() -> Iterator[None]:
    """Put the generators of this process back to where they were."""
    on_cpu, of_numpy, of_python = torch.get_rng_state(), np.random.get_state(), random.getstate()
    on_devices = torch.cuda.get_rng_state_all() if torch.cuda.is_available() else []
    try:
        yield
    finally:
        torch.set_rng_state(on_cpu)
        np.random.set_state(of_numpy)
        random.setstate(of_python)
        if on_devices:
            torch.cuda.set_rng_state_all(on_devices)


def _cleanup_of_their_groups(*_: Any, **__: Any) -> None:
    """What vLLM does on leaving, but for groups that others use.

    The default process group is the trainer's, and vLLM's own serve every engine that is open.
    """
    from vllm.distributed import parallel_state

    gc.collect()
    if _OPEN:
        return
    parallel_state.destroy_model_parallel()
    if parallel_state._WORLD is not None:
        parallel_state._WORLD.destroy()
    parallel_state._WORLD = None
    parallel_state._NODE_COUNT = None
