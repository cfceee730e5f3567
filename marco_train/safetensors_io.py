"""Safetensors files by their bytes: a tensor is read into its place, and written from it.

A file is eight bytes with the length of a JSON header, the header with each tensor's type, shape
and byte range, and the tensors (huggingface.co/docs/safetensors). Reading by range costs no memory
beyond the target, and several processes can write one file.
"""

import json
import math
import os
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, TypeGuard

import torch
from torch import Tensor
from xxhash import xxh3_128

from marco_train.errors import InputError
from marco_train.files import CHUNK_BYTES

DTYPES = {"F32": torch.float32, "BF16": torch.bfloat16, "F16": torch.float16}
"""Types that weights may be stored in."""
ALL_DTYPES = {**DTYPES, "U8": torch.uint8}
"""Types that are read and written, by their names in the format."""
BITS = {
    **dict.fromkeys(("F4",), 4),
    **dict.fromkeys(("F6_E2M3", "F6_E3M2"), 6),
    **dict.fromkeys(("BOOL", "U8", "I8", "F8_E5M2", "F8_E4M3", "F8_E8M0"), 8),
    **dict.fromkeys(("F8_E4M3FNUZ", "F8_E5M2FNUZ"), 8),
    **dict.fromkeys(("U16", "I16", "F16", "BF16"), 16),
    **dict.fromkeys(("U32", "I32", "F32"), 32),
    **dict.fromkeys(("U64", "I64", "F64", "C64"), 64),
}
"""Of one number, by the type's name in the format (safetensors 0.8.0)."""
LENGTH_BYTES = 8
LFS_POINTER = b"version https://git-lfs"


