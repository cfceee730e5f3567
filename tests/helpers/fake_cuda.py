"""CUDA's code paths without a GPU: tensors that know shape, type and device, and hold no numbers.

torch's fake tensors refuse what a GPU would: a mix of types or devices, strides that its grouped
products do not take. What the host reads off the device would stop them; `HostValues` answers where
it follows from integers that are known, as positions, masks and replayed experts are.
"""

import multiprocessing
import os
import pickle
import subprocess
import tempfile
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from multiprocessing.connection import Connection
from pathlib import Path
from shutil import which
from typing import Any
from unittest import mock

import pytest
import torch
import torch.distributed as dist
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode, unset_fake_temporarily
from torch.testing._internal.distributed.fake_pg import FakeStore
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map_only

SOURCE = Path(__file__).with_name("no_gpu.cpp")
aten, c10d = torch.ops.aten, torch.ops.c10d
HOPPER, BLACKWELL = (9, 0), (10, 0)
# What the host reads of numbers that are not known.
NOT_KNOWN = float("nan")
SIZED_BY_VALUES = {aten.nonzero.default, aten.repeat_interleave.Tensor}
PRODUCTS = {aten.mm.default, aten.mm.dtype, aten.addmm.default, aten.bmm.default}
INDEXED = {
    *(aten.index.Tensor, aten.index_put.default, aten.index_put_.default),
    aten._index_put_impl_.default,
}


class HostValues(TorchDispatchMode):
    """Keeps a twin on the CPU of each integer tensor that follows from others with twins.

    Every other rank of a group is taken to send what this one does. `calls` lists the operations,
    and `waits` those for which the host would wait for the GPU.
    """

    def __init__(self) -> None:
        super().__init__()
        self.calls: list[Any] = []
        self.waits: list[Any] = []

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        """Run an operation on the fakes, and on the twins where all are known."""
        self.calls.append(func)
        args, kwargs = tree_map_only(Tensor, _as_fake, (args, kwargs or {}))
        if _waits(func, args, kwargs):
            self.waits.append(func)
        if func is aten._local_scalar_dense.default:
            return _on_host(func, *args) if _is_integer(args[0]) else NOT_KNOWN
        if func in SIZED_BY_VALUES:
            return _fake_of(_on_host(func, *args, **kwargs), args[0].device)
        if func in PRODUCTS:
            # A kernel refuses what the function of shapes and types lets pass.
            kinds = {fake.dtype for fake in _fakes(args)}
            if len(kinds) > 1:
                raise RuntimeError(f"a product of two types: {kinds}")
        if func in INDEXED:
            args = (args[0], [place for index in args[1] for place in _places(index)], *args[2:])
        out = func(*args, **kwargs)
        if func is c10d.alltoall_base_.default:
            _exchange(*args[:5])
            return out
        given = _fakes((args, kwargs))
        made = _fakes(out)
        if not all(hasattr(fake, "twin") for fake in given):
            _forget_what_is_written(func, args)
        elif any(_is_integer(fake) for fake in made):
            for fake, twin in zip(made, _tensors(_on_host(func, *args, **kwargs)), strict=True):
                fake.twin = twin
        return out


