"""Values of this package as JSON and back, for what ranks tell each other: data, and never code.

JSON knows no tuples, sets, counters, paths, tensors, enums or dataclasses, and no keys but text:
such a value is written as {"!": kind, "of": parts}. An enum or dataclass is one that a module of
this package, already imported, defines; nothing else is looked up or called.
"""

import base64
import json
import sys
from collections import Counter
from collections.abc import Callable
from dataclasses import fields, is_dataclass
from enum import Enum
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

KIND, PARTS = "!", "of"
PACKAGE = "marco_train"


def to_bytes(value: Any) -> bytes:
    """Write a value down.

    Raises:
        TypeError: It holds something else than data.
    """
    return json.dumps(_plain(value)).encode()


def from_bytes(written: bytes) -> Any:
    """Read what `to_bytes` wrote.

    Raises:
        TypeError: It names a class that is no dataclass or enum of this package.
        LookupError: It is of a kind that is not known.
    """
    return _value(json.loads(written))


def _plain(value: Any) -> Any:
    if value is None or type(value) in {bool, int, float, str}:
        return value
    if type(value) is list:
        return [_plain(item) for item in value]
    kind, parts = _described(value)
    return {KIND: kind, PARTS: parts}


def _described(value: Any) -> tuple[str, Any]:
    """Kind and parts of what JSON does not know."""
    parts: Any
    if isinstance(value, Enum):
        kind, parts = "enum", [_name(type(value)), value.name]
    elif type(value) is tuple:
        kind, parts = "tuple", [_plain(item) for item in value]
    elif type(value) is set:
        kind, parts = "set", [_plain(item) for item in sorted(value)]
    elif type(value) in {dict, Counter}:
        kind = "counter" if type(value) is Counter else "dict"
        parts = [[_plain(key), _plain(item)] for key, item in value.items()]
    elif isinstance(value, Path):
        kind, parts = "path", str(value)
    elif isinstance(value, Tensor):
        host = value.detach().cpu().contiguous()
        content = host.reshape(-1).view(torch.uint8).numpy().tobytes()
        dtype = str(host.dtype).removeprefix("torch.")
        kind, parts = "tensor", [dtype, list(host.shape), base64.b64encode(content).decode()]
    elif is_dataclass(value) and not isinstance(value, type):
        of_fields = [[field.name, _plain(getattr(value, field.name))] for field in fields(value)]
        kind, parts = "dataclass", [_name(type(value)), of_fields]
    else:
        raise TypeError(f"{type(value).__qualname__} is no data that ranks can tell each other")
    return kind, parts


def _value(plain: Any) -> Any:
    if isinstance(plain, list):
        return [_value(item) for item in plain]
    if not isinstance(plain, dict):
        return plain
    return READERS[plain[KIND]](plain[PARTS])


def _tensor(parts: Any) -> Tensor:
    dtype, shape, content = parts
    flat = torch.zeros(0, dtype=torch.uint8)
    if content:  # torch takes no empty buffer
        flat = torch.frombuffer(bytearray(base64.b64decode(content)), dtype=torch.uint8)
    return flat.view(getattr(torch, dtype)).view(shape)


def _dataclass(parts: Any) -> Any:
    name, of_fields = parts
    return _class(name, is_dataclass)(**{field: _value(item) for field, item in of_fields})


READERS: dict[str, Callable[[Any], Any]] = {
    "enum": lambda parts: _class(parts[0], lambda found: issubclass(found, Enum))[parts[1]],
    "tuple": lambda parts: tuple(map(_value, parts)),
    "set": lambda parts: set(map(_value, parts)),
    "dict": lambda parts: {_value(key): _value(item) for key, item in parts},
    "counter": lambda parts: Counter({_value(key): _value(item) for key, item in parts}),
    "path": Path,
    "tensor": _tensor,
    "dataclass": _dataclass,
}


def _name(known: type) -> str:
    if not known.__module__.startswith(f"{PACKAGE}.") or "<" in known.__qualname__:
        raise TypeError(f"{known.__module__}.{known.__qualname__} is no class of {PACKAGE}")
    return f"{known.__module__}:{known.__qualname__}"


def _class(name: str, is_fit: Callable[[type], bool]) -> Any:
    module, _, qualname = name.partition(":")
    found = None
    if module.startswith(f"{PACKAGE}.") and module in sys.modules:
        found = vars(sys.modules[module]).get(qualname)
    if not (isinstance(found, type) and is_fit(found)):
        raise TypeError(f"{name} is no dataclass or enum of {PACKAGE}")
    return found
