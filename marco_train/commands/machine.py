"""The doctor's checks of the machine: card and driver, ports, room in memory, vLLM."""

import os
import socket
import subprocess
import sys
from pathlib import Path

import torch

from marco_train.commands.env import said
from marco_train.commands.examination import Examination
from marco_train.config import TrainConfig
from marco_train.config.evaluate import EvaluateConfig
from marco_train.config.opd import OPDConfig
from marco_train.config.rollout import SamplerBackend
from marco_train.config.teacher import TeacherBackend
from marco_train.distributed import world_size
from marco_train.errors import InputError, require
from marco_train.planning.check import CPU
from marco_train.planning.memory import GIB, Memory
from marco_train.planning.seconds import Assumptions
from marco_train.planning.shapes import student_shape
from marco_train.teachers.cascade import teachers_of


def check_machine(cfg: TrainConfig, checks: Examination) -> None:
    """Check what a run needs of its machine beside files."""
    checks.make("card and driver", check_driver)
    checks.make("port", check_port)
    if wants_vllm(cfg):
        checks.make("vLLM's import", check_vllm_import)
    if isinstance(cfg.stage, EvaluateConfig):
        return  # it trains nothing
    try:
        memory = Memory(cfg, student_shape(cfg), world_size(), CPU, Assumptions().imbalance)
    except InputError:
        return  # of the student's files, and said with them
    if not torch.cuda.is_available():  # with one the plan compares
        ranks = int(os.environ.get("LOCAL_WORLD_SIZE", "1"))
        checks.make("memory", check_memory, ranks * (memory.weights + 12 * memory.partition))


def check_driver() -> None:
    """Refuse a GPU that the driver tells of and torch does not see.

    Raises:
        InputError: Says what torch is built for.
    """
    listed = said("nvidia-smi", "--query-gpu=driver_version,name", "--format=csv,noheader")
    hidden = os.environ.get("CUDA_VISIBLE_DEVICES") in {"", "-1"}
    if not listed or hidden or torch.cuda.is_available():
        return
    build = f"CUDA {torch.version.cuda}" if torch.version.cuda else "CPUs"
    raise InputError(
        f"the driver tells of {len(listed.splitlines())} GPUs ({listed.splitlines()[0]}), and "
        f"torch, which is built for {build}, sees none: install a build for what the driver "
        "supports (nvidia-smi says which CUDA), or set CUDA_VISIBLE_DEVICES= to run on the CPU"
    )


def check_port() -> None:
    """Refuse a port for the ranks to meet at that something else holds.

    Raises:
        InputError: Names it.
    """
    port = os.environ.get("MASTER_PORT")
    if port is None or "RANK" in os.environ:
        return  # torchrun holds it by now, or a single node takes a free one
    with socket.socket() as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind(("", int(port)))
        except (OSError, ValueError, OverflowError) as error:
            raise InputError(
                f"MASTER_PORT is {port}, and ranks cannot meet there ({error}): choose another"
            ) from error


def wants_vllm(cfg: TrainConfig) -> bool:
    """Whether an engine of vLLM is to be opened in this process."""
    samples = getattr(cfg.stage, "rollout", None)
    wanted = samples is not None and samples.backend is SamplerBackend.vllm
    teachers = dict(teachers_of(cfg.stage)) if isinstance(cfg.stage, OPDConfig) else {}
    if isinstance(cfg.stage, EvaluateConfig):
        teachers = cfg.stage.teachers
    return wanted or any(t.backend is TeacherBackend.vllm for t in teachers.values())


def check_vllm_import() -> None:
    """Import vLLM in a process of its own, as its import changes the one that it is made in.

    Raises:
        InputError: It is not installed, or says why it cannot be imported.
    """
    done = subprocess.run(
        [sys.executable, "-c", "import vllm"], capture_output=True, text=True, check=False
    )
    lines = done.stderr.strip().splitlines() or [f"exit status {done.returncode}"]
    require(
        done.returncode == 0,
        f"vLLM cannot be imported here ({lines[-1]}): install it for this torch and driver with "
        "pip install 'marco-train[vllm]', or choose native, which samples without it",
    )


def check_memory(num_bytes: int) -> None:
    """Refuse a machine without GPUs whose memory does not hold weights, masters and moments.

    Raises:
        InputError: Gives what is needed and what is free.
    """
    lines = Path("/proc/meminfo").read_text().splitlines()
    found = [int(line.split()[1]) * 1024 for line in lines if line.startswith("MemAvailable")]
    require(
        not found or num_bytes <= found[0],
        f"weights, masters and moments of the student take {num_bytes / GIB:.2f} GiB here, and "
        f"{found[0] / GIB if found else 0:.2f} are free: take a smaller model, or GPUs (marco-train"
        " plan says which)",
    )