@dataclass(frozen=True)
class StoredTensor:
    """Where a tensor lies."""

    file: Path
    dtype: str  # safetensors' name of it
    shape: tuple[int, ...]
    offset: int  # of its first byte in the file

    @property
    def num_bytes(self) -> int:
        """Size in the file."""
        return math.prod(self.shape) * ALL_DTYPES[self.dtype].itemsize

    def part(self, index: int, num_parts: int) -> "StoredTensor":
        """One of equal parts along the first dimension."""
        assert self.shape[0] % num_parts == 0
        shape = (self.shape[0] // num_parts, *self.shape[1:])
        found = replace(self, shape=shape)
        return replace(found, offset=self.offset + index * found.num_bytes)

    def elements(self, start: int, stop: int) -> "StoredTensor":
        """A range of the flattened tensor."""
        assert 0 <= start <= stop <= math.prod(self.shape)
        offset = self.offset + start * ALL_DTYPES[self.dtype].itemsize
        return replace(self, shape=(stop - start,), offset=offset)

    def without_first_dimension(self) -> "StoredTensor":
        """[1, ...] as [...]."""
        assert self.shape[0] == 1
        return replace(self, shape=self.shape[1:])


def read_header(file: Path) -> dict[str, StoredTensor]:
    """List the tensors of a file, which lie one after the other and fill it.

    Raises:
        InputError: It is cut short, no safetensors file, or its header contradicts itself.
    """
    size = file.stat().st_size
    with file.open("rb") as content:
        first = content.read(LENGTH_BYTES)
        length = int.from_bytes(first, "little")
        try:
            header = json.loads(content.read(length)) if length <= size else None
        except ValueError:
            header = None
    if first == LFS_POINTER[:LENGTH_BYTES]:
        raise InputError(f"{file} points to a file of Git LFS that is not here: run git lfs pull")
    if not isinstance(header, dict):
        raise InputError(f"{file} ({size} bytes) is no safetensors file, or was cut short")
    header.pop("__metadata__", None)
    start = LENGTH_BYTES + length
    tensors = {name: _stored(file, start, name, entry) for name, entry in header.items()}
    end = start + max((entry["data_offsets"][1] for entry in header.values()), default=0)
    if size != end:
        raise InputError(
            f"{file} has {size} bytes where its header promises {end}: it was cut short or "
            "overwritten; fetch it again"
        )
    end, before = 0, "the header"
    for name, entry in sorted(header.items(), key=lambda item: item[1]["data_offsets"]):
        if entry["data_offsets"][0] != end:
            raise InputError(
                f"{file}: {name} begins at byte {entry['data_offsets'][0]}, and {before} before "
                f"it ends at {end}: its header is wrong; fetch it again"
            )
        end, before = entry["data_offsets"][1], name
    return tensors


def _stored(file: Path, start: int, name: str, entry: Any) -> StoredTensor:
    """Make a tensor of its entry in the header, whose parts have to agree."""
    fields: dict[str, Any] = entry if isinstance(entry, dict) else {}
    dtype, shape, offsets = fields.get("dtype"), fields.get("shape"), fields.get("data_offsets")
    if not isinstance(dtype, str) or not _are_sizes(shape) or not _are_sizes(offsets):
        raise InputError(f"{file}: the header's entry of {name} is broken; fetch it again")
    if len(offsets) != 2 or offsets[0] > offsets[1]:
        raise InputError(f"{file}: {name} is said to lie at {offsets}; fetch it again")
    num_bytes = offsets[1] - offsets[0]
    if dtype in BITS and 8 * num_bytes != math.prod(shape) * BITS[dtype]:
        raise InputError(
            f"{file}: {name} is {dtype} {shape} by its header, and has {num_bytes} bytes: the "
            "header is wrong; fetch it again"
        )
    return StoredTensor(file, dtype, tuple(shape), start + offsets[0])


def _are_sizes(value: Any) -> TypeGuard[list[int]]:
    return isinstance(value, list) and all(
        isinstance(each, int) and not isinstance(each, bool) and each >= 0 for each in value
    )


def read_into(stored: StoredTensor, target: Tensor) -> None:
    """Read a tensor to its place, converting its type where they differ."""
    same = target.dtype == ALL_DTYPES[stored.dtype] and target.device.type == "cpu"
    place = target if same else torch.empty(stored.shape, dtype=ALL_DTYPES[stored.dtype])
    view = _bytes(place)
    with stored.file.open("rb", buffering=0) as content:
        content.seek(stored.offset)
        done = 0
        while done < len(view):  # a system call returns 2 GiB at most
            count = content.readinto(view[done:])
            assert count, f"{stored.file} ended while it was read"
            done += count
    if not same:
        target.copy_(place)


def _bytes(tensor: Tensor) -> memoryview:
    """The memory of a contiguous tensor."""
    assert tensor.is_contiguous()
    return memoryview(tensor.view(-1).view(torch.uint8).numpy())  # type: ignore[arg-type]


def read(stored: StoredTensor) -> Tensor:
    """Read a tensor in the type it is stored in."""
    target = torch.empty(stored.shape, dtype=ALL_DTYPES[stored.dtype])
    read_into(stored, target)
    return target


class Header:
    """The first bytes of a file of tensors that lie one after the other."""

    def __init__(self, tensors: Mapping[str, tuple[torch.dtype, tuple[int, ...]]]) -> None:
        """Lay out tensors of these types and shapes, in their order."""
        codes = {known: code for code, known in ALL_DTYPES.items()}
        header: dict[str, object] = {"__metadata__": {"format": "pt"}}
        end = 0
        starts = {}
        for name, (dtype, shape) in tensors.items():
            starts[name] = end
            end += math.prod(shape) * dtype.itemsize
            offsets = [starts[name], end]
            header[name] = {"dtype": codes[dtype], "shape": shape, "data_offsets": offsets}
        text = json.dumps(header, separators=(",", ":")).encode()
        text += b" " * (-len(text) % 8)  # the tensors begin at a multiple of 8
        self.content = len(text).to_bytes(LENGTH_BYTES, "little") + text
        self.offsets = {name: len(self.content) + offset for name, offset in starts.items()}
        self.file_bytes = len(self.content) + end


def write_tensors(file: Path, tensors: Mapping[str, Tensor]) -> str:
    """Write a file of tensors, of which one at a time is copied where it is not on the host.

    Returns:
        The digest of the file, as `files.digest_of` finds it.
    """
    header = Header({name: (t.dtype, tuple(t.shape)) for name, t in tensors.items()})
    digest = xxh3_128()
    with file.open("wb", buffering=0) as content:

        def write(view: memoryview) -> None:
            for start in range(0, len(view), CHUNK_BYTES):
                chunk = view[start : start + CHUNK_BYTES]
                digest.update(chunk)
                while len(chunk):
                    chunk = chunk[content.write(chunk) :]

        write(memoryview(header.content))
        for tensor in tensors.values():
            write(_bytes(tensor.detach().cpu().contiguous()))
    return digest.hexdigest()


class ShardFile:
    """A file of known tensors that processes fill in any order, each writing its own."""

    def __init__(self, file: Path, dtype: torch.dtype, shapes: Mapping[str, tuple[int, ...]]):
        self._file = file
        self._dtype = dtype
        self._shapes = dict(shapes)
        self._header = Header({name: (dtype, shape) for name, shape in shapes.items()})

    def create(self) -> None:
        """Write the header and reserve the rest; one process does, before any writes."""
        with self._file.open("wb") as content:
            content.write(self._header.content)
            content.truncate(self._header.file_bytes)

    def write(self, name: str, tensor: Tensor) -> None:
        """Write one tensor; only it is copied, where it is on a GPU or has strides."""
        shape = self._shapes[name]
        assert tensor.dtype == self._dtype and tuple(tensor.shape) == shape, (name, tensor.shape)
        place = tensor.detach().cpu().contiguous()
        view = _bytes(place)
        with self._file.open("r+b", buffering=0) as content:
            content.seek(self._header.offsets[name])
            done = 0
            while done < len(view):
                done += content.write(view[done:])

    def sync(self) -> None:
        """Wait until what was written is on the disk."""
        with self._file.open("r+b") as content:
            os.fsync(content.fileno())
