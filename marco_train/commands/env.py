"""Print what a bug report needs: versions, build, cards; nothing of who runs it or where."""

import argparse
import os
import platform
import subprocess
from collections.abc import Iterator, Sequence
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

PACKAGES = (
    "marco-train",
    "torch",
    "deepspeed",
    "transformers",
    "tokenizers",
    "safetensors",
    "datasets",
    "huggingface-hub",
    "hydra-core",
    "omegaconf",
    "vllm",
    "wandb",
)
# What changes numbers or speed; of anything else, values may be secrets.
VARIABLES = (
    "CUDA_VISIBLE_DEVICES",
    "NCCL_DEBUG",
    "NCCL_P2P_DISABLE",
    "OMP_NUM_THREADS",
    "PYTORCH_ALLOC_CONF",
    "PYTORCH_CUDA_ALLOC_CONF",
    "HF_HUB_OFFLINE",
    "VLLM_BATCH_INVARIANT",
    "WANDB_MODE",
)


def main(words: Sequence[str] | None = None) -> None:
    """Print the block."""
    parser = argparse.ArgumentParser(prog="marco-train env", description=__doc__)
    parser.parse_args(words)
    print("\n".join(f"{name:18} {value}" for name, value in facts()))


def facts() -> Iterator[tuple[str, str]]:
    """What is known of this machine, by name."""
    for name in PACKAGES:
        yield name, _version(name)
    yield "commit", _commit()
    yield "python", platform.python_version()
    yield "system", f"{platform.system()} {platform.release()} {platform.machine()}"
    yield "processor", f"{_processor()}, {os.cpu_count()} threads"
    yield "memory", f"{os.sysconf('SC_PAGE_SIZE') * os.sysconf('SC_PHYS_PAGES') / 2**30:.0f} GiB"
    yield from _torch()
    yield "driver", _driver()
    set_here = [f"{name}={os.environ[name]}" for name in VARIABLES if name in os.environ]
    yield "set", ", ".join(set_here) or "nothing that counts"


def _version(package: str) -> str:
    try:
        return version(package)
    except PackageNotFoundError:
        return "not installed"


def _commit() -> str:
    """Of a checkout; its changes are only said to be there."""
    here = Path(__file__).parent
    sha = said("git", "-C", str(here), "rev-parse", "HEAD")
    if sha is None or said("git", "-C", str(here), "ls-files", "--error-unmatch", __file__) is None:
        return "no checkout"
    changed = said("git", "-C", str(here), "status", "--porcelain", "--untracked-files=no")
    return f"{sha}{' with changes' if changed else ''}"


def _processor() -> str:
    """Its name, where the system says it."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.processor() or "unknown"
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor() or "unknown"


def _torch() -> Iterator[tuple[str, str]]:
    """What torch was built for, and the cards that it sees."""
    try:
        import torch
    except Exception as error:  # whatever a broken installation raises is what the report is about
        yield "torch imports", f"no: {type(error).__name__}"
        return
    build = torch.version.cuda or torch.version.hip
    yield "torch is built for", f"CUDA {build}" if build else "CPUs"
    cards = range(torch.cuda.device_count() if torch.cuda.is_available() else 0)
    for card in cards:
        found = torch.cuda.get_device_properties(card)
        yield f"GPU {card}", f"{found.name}, {found.total_memory / 2**30:.0f} GiB"
    if not cards:
        yield "GPU", "none that torch sees"


def _driver() -> str:
    found = said("nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader")
    return found.splitlines()[0] if found else "none that nvidia-smi tells of"


def said(*command: str) -> str | None:
    """What a program prints. None: there is no such program, or it fails."""
    try:
        done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=20)
    except (OSError, subprocess.TimeoutExpired):
        return None
    return done.stdout.strip() if done.returncode == 0 else None
