"""The real server of vLLM as a teacher."""

import json
import os
import signal
import socket
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path

import httpx
import pytest
import torch

from marco_train.config.model import DType
from marco_train.config.opd import Objective, TopKSource
from marco_train.config.servers import TeacherServersConfig
from marco_train.config.teacher import TeacherBackend
from marco_train.errors import InputError, ServersUnavailable
from marco_train.inference.pool import nothing_to_save
from marco_train.models.agreement import same_answer
from marco_train.models.hf_io import save_model
from marco_train.models.weights import random_model
from marco_train.teachers.preflight import check_scores, probe_rollouts
from marco_train.teachers.vllm_server import ServerTeacher
from tests.helpers.models import architecture
from tests.helpers.processes import REPOSITORY
from tests.helpers.rollouts import rollouts
from tests.helpers.teachers import hf_teacher, teacher_config, wanted_of
from tests.helpers.world import World

pytestmark = [pytest.mark.vllm, pytest.mark.long]

SERVE = REPOSITORY / "recipes" / "serve_teacher.sh"
FLOAT32 = same_answer(DType.float32, num_layers=2)
START_SECONDS = 240
# What would change every score, if a request left a field to the server.
ADVERSE = {"temperature": 0.3, "top_k": 1, "top_p": 0.1, "repetition_penalty": 3.0, "max_tokens": 9}


class RealServer:
    """A process group of vLLM's server."""

    def __init__(self, model: Path, log: Path) -> None:
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            port = free.getsockname()[1]
        self.url = f"http://127.0.0.1:{port}"
        command = [
            *(str(SERVE), str(model), "--dtype", "float32", "--enforce-eager"),
            *("--max-model-len", "256", "--max-num-batched-tokens", "4096"),
            *("--kv-cache-memory-bytes", str(64 << 20)),
            # The adverse fields: a server that somebody else started would let them in.
            *("--generation-config", "auto"),
        ]
        with log.open("w") as output:
            self._process = subprocess.Popen(
                command,
                stdout=output,
                stderr=subprocess.STDOUT,
                start_new_session=True,
                env=os.environ | {"VLLM_CPU_OMP_THREADS_BIND": "nobind", "PORT": str(port)},
            )
        deadline = time.monotonic() + START_SECONDS
        while not self._is_up():
            assert self._process.poll() is None, log.read_text()[-3000:]
            assert time.monotonic() < deadline, log.read_text()[-3000:]
            time.sleep(0.5)

    def _is_up(self) -> bool:
        try:
            return httpx.get(f"{self.url}/v1/models", trust_env=False).status_code == 200
        except httpx.TransportError:
            return False

    def kill(self) -> None:
        """End it with its workers, which would outlive it."""
        if self._process.poll() is None:
            os.killpg(self._process.pid, signal.SIGKILL)
            self._process.wait()


@pytest.fixture(scope="module")
def model(world: World, tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("served") / "model"
    shape = random_model(architecture(head_dim=32), torch.float32, seed=0)
    save_model(shape, path, world.path("data", "tokenizer"))
    file = path / "generation_config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | ADVERSE))
    return path


@pytest.fixture(scope="module")
def server(model: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[RealServer]:
    found = RealServer(model, tmp_path_factory.mktemp("log") / "server.log")
    yield found
    found.kill()


def open_teacher(
    server: RealServer, model: Path, *kind: object, give_up_after_seconds: float = 60.0
) -> ServerTeacher:
    servers = TeacherServersConfig(
        urls=[server.url],
        max_requests=4,
        request_timeout_seconds=60.0,
        save_after_seconds=1.0,
        give_up_after_seconds=give_up_after_seconds,
        max_rejected=0.0,
    )
    cfg = teacher_config(str(model), TeacherBackend.vllm_server, servers=servers)
    return ServerTeacher(cfg, wanted_of(*kind), nothing_to_save)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    "kind", [(Objective.sampled,), (Objective.topk, 5, TopKSource.teacher)], ids=["sampled", "topk"]
)
def test_the_scores_are_those_of_transformers(
    kind: tuple[object, ...], server: RealServer, model: Path
) -> None:
    asked = rollouts()
    teacher = open_teacher(server, model, *kind)
    wanted = wanted_of(*kind)  # type: ignore[arg-type]
    reference = hf_teacher(model, wanted)
    for found, expected in zip(teacher.score(asked), reference.score(asked), strict=True):
        assert found.rollout is expected.rollout
        for one, other in zip(
            vars(found.scores).values(), vars(expected.scores).values(), strict=True
        ):
            torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-4)
    check_scores(teacher, probe_rollouts(str(model), wanted), 320, FLOAT32, "teacher")
    counts = teacher.take_counts()
    assert counts.pop("milliseconds") > 0 and not counts
    teacher.close()


def test_what_it_cannot_do_on_a_cpu_is_said(server: RealServer, model: Path) -> None:
    with pytest.raises(InputError, match=r"given token ids .*V2.* set stage.top_k_source=teacher"):
        open_teacher(server, model, Objective.topk, 5, TopKSource.sampler)


def test_a_killed_server_is_away_and_nothing_is_trained(server: RealServer, model: Path) -> None:
    teacher = open_teacher(server, model, Objective.sampled, give_up_after_seconds=2.0)
    assert len(teacher.score(rollouts())) == 5
    server.kill()
    with pytest.raises(ServersUnavailable, match=r"ConnectError|RemoteProtocolError|ReadError"):
        teacher.score(rollouts())
