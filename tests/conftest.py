"""What every test may ask for."""

import gc
import os
import shutil
from collections.abc import Iterator
from importlib import import_module
from importlib.util import find_spec
from pathlib import Path
from shutil import which

import pytest
import torch

from tests.helpers.ranks import Rank
from tests.helpers.world import World, make_wide_world, make_world

# By marker: whether this machine has what such tests need, and what it is.
NEEDS = {
    "vllm": (find_spec("vllm") is not None, "vLLM"),
    "gpu": (torch.cuda.is_available(), "a GPU"),
    "browser": (which("chromium") is not None, "chromium"),
    "netns": (os.geteuid() == 0 and which("ip") is not None, "root and iproute2"),
}
os.environ["TOKENIZERS_PARALLELISM"] = "false"
torch.set_num_threads(1)
# What a training run imports as it goes. A test forks its ranks, and each would import it anew.
LATE = (
    "deepspeed",
    "marco_train.stages.opd",
    "marco_train.stages.sft",
    "torch._dynamo",
    "torch.fx.experimental.symbolic_shapes",
    "transformers.models.auto.modeling_auto",
    "transformers.models.qwen3.modeling_qwen3",
    "transformers.models.qwen3_moe.modeling_qwen3_moe",
    "transformers.tokenization_utils_tokenizers",
)


def pytest_collection_finish() -> None:
    """Make forks cheap: with all that a run imports, and with nothing to collect again in each."""
    for module in LATE:
        import_module(module)
    gc.freeze()  # DeepSpeed collects garbage ten times as it starts


def pytest_unconfigure() -> None:
    """Let what the interpreter ends with be freed: libraries report what is left."""
    gc.unfreeze()


def pytest_runtest_setup(item: pytest.Item) -> None:
    """Skip a test that needs what this machine does not have."""
    for marker, (is_there, what) in NEEDS.items():
        if not is_there and item.get_closest_marker(marker):
            pytest.skip(f"needs {what}")


@pytest.fixture(scope="session")
def world(tmp_path_factory: pytest.TempPathFactory) -> Iterator[World]:
    made = make_world(tmp_path_factory.mktemp("world"))
    before = stamps(made.root)
    yield made
    assert stamps(made.root) == before, "a test changed the world of all tests; let it copy files"


@pytest.fixture(scope="session", autouse=True)
def cache(tmp_path_factory: pytest.TempPathFactory) -> None:
    """Keep what launches would find again apart from what the machine's user keeps."""
    os.environ["MARCO_TRAIN_CACHE"] = str(tmp_path_factory.mktemp("cache"))


@pytest.fixture(scope="session")
def wide_world(world: World, tmp_path_factory: pytest.TempPathFactory) -> Iterator[World]:
    made = make_wide_world(world, tmp_path_factory.mktemp("wide_world"))
    before = stamps(made.root)
    yield made
    assert stamps(made.root) == before, "a test changed the world of all tests; let it copy files"


@pytest.fixture
def own_world(world: World, tmp_path: Path) -> World:
    """A copy that a test may change."""
    shutil.copytree(world.root, tmp_path / "world")
    return World(tmp_path / "world")


@pytest.fixture(scope="module")
def rank() -> Iterator[Rank]:
    made = Rank()
    yield made
    made.close()


def stamps(directory: Path) -> dict[str, int]:
    """The files in a directory, with the time of the last change of each, in ns."""
    return {str(p): p.stat().st_mtime_ns for p in directory.rglob("*") if p.is_file()}
