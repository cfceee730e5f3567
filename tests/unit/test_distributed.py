"""Ranks, the GPUs of a node, and the memory of a process."""

import resource
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from marco_train import distributed
from marco_train.distributed import check_gpus, peak_bytes
from marco_train.errors import InputError


def test_more_ranks_than_visible_gpus_are_refused() -> None:
    check_gpus(num_ranks=4, num_gpus=4)
    check_gpus(num_ranks=1, num_gpus=8)
    said = "8 ranks were launched on a node where 4 GPUs are visible: launch NPROC=4"
    with pytest.raises(InputError, match=said):
        check_gpus(num_ranks=8, num_gpus=4)


def test_the_peak_of_memory_is_this_processs_own(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    status = tmp_path / "status"
    monkeypatch.setattr(distributed, "STATUS", status)
    # What a process inherits counts for it there: its parent held 3,000 KiB.
    inherited = SimpleNamespace(ru_maxrss=3_000)
    monkeypatch.setattr(resource, "getrusage", lambda of: inherited)
    status.write_text("Name:\tpython\nVmPeak:\t    9000 kB\nVmHWM:\t    2000 kB\nVmRSS:\t 10 kB\n")
    assert peak_bytes() == 2_000 * 1024

    status.unlink()  # another system
    for platform, unit in (("freebsd14", 1024), ("darwin", 1)):
        monkeypatch.setattr(sys, "platform", platform)
        assert peak_bytes() == 3_000 * unit
