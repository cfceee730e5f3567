"""A model of the hub is a directory of huggingface_hub's cache, by its commit, on every rank."""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from marco_train.commands.plan import answer
from marco_train.config.compose import compose
from marco_train.errors import InputError
from marco_train.hub import INDEX, fetch, hub_ids, is_hub_id, missing_files
from tests.helpers.processes import REPOSITORY
from tests.helpers.rows import chat, write
from tests.helpers.world import World

COMMITS = ("1" * 40, "2" * 40)


def put(cache: Path, name: str, model: str, commit: str = COMMITS[0], branch: str = "main") -> Path:
    """Lay a model out as huggingface_hub does: blobs, links to them, what a branch stands at."""
    folder = cache / "hub" / f"models--{name.replace('/', '--')}"
    snapshot = folder / "snapshots" / commit
    snapshot.mkdir(parents=True)
    (folder / "blobs").mkdir(exist_ok=True)
    (folder / "refs").mkdir(exist_ok=True)
    (folder / "refs" / branch).write_text(commit)
    for file in Path(model).iterdir():
        blob = folder / "blobs" / f"{commit[0]}-{file.name}"
        shutil.copy(file, blob)
        (snapshot / file.name).symlink_to(os.path.relpath(blob, snapshot))
    return snapshot


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty cache, of this process and of those that it starts; nothing is asked of the hub."""
    from huggingface_hub import constants

    found = tmp_path / "hf"
    (found / "hub").mkdir(parents=True)
    monkeypatch.setenv("HF_HOME", str(found))
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(found / "hub"))
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    return found


def test_a_directory_comes_before_a_model_of_the_hub(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    assert is_hub_id("org/name") and is_hub_id("org/name@refs/pr/3")
    for path in ("name", "/org/name", "./org/name", "a/b/c", "org/name@", "../name", None):
        assert not is_hub_id(path)
    (tmp_path / "org" / "name").mkdir(parents=True)
    assert not is_hub_id("org/name")
    assert is_hub_id("org/name@main")


def test_a_revision_is_resolved_to_its_commit(cache: Path, world: World) -> None:
    old = put(cache, "org/student", world.path("sft", "export"), COMMITS[0], "v1")
    new = put(cache, "org/student", world.path("sft", "export"), COMMITS[1])
    assert fetch("org/student") == new
    assert fetch("org/student@v1") == fetch(f"org/student@{COMMITS[0]}") == old


def test_what_is_not_here_is_named_with_the_command_that_fetches_it(
    cache: Path, world: World
) -> None:
    with pytest.raises(InputError) as refused:
        fetch("org/nothing@v2")
    said = str(refused.value)
    assert "there is no directory 'org/nothing@v2', and the hub's org/nothing is not in the" in said
    assert "HF_HUB_OFFLINE" in said and "`hf download org/nothing --revision v2`" in said
    snapshot = put(cache, "org/student", world.path("sft", "export"))
    (snapshot / "model.safetensors").unlink()
    with pytest.raises(InputError, match=r"without model.safetensors: run `hf download org/stud"):
        fetch("org/student")
    assert fetch("org/student", weights=False) == snapshot
    shards = {"a": "model-1.safetensors", "b": "model-2.safetensors"}
    (snapshot / INDEX).write_text(json.dumps({"weight_map": shards}))
    (snapshot / "model-1.safetensors").write_text("")
    assert missing_files(snapshot, weights=True) == ["model-2.safetensors"]


def test_every_field_of_a_model_is_found(tmp_path: Path) -> None:
    words = ["experiment=opd", "model.path=org/student@v1", "teacher.path=org/teacher", "data=own"]
    found = hub_ids(compose([*words, "data.path=rows.jsonl"]))
    assert {field: each.hub_id for field, each in found.items()} == {
        "model.path": "org/student@v1",
        "model.tokenizer": "org/student@v1",
        "teacher.path": "org/teacher",
        "stage.cascade.own.teacher.path": "org/teacher",
    }
    assert not found["model.tokenizer"].weights and found["teacher.path"].weights
    served = hub_ids(compose([*words, "teacher=vllm_server"]))
    assert not served["stage.cascade.own.teacher.path"].weights


def test_a_plan_reads_the_shape_from_the_cache(cache: Path, world: World) -> None:
    put(cache, "org/student", world.path("sft", "export"))
    words = ["experiment=sft", "model.path=org/student", "data=own", "data.path=rows.jsonl"]
    fits, said = answer([*words, "gpus=1"])
    assert fits and "1 x h100-80" in said
    with pytest.raises(InputError, match="the shape of 'org/other' is not known"):
        answer([*words, "model.path=org/other"])


def launched(*words: str, num_ranks: int = 1) -> subprocess.CompletedProcess[str]:
    torchrun = ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node", str(num_ranks)]
    return subprocess.run(
        [sys.executable, *(torchrun if num_ranks > 1 else []), "-m", "marco_train.train", *words],
        capture_output=True,
        text=True,
        check=False,
        cwd=REPOSITORY,
        env=os.environ | {"PYTHONPATH": str(REPOSITORY)},
    )


@pytest.mark.slow
@pytest.mark.long
def test_a_run_by_ids_notes_commits_and_refuses_another(
    cache: Path, world: World, tmp_path: Path
) -> None:
    student = put(cache, "org/student", world.path("sft", "export"))
    put(cache, "org/teacher", world.path("teacher_second", "export"))
    rows = write(tmp_path, *(json.dumps(chat(f"question {n}")) for n in range(6)))
    words = [
        *("experiment=opd", "model.path=org/student", "teacher.path=org/teacher@main"),
        *("data=own", f"data.path={rows}", f"output_dir={tmp_path / 'run'}"),
        *("model.dtype=float32", "stage.max_response_length=8", "checkpoint.save_every=1"),
        *("stage.cascade.own.num_epochs=2", "stage.global_batch_size=6"),
    ]
    done = launched(*words, num_ranks=2)
    assert done.returncode == 0, done.stderr
    run = tmp_path / "run"
    config = json.loads((run / "config.json").read_text())
    assert config["model"]["path"] == config["model"]["tokenizer"] == str(student)
    assert config["hub"] == {
        "model.path": f"org/student@{COMMITS[0]}",
        "model.tokenizer": f"org/student@{COMMITS[0]}",
        "teacher.path": f"org/teacher@{COMMITS[0]}",
        "stage.cascade.own.teacher.path": f"org/teacher@{COMMITS[0]}",
    }
    assert len(config["digests"]["model.path"]) == 64
    state = json.loads((run / "checkpoints" / "step_000002" / "state.json").read_text())
    assert state["config"]["hub"] == config["hub"]
    assert state["content"]["model.path"]["digest"] == config["digests"]["model.path"]

    # The branch moves on, to other weights.
    put(cache, "org/student", world.path("student"), COMMITS[1])
    longer = launched(*words, "stage.cascade.own.num_epochs=3")
    assert longer.returncode == 1
    assert f"model: model.path: {student} -> {student.with_name(COMMITS[1])}" in longer.stderr
    assert "on_resume.allow=[data,model] goes on" in longer.stderr
    pinned = f"model.path=org/student@{COMMITS[0]}"
    pinned_run = launched(*words, "stage.cascade.own.num_epochs=3", pinned, num_ranks=2)
    assert pinned_run.returncode == 0, pinned_run.stderr


@pytest.mark.slow
def test_a_model_that_is_nowhere_is_said_once(cache: Path, tmp_path: Path) -> None:
    words = ["experiment=sft", "model.path=org/none", "data=own", "data.path=rows.jsonl"]
    done = launched(*words, num_ranks=2)
    assert done.returncode == 1
    refusal = "error: there is no directory 'org/none'"
    said, _, report = done.stderr.partition("\n====")
    assert said.count(refusal) == 1
    assert report.count(refusal) == 1 and refusal in report.rstrip("=\n").splitlines()[-1]
