"""How the tensors of a checkpoint are written by ranks, and found again by ranges."""

import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor
from xxhash import xxh3_128_hexdigest

from marco_train.checkpoint import KINDS, Piece, Snapshot, StoredState, TrainingState
from marco_train.checkpoint.shards import build_index, refuse_other_shapes, write_shard
from marco_train.errors import InputError

SHAPE = (3, 4)


def piece(start: int, values: list[float], name: str = "w") -> Piece:
    """Masters as they are given, moments ten and a hundred times as large."""
    master = torch.tensor(values)
    tensors = dict(zip(KINDS, (master, 10 * master, 100 * master), strict=True))
    return Piece(name, "bfloat16", SHAPE, start, tensors)


def empty(start: int, stop: int) -> Piece:
    return Piece(
        "w", "bfloat16", SHAPE, start, {k: torch.full((stop - start,), -1.0) for k in KINDS}
    )


def save(path: Path, *of_ranks: list[Piece]) -> list[dict[str, object]]:
    path.mkdir()
    generators = {"generator.torch": torch.arange(5, dtype=torch.uint8)}
    shards = [
        write_shard(path, rank, TrainingState(pieces, 7), generators)
        for rank, pieces in enumerate(of_ranks)
    ]
    (path / "index.json").write_text(json.dumps(build_index(shards)))
    return shards


@pytest.fixture
def stored(tmp_path: Path) -> StoredState:
    """Elements 0 to 11 on three ranks, of which the last has the first ones."""
    parts = [5.0, 6.0], [7.0, 8.0, 9.0, 10.0, 11.0], [0.0, 1.0, 2.0, 3.0, 4.0]
    starts = (5, 7, 0)
    pieces = ([piece(start, values)] for start, values in zip(starts, parts, strict=True))
    save(tmp_path / "step", *pieces)
    return StoredState(tmp_path / "step")


@pytest.mark.parametrize(("start", "stop"), [(0, 12), (5, 7), (6, 7), (4, 8), (3, 12), (11, 12)])
def test_any_range_is_read_from_all_pieces_that_hold_some(
    start: int, stop: int, stored: StoredState
) -> None:
    wanted = empty(start, stop)
    stored.fill(wanted)
    expected = torch.arange(start, stop, dtype=torch.float32)
    for kind, factor in zip(KINDS, (1, 10, 100), strict=True):
        assert torch.equal(wanted.tensors[kind], factor * expected), kind
    assert stored.optimizer_steps == 7


def test_a_weight_is_its_masters_in_its_type(tmp_path: Path) -> None:
    values = [1 + 2**-9, *(float(n) for n in range(1, 12))]
    save(tmp_path / "step", [piece(0, values)])
    found = StoredState(tmp_path / "step").weight("w")
    assert found.dtype == torch.bfloat16 and found.shape == SHAPE
    assert found.flatten().tolist() == [1.0, *range(1, 12)]


def test_the_files_are_those_that_safetensors_reads_with_the_digest_that_is_told(
    tmp_path: Path,
) -> None:
    pieces = [piece(0, [1.0] * 12, "a"), piece(0, [2.0] * 12, "b")]
    (shard,) = save(tmp_path / "step", pieces)
    content = (tmp_path / "step" / "rank_000.safetensors").read_bytes()
    assert shard["bytes"] == len(content) and shard["digest"] == xxh3_128_hexdigest(content)
    found = load_file(tmp_path / "step" / "rank_000.safetensors")
    expected: dict[str, Tensor] = {
        f"{kind}.{p.parameter}": p.tensors[kind] for p in pieces for kind in KINDS
    } | {"generator.torch": torch.arange(5, dtype=torch.uint8)}
    assert found.keys() == expected.keys()
    for name, tensor in expected.items():
        assert torch.equal(found[name], tensor), name


@pytest.mark.parametrize(
    ("starts", "says"),
    [
        ([0, 7], "begins at 7, and 6 is expected"),
        ([0, 5], "begins at 5, and 6 is expected"),
        ([1, 7], "begins at 1, and 0 is expected"),
        ([0], "the pieces end at 6 of 12 elements"),
    ],
)
def test_pieces_that_leave_elements_out_or_hold_them_twice_are_no_checkpoint(
    starts: list[int], says: str, tmp_path: Path
) -> None:
    shards = save(tmp_path / "good", [piece(0, [0.0] * 6)], [piece(6, [0.0] * 6)])
    for shard, start in zip(shards, starts, strict=False):
        shard["pieces"] = [["w", "bfloat16", [3, 4], start, start + 6]]
    with pytest.raises(AssertionError, match=says):
        build_index(shards[: len(starts)])
    index = json.loads((tmp_path / "good" / "index.json").read_text())
    index["parameters"]["w"]["pieces"] = [
        {"file": "rank_000.safetensors", "start": start, "stop": start + 6} for start in starts
    ]
    (tmp_path / "good" / "index.json").write_text(json.dumps(index))
    with pytest.raises(InputError, match=rf"index.json is damaged: w: .*{says}"):
        StoredState(tmp_path / "good")


def test_a_checkpoint_of_another_model_is_refused(stored: StoredState, tmp_path: Path) -> None:
    path = tmp_path / "step"
    refuse_other_shapes(path, stored, TrainingState([empty(0, 3)], 0))
    other = Piece("w", "bfloat16", (4, 4), 0, empty(0, 3).tensors)
    with pytest.raises(InputError, match=r"w is \[3, 4\] there and \[4, 4\] here"):
        refuse_other_shapes(path, stored, TrainingState([other], 0))
    other = Piece("v", "bfloat16", SHAPE, 0, empty(0, 3).tensors)
    with pytest.raises(InputError, match=r"v is absent there and \[3, 4\] here"):
        refuse_other_shapes(path, stored, TrainingState([other], 0))
    many = [replace(other, parameter=f"v{number}") for number in range(12)]
    with pytest.raises(InputError) as refused:
        refuse_other_shapes(path, stored, TrainingState(many, 0))
    said = str(refused.value)
    assert [f"v{number} is absent" in said for number in range(12)] == [True] * 10 + [False] * 2
    assert "; and 2 more differ; bring back" in said


def test_a_rank_has_its_generators_and_a_new_one_none(stored: StoredState) -> None:
    assert stored.generators(2)["generator.torch"].tolist() == [0, 1, 2, 3, 4]
    assert stored.generators(3) == {}


def test_a_snapshot_stays_as_it_was_taken_and_is_taken_again_in_the_same_memory() -> None:
    live = TrainingState([piece(0, [1.0, 2.0]), piece(4, [3.0], "v")], 5)
    snapshot = Snapshot(live)
    first = [tensor for p in snapshot.state.pieces for tensor in p.tensors.values()]
    for each in live.pieces:
        for tensor in each.tensors.values():
            tensor.zero_()
    assert snapshot.state.pieces[0].tensors["exp_avg_sq"].tolist() == [100.0, 200.0]
    assert snapshot.state.pieces[1].tensors["master"].tolist() == [3.0]
    assert (snapshot.state.pieces[1].parameter, snapshot.state.pieces[1].start) == ("v", 4)
    snapshot.fill(live.pieces[1])
    assert live.pieces[1].tensors["exp_avg"].tolist() == [30.0]
    snapshot.take(TrainingState(live.pieces, 6))
    again = [tensor for p in snapshot.state.pieces for tensor in p.tensors.values()]
    assert [t.data_ptr() for t in again] == [t.data_ptr() for t in first]
    assert snapshot.state.pieces[0].tensors["master"].tolist() == [0.0, 0.0]
    assert snapshot.optimizer_steps == 6
