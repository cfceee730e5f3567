"""What an update of a rank allocates and computes, found by making it on the meta device.

The model, the loss and autograd are the run's own, with the shapes of the run and without values:
every tensor is counted from the operation that makes it to the one after which nobody holds it.
Three things that the meta device does not know are said here: which kernels the run's device has
(`kernels_of`), how many rows come from other ranks (`PlannedGroup`), and when a gradient leaves its
parameter for the optimizer's buffer (`GradientKeeping`).
"""

import math
import weakref
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, replace
from enum import Enum
from functools import cache
from typing import Any, cast

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from marco_train.config.architecture import ArchitectureConfig
from marco_train.config.model import DType
from marco_train.config.opd import Objective
from marco_train.config.parallel import Dispatch, Recompute
from marco_train.losses import logprobs
from marco_train.losses.ahead import PIECE_ELEMENTS
from marco_train.losses.balance import balance_loss, router_z_loss
from marco_train.losses.chains import SLICE_ELEMENTS
from marco_train.losses.cross_entropy import cross_entropy
from marco_train.losses.distillation import FullReverseKL, SampledReverseKL, TopKReverseKL
from marco_train.losses.logprobs import (
    TILE_ELEMENTS,
    TILE_ROWS,
    token_logprobs,
)
from marco_train.models.attention import PACKED_DEVICES, PackedSequences
from marco_train.models.qwen3_moe import Qwen3Moe
from marco_train.models.routing import Routing
from marco_train.models.weights import meta_model, torch_dtype
from marco_train.planning.compiler import compiler_left_out
from marco_train.types import (
    FullMicrobatch,
    LossFn,
    Microbatch,
    PolicyOutput,
    SampledMicrobatch,
    TopKMicrobatch,
)

aten = torch.ops.aten


class GradientKeeping(Enum):
    """What becomes of a parameter's gradient once backward has made it.

    parameter: it stays until the update; buffer: it is added to a buffer of the optimizer's and
    freed.
    """

    parameter = "parameter"
    buffer = "buffer"


@dataclass(frozen=True, kw_only=True)
class Shapes:
    """All that the memory and the arithmetic of a microbatch depend on."""

    architecture: tuple[tuple[str, Any], ...]
    """Fields of an `ArchitectureConfig`."""
    dtype: DType
    is_gpu: bool
    num_tokens: int
    """Of a microbatch, on this rank; all of them have loss."""
    longest: int
    """Tokens of a sequence."""
    expert_parallel_size: int = 1
    dispatch: Dispatch = Dispatch.deduplicated
    imbalance: float = 1.0
    """Rows that this rank's experts get, over the mean of the ranks."""
    recompute: Recompute = Recompute.none
    gradients: GradientKeeping = GradientKeeping.buffer
    objective: Objective | None = None
    """None: cross-entropy."""
    top_k: int = 0
    teacher_width: int = 0
    """Of the hidden states that the objective `full` takes."""
    scores_only: bool = False
    """Whether the model is a teacher's: nothing is learnt, and one sequence at a time is scored."""

    def shape(self) -> ArchitectureConfig:
        """The model's."""
        return ArchitectureConfig(**dict(self.architecture))

    def lengths(self) -> list[int]:
        """Sequences of a microbatch: as many of the longest as fit, and one of what is left."""
        whole, rest = divmod(self.num_tokens, self.longest)
        return [self.longest] * whole + ([rest] if rest else [])


@dataclass(frozen=True)
class Held:
    """Bytes that are held at one moment beside weights, masters and moments."""

    activations: int = 0
    logits: int = 0
    gradients: int = 0
    """Of parameters, in their own type."""

    @property
    def total(self) -> int:
        """All of them."""
        return self.activations + self.logits + self.gradients


