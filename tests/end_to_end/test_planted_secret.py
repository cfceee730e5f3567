"""No file that a run writes, and no line that it prints, holds a key or a password it was given."""

import socket
from pathlib import Path

import pytest

from tests.helpers.fake_server import fake_servers
from tests.helpers.processes import launch
from tests.helpers.world import World

pytestmark = pytest.mark.slow

KEY, PASSWORD, TYPED = "planted-key-9f3a", "planted-password", "planted-and-typed"


def overrides(world: World, out: Path, *ports: int) -> list[str]:
    """Of a run whose first server has a key, and whose last one a password."""
    urls = [f"http://127.0.0.1:{port}" for port in ports[:-1]]
    urls += [f"'http://me:${{oc.env:PLANTED_PASSWORD}}@127.0.0.1:{ports[-1]}'"]
    servers = "stage.cascade.first.teacher.servers"
    return [
        "experiment=quickstart_opd",
        f"root={world.root}",
        f"output_dir={out}",
        "teacher@stage.cascade.first.teacher=vllm_server",
        f"{servers}.urls=[{','.join(urls)}]",
        "stage.cascade.first.teacher.dtype=float32",
        "stage.cascade.first.num_steps=2",
        "stage.cascade.second.num_steps=1",
        "stage.objective=sampled",
        "stage.global_batch_size=4",
        "stage.max_response_length=6",
        "checkpoint.save_every=1",
        "logging=wandb",
        "export.card=true",
        "parallel.expert_parallel_size=1",
    ]


def holders(directory: Path) -> list[str]:
    """Files that hold a secret."""
    planted = [secret.encode() for secret in (KEY, PASSWORD, TYPED)]
    files = [file for file in directory.rglob("*") if file.is_file()]
    assert len(files) > 3
    return [str(f) for f in files if any(secret in f.read_bytes() for secret in planted)]


@pytest.mark.long
def test_a_run_and_its_resumption_write_and_say_no_secret(
    world: World, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("VLLM_API_KEY", KEY)
    monkeypatch.setenv("PLANTED_PASSWORD", PASSWORD)
    with fake_servers(2) as servers:
        given = overrides(world, tmp_path, *(int(s.url.rpartition(":")[2]) for s in servers))
        done = launch(*given)
        assert done.returncode == 0, done.stderr
        assert servers[0].keys == {f"Bearer {KEY}"}
        monkeypatch.setenv("VLLM_API_KEY", TYPED)  # another key learns the same
        more = launch(*given, "stage.cascade.second.num_steps=2")
        assert more.returncode == 0 and "resumed from" in more.stdout, more.stderr
    assert holders(tmp_path) == []
    for secret in (KEY, PASSWORD, TYPED):
        assert secret not in done.stdout + done.stderr + more.stdout + more.stderr
    assert (tmp_path / "export" / "README.md").is_file()
    assert list(tmp_path.glob("wandb/offline-run-*/run-*.wandb"))


def test_an_error_names_the_server_and_no_password(
    world: World, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PLANTED_PASSWORD", PASSWORD)
    with socket.socket() as closed:
        closed.bind(("127.0.0.1", 0))
        port = closed.getsockname()[1]
        servers = "stage.cascade.first.teacher.servers"
        given = f"{servers}.save_after_seconds=0.5", f"{servers}.give_up_after_seconds=1"
        done = launch(*overrides(world, tmp_path, port), *given, f"{servers}.api_key={TYPED}")
    assert done.returncode == 75, done.stderr
    said = f"the teacher's servers http://<redacted>@127.0.0.1:{port}"
    assert said in done.stderr
    assert said in (tmp_path / "exit_status.json").read_text()
    assert holders(tmp_path) == [] and PASSWORD not in done.stdout + done.stderr
