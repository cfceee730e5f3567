"""What ranks tell each other is data, whatever it is, and never code."""

import json
import math
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
import torch

from marco_train.config.resume import ResumeChange
from marco_train.data.tokens import LostRows
from marco_train.encoding import from_bytes, to_bytes
from marco_train.interruption import Wish
from marco_train.types import Prompt

VALUES: list[Any] = [
    None,
    True,
    [1, -0.0, 1e-300, "ü\udc80"],
    (1, ("a", [2])),
    {"a", "b"},
    {("math", "en"): 1, 3: {"!": "set", "of": []}},
    Counter({("math", True): 2}),
    Path("/somewhere/else"),
    Wish.end_for_time,
    ResumeChange.data,
    LostRows(Counter(a=1), {3: "why"}, {"a": Counter(en=1)}),
    Prompt(3, [1, 2], "math", "", "en"),
]


@pytest.mark.parametrize("value", VALUES, ids=lambda value: type(value).__name__)
def test_a_value_comes_back_as_it_was(value: Any) -> None:
    found = from_bytes(to_bytes(value))
    assert found == value and type(found) is type(value)


@pytest.mark.parametrize(
    "tensor",
    [
        torch.tensor([[1.5, math.inf], [math.nan, -0.0]]),
        torch.arange(6).view(2, 3).T,  # not contiguous
        torch.tensor([1.1], dtype=torch.bfloat16),
        torch.tensor(True),
        torch.zeros(0, 4, dtype=torch.int16),
    ],
)
def test_a_tensor_comes_back_bit_for_bit(tensor: torch.Tensor) -> None:
    found = from_bytes(to_bytes({"of": tensor}))["of"]
    assert found.dtype == tensor.dtype
    assert torch.equal(found.nan_to_num(7), tensor.nan_to_num(7))


class Stranger:
    """No data of this package."""

    def __reduce__(self) -> tuple[Any, ...]:
        raise AssertionError("it was pickled")


@pytest.mark.parametrize("value", [Stranger(), [Stranger()], print, Stranger, b"bytes", 1j])
def test_what_is_no_data_is_not_sent(value: Any) -> None:
    with pytest.raises(TypeError, match="is no data that ranks can tell each other"):
        to_bytes(value)


@pytest.mark.parametrize(
    ("kind", "name"),
    [
        ("dataclass", "subprocess:Popen"),
        ("dataclass", "marco_train.train:Path"),
        ("dataclass", "marco_train.not_imported:Row"),
        ("dataclass", "marco_train.encoding:sys"),
        ("enum", "marco_train.data.tokens:LostRows"),
        ("enum", "builtins:print"),
    ],
)
def test_a_class_of_another_package_is_not_made(kind: str, name: str) -> None:
    written = json.dumps({"!": kind, "of": [name, [["args", "true"]]]}).encode()
    with pytest.raises(TypeError, match="is no dataclass or enum of marco_train"):
        from_bytes(written)