@dataclass(frozen=True)
class Work:
    """Floating-point operations of matrix products of a microbatch, a multiply and an add each two.

    Attention counts every key of a sequence's rectangle, as torch's counter does; causal kernels
    compute half of them.
    """

    layers: float
    attention: float
    head: float

    @property
    def total(self) -> float:
        """As torch's counter adds them up."""
        return self.layers + self.attention + self.head


@dataclass(frozen=True)
class Traced:
    """What one microbatch of an update takes."""

    backward: Held
    """At the moment of the pass at which most is held."""
    after: Held
    """When the pass is over."""
    forward_work: Work
    work: Work
    """With backward, and what it computes again."""
    wire_bytes: int
    """That this rank sends to others of its expert-parallel group, forward and backward."""


class _Done(dist.Work):
    """An exchange that is over."""

    def wait(self, *_: Any) -> bool:
        return True


class PlannedGroup(dist.ProcessGroup):
    """The ranks that share experts, as one of them sees them: it moves nothing, and counts."""

    def __init__(self, shapes: Shapes) -> None:
        super().__init__(0, shapes.expert_parallel_size)  # type: ignore[call-arg, arg-type]
        cfg = shapes.shape()
        assert cfg.num_experts is not None and cfg.num_experts_per_tok is not None
        size, num_tokens = shapes.expert_parallel_size, shapes.num_tokens
        pairs = num_tokens * cfg.num_experts_per_tok // size
        # Of a token's experts, at least one lies on a given rank.
        elsewhere = math.comb(cfg.num_experts - cfg.num_experts // size, cfg.num_experts_per_tok)
        reached = 1 - elsewhere / math.comb(cfg.num_experts, cfg.num_experts_per_tok)
        crossing = pairs if shapes.dispatch is Dispatch.all_to_all else int(num_tokens * reached)
        received = int(crossing * shapes.imbalance)
        rows = [[crossing] * size, [received] * size]
        if shapes.dispatch is Dispatch.deduplicated:
            rows.append([int(pairs * shapes.imbalance)] * size)
        self.rows = torch.tensor(rows)
        """What a layer waits for: rows to each rank, from each, and pairs of token and expert."""
        self.sent_bytes = 0

    def alltoall_base(self, out: Tensor, rows: Tensor, *_: Any) -> dist.Work:
        """Let rows of known numbers cross."""
        self.sent_bytes += rows.nbytes * (self.size() - 1) // self.size()
        return _Done()


class _FusedRMSNorm(torch.autograd.Function):
    """The one kernel that a GPU has for it, which keeps its input and a number a row."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor) -> Tensor:
        ctx.save_for_backward(x, weight, x.new_empty(x.shape[:-1], dtype=torch.float32))
        return torch.empty_like(x)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor]:
        x, weight, _ = ctx.saved_tensors
        return torch.empty_like(x), torch.empty_like(weight)


class _PackedAttention(torch.autograd.Function):
    """A GPU's kernel for packed sequences, which keeps what it takes and gives, and a number a row.

    Every key of a sequence's rectangle counts, as in `ATTENTION`.
    """

    @staticmethod
    def forward(
        ctx: Any, q: Tensor, k: Tensor, v: Tensor, num_pairs: int, ledger: "_Ledger"
    ) -> Tensor:
        out = torch.empty_like(q)
        ctx.save_for_backward(q, k, v, out, q.new_empty(q.shape[:2], dtype=torch.float32))
        ctx.ledger, ctx.product = ledger, 2.0 * num_pairs * q.shape[1] * q.shape[2]
        ledger.work["attention"] += 2 * ctx.product
        return out

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        q, k, v, *_ = ctx.saved_tensors
        ctx.ledger.work["attention"] += 5 * ctx.product  # the scores again, and four gradients
        return torch.empty_like(q), torch.empty_like(k), torch.empty_like(v), None, None


@contextmanager
def kernels_of(is_gpu: bool, ledger: "_Ledger") -> Iterator[None]:
    """Let the meta device have the kernels of the run's, and its tiles of logits."""
    attention = (
        aten._scaled_dot_product_flash_attention
        if is_gpu
        else aten._scaled_dot_product_flash_attention_for_cpu
    )

    def attend(q: Tensor, k: Tensor, v: Tensor, **_: Any) -> Tensor:
        found: Tensor = attention(q, k, v, 0.0, True)[0]
        return found

    def rms_norm(x: Tensor, _: Any, weight: Tensor, eps: float) -> Tensor:
        found: Tensor = _FusedRMSNorm.apply(x, weight)  # type: ignore[no-untyped-call]
        return found

    def grouped_mm(left: Tensor, right: Tensor, *, offs: Tensor) -> Tensor:
        ledger.add_product(left, right)  # whose meta kernel takes bfloat16 alone
        if right.dim() == 3:
            return left.new_empty(left.shape[0], right.shape[2])
        return left.new_empty(offs.shape[0], left.shape[0], right.shape[1])

    def attend_packed(sequences: PackedSequences, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        pairs = sequences.num_pairs
        found: Tensor = _PackedAttention.apply(q, k, v, pairs, ledger)  # type: ignore[no-untyped-call]
        return found

    theirs = F.scaled_dot_product_attention, F.rms_norm, F.grouped_mm
    packed = PackedSequences.attend_packed
    F.scaled_dot_product_attention = attend  # type: ignore[assignment]
    if is_gpu:
        F.rms_norm = rms_norm  # type: ignore[assignment] # a CPU has none of its own either
        PACKED_DEVICES.add("meta")
        PackedSequences.attend_packed = attend_packed  # type: ignore[method-assign,assignment]
    F.grouped_mm = grouped_mm  # type: ignore[assignment]
    TILE_ELEMENTS["meta"] = TILE_ELEMENTS["cuda" if is_gpu else "cpu"]
    if not is_gpu:
        TILE_ROWS["meta"] = TILE_ROWS["cpu"]
        PIECE_ELEMENTS["meta"] = PIECE_ELEMENTS["cpu"]
        SLICE_ELEMENTS["meta"] = SLICE_ELEMENTS["cpu"]
    every_block = logprobs.vocabulary_blocks

    def some_blocks(num_tokens: int, vocab_size: int, most_elements: int) -> Iterator[slice]:
        blocks = list(every_block(num_tokens, vocab_size, most_elements))
        # All but the last are of one size, and tiles of two at most are held at once.
        chosen = [*blocks[:2], blocks[-1]] if len(blocks) > 3 else blocks
        ledger.columns = vocab_size / sum(block.stop - block.start for block in chosen)
        yield from chosen
        ledger.columns = 1.0

    logprobs.vocabulary_blocks = some_blocks
    try:
        yield
    finally:
        logprobs.vocabulary_blocks = every_block
        F.scaled_dot_product_attention, F.rms_norm, F.grouped_mm = theirs
        PackedSequences.attend_packed = packed  # type: ignore[method-assign]
        PACKED_DEVICES.discard("meta")
        del TILE_ELEMENTS["meta"]
        TILE_ROWS.pop("meta", None)
        PIECE_ELEMENTS.pop("meta", None)
        SLICE_ELEMENTS.pop("meta", None)


class _Ledger(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Counts bytes from operation to operation, and operations of matrix products."""

    def __init__(self, group: PlannedGroup | None) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self._group = group
        self._known: dict[int, weakref.ref[Any]] = {}
        self._held = {"activations": 0, "logits": 0, "gradients": 0}
        self._gradients: set[int] = set()
        self.part = "activations"
        """What new tensors are held for."""
        self.segment = "forward"
        self.peaks: dict[str, Held] = {}
        """The most that was held, by segment of the pass."""
        self.work = {"layers": 0.0, "attention": 0.0, "head": 0.0}
        self.columns = 1.0
        """Columns of logits for which each one stands that is made."""

    def held(self) -> Held:
        """What is held now."""
        return Held(**self._held)

    def __torch_dispatch__(
        self, func: Any, types: Any, args: Any = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        to_host = func is aten._to_copy.default and kwargs.get("device") == torch.device("cpu")
        if to_host and args[0].is_meta:
            # The one wait of a layer, for numbers that nobody counted.
            assert self._group is not None
            return self._group.rows
        out = func(*args, **kwargs)
        self._count_work(func, args)
        for tensor in out if isinstance(out, tuple | list) else (out,):
            if isinstance(tensor, Tensor):
                self._take(tensor)
        held = self.held()
        if held.total > self.peaks.get(self.segment, Held()).total:
            self.peaks[self.segment] = held
        return out

    def _take(self, tensor: Tensor) -> None:
        storage = tensor.untyped_storage()
        key = storage._cdata
        if key in self._known:
            return
        part, size = self.part, storage.nbytes()

        def forget(_: Any) -> None:
            del self._known[key]
            kept_for = "gradients" if key in self._gradients else part
            self._gradients.discard(key)
            self._held[kept_for] -= size

        self._known[key] = weakref.ref(storage, forget)
        self._held[part] += size

    def know(self, tensor: Tensor) -> None:
        """Leave out a tensor that was there before."""
        storage = tensor.untyped_storage()
        self._known[storage._cdata] = weakref.ref(storage)

    def is_gradient(self, tensor: Tensor) -> None:
        """Count a tensor as a gradient from now on."""
        key, size = tensor.untyped_storage()._cdata, tensor.untyped_storage().nbytes()
        if key in self._known and key not in self._gradients:
            self._gradients.add(key)
            part = "logits" if self.part == "logits" else "activations"
            self._held[part] -= size
            self._held["gradients"] += size

    def _count_work(self, func: Any, args: Any) -> None:
        packet = func.overloadpacket
        if packet in ATTENTION:
            self.work["attention"] += ATTENTION[packet](args)
        elif packet in PRODUCTS:
            self.add_product(*args[PRODUCTS[packet] :][:2])

    def add_product(self, left: Tensor, right: Tensor) -> None:
        """Count a product of matrices: each number of the left one meets a row of the right one."""
        part = "head" if self.part == "logits" else "layers"
        self.work[part] += 2 * left.numel() * right.shape[-1] * self.columns


# torch wraps it for a compiler that nobody asks here, and that takes a second to import.
_Ledger.__torch_dispatch__ = _Ledger.__torch_dispatch__.__wrapped__  # type: ignore


def _attention_products(q: Tensor, k: Tensor, num_products: int) -> float:
    """Operations of products of q [B, H, L, d] and k [B, G, L, d], all keys counted."""
    rows, heads, length, width = q.shape
    return float(num_products * 2 * rows * heads * length * k.shape[2] * width)


# Matrix products, and the place of the left factor among their arguments.
PRODUCTS = {aten.mm: 0, aten.bmm: 0, aten.addmm: 1, aten.addmm_: 1}
ATTENTION = {
    aten._scaled_dot_product_flash_attention: lambda a: _attention_products(a[0], a[1], 2),
    aten._scaled_dot_product_flash_attention_for_cpu: lambda a: _attention_products(a[0], a[1], 2),
    # The scores again, and four gradients.
    aten._scaled_dot_product_flash_attention_backward: lambda a: _attention_products(a[1], a[2], 5),
    aten._scaled_dot_product_flash_attention_for_cpu_backward: lambda a: _attention_products(
        a[1], a[2], 5
    ),
}


# Layers of the two models that are traced: whatever is counted grows by the same from each to the
# next, and one layer alone is both the first and the last.
FEW = (2, 3)


@cache
def trace_update(shapes: Shapes) -> Traced:
    """Make one microbatch's forward and backward pass of an update on the meta device.

    Two models of few layers are traced, and what the second has more stands for every further one.
    """
    num_layers = shapes.shape().num_hidden_layers
    if num_layers <= FEW[1]:
        return _trace_layers(shapes, num_layers).traced()
    fewer, more = (_trace_layers(shapes, number) for number in FEW)
    return more.grown(fewer, num_layers - FEW[1]).traced()


@dataclass(frozen=True)
class _Counts:
    """What a trace counted."""

    peaks: dict[str, Held]
    after: Held
    forward_work: Work
    work: Work
    wire_bytes: int

    def traced(self) -> Traced:
        """Keep the moment at which most is held."""
        most = max(self.peaks.values(), key=lambda held: held.total)
        return Traced(most, self.after, self.forward_work, self.work, self.wire_bytes)

    def grown(self, fewer: "_Counts", times: int) -> "_Counts":
        """Add the difference from a model of a layer less, so many times."""

        def grow(mine: Any, theirs: Any) -> Any:
            if isinstance(mine, int | float):
                return mine + times * (mine - theirs)
            values = vars(mine).items()
            return type(mine)(**{name: grow(v, getattr(theirs, name)) for name, v in values})

        return _Counts(
            {name: grow(held, fewer.peaks[name]) for name, held in self.peaks.items()},
            grow(self.after, fewer.after),
            grow(self.forward_work, fewer.forward_work),
            grow(self.work, fewer.work),
            grow(self.wire_bytes, fewer.wire_bytes),
        )


@compiler_left_out()
def _trace_layers(shapes: Shapes, num_layers: int) -> _Counts:
    """Trace a model of so many layers."""
    group = PlannedGroup(shapes) if shapes.expert_parallel_size > 1 else None
    architecture = replace(shapes.shape(), num_hidden_layers=num_layers)
    model = meta_model(architecture, group).to(torch_dtype(shapes.dtype))
    model.recompute = shapes.recompute
    model.set_dispatch(shapes.dispatch)
    ledger = _Ledger(group)
    for parameter in model.parameters():
        ledger.know(parameter)
    attend = _layout(tuple(shapes.lengths()))
    if shapes.scores_only:
        return _score_layers(shapes, model, attend, ledger)
    for parameter in model.parameters():
        _watch_gradient(parameter, ledger, shapes.gradients)
    # Backward reaches the inputs of layers in this order.
    _enter_segment_behind(model.model.layers[-1], ledger, "other layers")
    _enter_segment_behind(model.model.layers[0], ledger, "embeddings")
    with kernels_of(shapes.is_gpu, ledger), ledger:
        with torch.device("meta"):
            batch, loss_fn = _batch(shapes)
            routing = Routing()
            hidden = model(batch.input_ids, batch.position_ids, attend, routing)
            ledger.part, ledger.segment = "logits", "head"
            output = loss_fn(PolicyOutput(hidden=hidden, head=model.head), batch)
            forward = Work(**ledger.work)
            loss = output.loss / shapes.num_tokens + _router_losses(routing, shapes.num_tokens)

        def begin_layers(_: Tensor) -> None:
            ledger.part, ledger.segment = "activations", "last layer"

        hidden.register_hook(begin_layers)
        del hidden, routing, output, batch, loss_fn
        loss.backward()  # type: ignore[no-untyped-call]
        del loss
        after = ledger.held()
    sent = 0 if group is None else group.sent_bytes
    return _Counts(ledger.peaks, after, forward, Work(**ledger.work), sent)


def _score_layers(
    shapes: Shapes, model: Qwen3Moe, attend: PackedSequences, ledger: _Ledger
) -> _Counts:
    """Trace a pass that scores a pack, and then each of its sequences."""
    with kernels_of(shapes.is_gpu, ledger), ledger, torch.device("meta"), torch.no_grad():
        ids = torch.empty(1, shapes.num_tokens, dtype=torch.int64)
        hidden = model(ids, ids, attend)
        ledger.part, ledger.segment = "logits", "head"
        for states in hidden.split(shapes.lengths()):
            targets = torch.empty(len(states), dtype=torch.int64)
            token_logprobs(states, model.head, targets)
    group = model.ep_group
    sent = group.sent_bytes if isinstance(group, PlannedGroup) else 0
    work = Work(**ledger.work)
    return _Counts(ledger.peaks, Held(), work, work, sent)


@compiler_left_out()
def measure(is_gpu: bool, make: Callable[[], object]) -> int:
    """Bytes that a call on the meta device holds at most, beside what was there before."""
    ledger = _Ledger(None)
    with kernels_of(is_gpu, ledger), ledger, torch.device("meta"), torch.no_grad():
        made = make()
    del made
    return max((held.total for held in ledger.peaks.values()), default=0)


def _enter_segment_behind(layer: nn.Module, ledger: _Ledger, segment: str) -> None:
    """Begin a segment when backward has passed a layer."""

    def enter(_: Tensor) -> None:
        ledger.segment = segment

    def watch(_: nn.Module, args: tuple[Any, ...]) -> None:
        args[0].register_hook(enter)

    layer.register_forward_pre_hook(watch)


def _watch_gradient(parameter: Tensor, ledger: _Ledger, keeping: GradientKeeping) -> None:
    def arrived(owner: Tensor) -> None:
        assert owner.grad is not None
        ledger.is_gradient(owner.grad)
        if keeping is GradientKeeping.buffer:
            owner.grad = None

    parameter.register_post_accumulate_grad_hook(arrived)  # type: ignore[no-untyped-call]


@cache
def _layout(lengths: tuple[int, ...]) -> PackedSequences:
    """Lay sequences out, and leave the numbers on the meta device."""
    positions = torch.cat([torch.arange(length) for length in lengths])
    return PackedSequences(positions[None]).to(torch.device("meta"))


def _router_losses(routing: Routing, num_tokens: int) -> Tensor | float:
    """Both losses of the routers, as `engine/routing.py` adds them to an update's."""
    if routing.is_empty:
        return 0.0
    balance = balance_loss(routing.load, routing.probability, num_tokens)
    return balance + router_z_loss(routing.squared_logsumexp, num_tokens)


def _batch(shapes: Shapes) -> tuple[Microbatch, LossFn]:
    """A microbatch without values, and the loss of it."""
    T = shapes.num_tokens
    joined: dict[str, Any] = {
        "input_ids": torch.empty(1, T, dtype=torch.int64),
        "position_ids": torch.empty(1, T, dtype=torch.int64),
        "targets": torch.empty(T, dtype=torch.int64),
        "loss_places": torch.empty(T, dtype=torch.int64),  # all of them
        "num_tokens": T,
        "num_loss_tokens": T,
        "groups": (),
        "group_ids": torch.empty(T, 0, dtype=torch.int64),
        "routed_experts": torch.empty(0, dtype=torch.int64),
    }
    if shapes.objective is None:
        return Microbatch(**joined), cross_entropy
    joined["sampler_logprobs"] = torch.empty(T)
    match shapes.objective:
        case Objective.sampled:
            sampled = SampledMicrobatch(**joined, teacher_logprobs=torch.empty(T))
            return sampled, cast(LossFn, SampledReverseKL(2.0, None))
        case Objective.topk:
            topk = TopKMicrobatch(
                **joined,
                topk_ids=torch.empty(T, shapes.top_k, dtype=torch.int64),
                teacher_topk_logprobs=torch.empty(T, shapes.top_k),
                topk_overlap=torch.empty(T),
            )
            return topk, cast(LossFn, TopKReverseKL())
        case Objective.full:
            dtype = torch_dtype(shapes.dtype)
            full = FullMicrobatch(
                **joined, teacher_hidden=torch.empty(T, shapes.teacher_width, dtype=dtype)
            )
            # The teacher's own head is counted with the teacher.
            head = torch.empty(shapes.shape().vocab_size, shapes.teacher_width, dtype=dtype)
            return full, cast(LossFn, FullReverseKL(head))
