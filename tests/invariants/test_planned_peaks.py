"""What a run is planned to hold is what it holds: whole runs on a CPU, each in fresh processes.

In float32: a CPU's library keeps copies of its own for products in bfloat16, which no plan counts.
What DeepSpeed holds in bfloat16 is counted in `test_planned_buffers.py`.
"""

import json
import os
import random
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from marco_train.config.compose import read_run
from marco_train.models.hf_io import save_model
from marco_train.models.weights import random_model
from marco_train.planning.check import CPU
from marco_train.planning.memory import GIB, Memory
from marco_train.planning.plan import STATED_ERROR
from tests.helpers.models import architecture
from tests.helpers.processes import REPOSITORY
from tests.helpers.world import World

pytestmark = pytest.mark.long

LENGTH = 1024
SHAPE = {
    "vocab_size": 50_000,
    "hidden_size": 256,
    "num_hidden_layers": 4,
    "num_attention_heads": 8,
    "num_key_value_heads": 4,
    "head_dim": 32,
    "intermediate_size": 512,
    "num_experts": 16,
    "num_experts_per_tok": 4,
    "moe_intermediate_size": 512,
    "rms_norm_eps": 1e-6,
    "rope_theta": 1e4,
    "max_position_embeddings": 8192,
}
SHARED = ["logging=console", "resume=never", "checkpoint=none", "model.dtype=float32"]
SHARED += ["optim.learning_rate=1e-4"]
# Ranks, tokens of a microbatch, and what else is asked for; each peaks at 1 GiB or more.
SFT = [
    (1, 2048, ["parallel.recompute=none"]),
    (1, 4096, ["parallel.recompute=attention", "parallel.zero_stage=2"]),
    (1, 8192, ["parallel.recompute=layer"]),
    (2, 3072, ["parallel.expert_parallel_size=2", "parallel.recompute=attention"]),
    (2, 2048, ["parallel.expert_parallel_size=2", "parallel.zero_stage=2"]),
]


def rows(file: Path) -> None:
    """Sequences of the full length, all of which is learnt."""
    draw = random.Random(0)
    lines = []
    for _ in range(32):
        ids = [draw.randrange(10, 300) for _ in range(LENGTH)]
        lines.append(json.dumps({"input_ids": ids, "labels": ids}))
    file.write_text("\n".join(lines))


def measured_gib(num_ranks: int, file: Path, overrides: list[str]) -> float:
    """Run it, and give the peak of the rank that has the largest."""
    command = [sys.executable, "-m"]
    if num_ranks > 1:
        command += ["torch.distributed.run", "--standalone", f"--nproc_per_node={num_ranks}", "-m"]
    # Else the C library keeps blocks of freed tensors, up to a third of all that was held.
    environment = os.environ | {"MALLOC_MMAP_THRESHOLD_": "65536", "OMP_NUM_THREADS": "1"}
    subprocess.run(
        [*command, "tests.helpers.peaks", str(file), *overrides],
        check=True,
        cwd=REPOSITORY,
        env={k: v for k, v in environment.items() if k not in {"RANK", "WORLD_SIZE"}},
    )
    return max(int(Path(f"{file}.{rank}").read_text()) for rank in range(num_ranks)) / GIB


def planned_gib(num_ranks: int, overrides: list[str]) -> float:
    """What the plan says of the same run."""
    cfg = read_run(overrides)
    assert cfg.model.architecture is not None
    memory = Memory(cfg, cfg.model.architecture, num_ranks, CPU, imbalance=1.0)
    return max(sum(parts.values()) for parts in memory.phases().values()) / GIB


@pytest.mark.parametrize(("num_ranks", "num_tokens", "changes"), SFT)
def test_sft_holds_what_was_planned(
    num_ranks: int, num_tokens: int, changes: list[str], world: World, tmp_path: Path
) -> None:
    rows(tmp_path / "rows.jsonl")
    overrides = [
        "stage=sft",
        "model=marco_mini",
        "model.path=null",
        f"model.tokenizer={world.path('data', 'tokenizer')}",
        *(f"model.architecture.{name}={value}" for name, value in SHAPE.items()),
        "+source@data.sources.long=files",
        f"data.sources.long.path={tmp_path / 'rows.jsonl'}",
        f"data.max_tokens_per_microbatch={num_tokens}",
        "stage.num_steps=2",
        f"stage.global_batch_size={num_ranks * num_tokens // LENGTH}",
        f"stage.max_length={LENGTH}",
        "stage.loss_tokens=all",
        f"output_dir={tmp_path / 'run'}",
        *SHARED,
        *changes,
    ]
    measured = measured_gib(num_ranks, tmp_path / "peak", overrides)
    assert measured >= 1
    assert planned_gib(num_ranks, overrides) == pytest.approx(measured, rel=STATED_ERROR)


def test_distillation_beside_a_resident_teacher_holds_what_was_planned(
    world: World, tmp_path: Path
) -> None:
    teacher = architecture(**SHAPE | {"num_experts": 32})
    save_model(
        random_model(teacher, torch.float32, seed=1),
        tmp_path / "teacher",
        world.path("data", "tokenizer"),
    )
    prompts = [{"messages": [{"role": "user", "content": f"one two {n}?"}]} for n in range(64)]
    (tmp_path / "rows.jsonl").write_text("\n".join(map(json.dumps, prompts)))
    overrides = [
        "stage=opd",
        "model=marco_mini",
        "model.path=null",
        f"model.tokenizer={world.path('data', 'tokenizer')}",
        *(f"model.architecture.{name}={value}" for name, value in SHAPE.items()),
        "+source@data.sources.asked=files",
        f"data.sources.asked.path={tmp_path / 'rows.jsonl'}",
        "data.max_tokens_per_microbatch=1024",
        "stage.objective=sampled",
        "stage.global_batch_size=8",
        "stage.responses_per_prompt=2",
        "stage.max_prompt_length=64",
        "stage.max_response_length=64",
        "+teacher@stage.cascade.only.teacher=native",
        f"stage.cascade.only.teacher.path={tmp_path / 'teacher'}",
        "stage.cascade.only.teacher.dtype=float32",
        "stage.cascade.only.teacher.expert_parallel_size=1",
        "stage.cascade.only.num_steps=2",
        f"output_dir={tmp_path / 'run'}",
        *SHARED,
    ]
    measured = measured_gib(1, tmp_path / "peak", overrides)
    assert measured >= 1
    assert planned_gib(1, overrides) == pytest.approx(measured, rel=STATED_ERROR)