def _waits(func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> bool:
    """Whether an operation gives the host numbers of the GPU, or a size that depends on some."""
    if not any(fake.device.type == "cuda" for fake in _fakes(args)):
        return False
    if func is aten._to_copy.default:
        return str(kwargs.get("device")) == "cpu" and not kwargs.get("non_blocking")
    if func in INDEXED:
        return any(index is not None and index.dtype == torch.bool for index in args[1])
    sized = func in SIZED_BY_VALUES and kwargs.get("output_size") is None
    return sized or func is aten._local_scalar_dense.default


def _is_integer(tensor: Tensor) -> bool:
    return not tensor.is_floating_point()


def _tensors(tree: Any) -> list[Any]:
    return [leaf for leaf in tree_leaves(tree) if isinstance(leaf, Tensor)]


def _fakes(tree: Any) -> list[Any]:
    return [leaf for leaf in tree_leaves(tree) if isinstance(leaf, FakeTensor)]


def _as_fake(tensor: Tensor) -> Tensor:
    return tensor if isinstance(tensor, FakeTensor) else _fake_of(tensor, tensor.device)


def _fake_of(values: Tensor, device: torch.device) -> Tensor:
    """A fake tensor like `values`, which it keeps if they are integers."""
    fake = torch.empty(values.shape, dtype=values.dtype, device=device)
    if _is_integer(values):
        fake.twin = values  # type: ignore[attr-defined]
    return fake


def _twin(fake: Any) -> Tensor:
    assert hasattr(fake, "twin"), f"the host reads {fake}, which only a device could know"
    twin: Tensor = fake.twin
    return twin


def _on_host(func: Any, *args: Any, **kwargs: Any) -> Any:
    """Call an operation on the twins."""
    tree = tree_map_only(FakeTensor, _twin, (args, kwargs))
    twins, named = tree_map_only(torch.device, lambda _: torch.device("cpu"), tree)
    with unset_fake_temporarily():
        return func(*twins, **named)


def _places(index: Tensor | None) -> list[Tensor | None]:
    """A mask as the places that it holds; any other index as it is."""
    if index is None or index.dtype != torch.bool:
        return [index]
    places = _on_host(aten.nonzero.default, index)
    return [_fake_of(place, index.device) for place in _on_host(torch.unbind, places, 1)]


def _forget_what_is_written(func: Any, args: tuple[Any, ...]) -> None:
    for argument, value in zip(func._schema.arguments, args, strict=False):
        is_written = argument.alias_info is not None and argument.alias_info.is_write
        if is_written and hasattr(value, "twin"):
            del value.twin


def _exchange(out: Any, sent: Any, group: Any, *sizes: list[int]) -> None:
    """Have every rank send what this one sends, as far as it is known."""
    if hasattr(sent, "twin"):
        assert not any(sizes), "sizes of integers are even"
        ranks = dist.ProcessGroup.unbox(group)
        with unset_fake_temporarily():
            out.twin = torch.cat([sent.twin.chunk(ranks.size())[ranks.rank()]] * ranks.size())


@contextmanager
def fake_cuda(capability: tuple[int, int] = HOPPER) -> Iterator[HostValues]:
    """Make every tensor a fake one, and have the package find a GPU of this capability."""
    cuda: dict[str, Any] = {
        "is_available": lambda: True,
        "get_device_capability": lambda device=None: capability,
    }
    with (
        FakeTensorMode(),  # first: it has to see that there is none
        HostValues() as values,
        mock.patch.multiple(torch.cuda, **cuda),
        mock.patch.object(torch, "compile", lambda chain, **_: chain),
    ):
        yield values


@contextmanager
def fake_group(rank: int, num_ranks: int) -> Iterator[dist.ProcessGroup]:
    """Be one of several ranks, the others of which do not exist."""
    dist.init_process_group("fake", store=FakeStore(), rank=rank, world_size=num_ranks)
    try:
        assert dist.group.WORLD is not None
        yield dist.group.WORLD
    finally:
        dist.destroy_process_group()


class FakeGPU:
    """A process of its own in which autograd takes fake tensors to be on a GPU."""

    def __init__(self) -> None:
        self._directory = tempfile.TemporaryDirectory()
        context = multiprocessing.get_context("spawn")
        self._pipe, there = context.Pipe()
        self._process = context.Process(target=_serve, args=(there,))
        with mock.patch.dict(os.environ, self._environment(Path(self._directory.name))):
            self._process.start()
        there.close()

    @staticmethod
    def _environment(directory: Path) -> dict[str, str]:
        if torch.version.cuda is not None:
            return {}
        if which("g++") is None:
            pytest.skip("needs g++, or a build of torch for CUDA")
        library, root = directory / "no_gpu.so", Path(torch.__file__).parent
        command = ["g++", "-std=c++20", "-shared", "-fPIC", f"-I{root / 'include'}"]
        command += [str(SOURCE), "-o", str(library), f"-L{root / 'lib'}", "-lc10", "-ltorch_cpu"]
        subprocess.run([*command, f"-Wl,-rpath,{root / 'lib'}"], check=True)
        # torch asks for it once, while it is imported.
        return {"LD_PRELOAD": str(library)}

    def call(self, function: Callable[..., Any], *args: Any) -> Any:
        """Call a module's function there and return what it gave.

        Raises:
            AssertionError: It failed; holds its traceback.
        """
        self._pipe.send_bytes(pickle.dumps((function, args)))
        ok, value = pickle.loads(self._pipe.recv_bytes())
        assert ok, value
        return value

    def close(self) -> None:
        """End the process."""
        with suppress(OSError):  # it died with the last call
            self._pipe.send_bytes(b"")
        self._process.join()
        self._directory.cleanup()


def _serve(pipe: Connection) -> None:
    while asked := pipe.recv_bytes():
        function, args = pickle.loads(asked)
        try:
            outcome = (True, function(*args))
        except BaseException:
            outcome = (False, traceback.format_exc())
        pipe.send_bytes(pickle.dumps(outcome))
    os._exit(0)
