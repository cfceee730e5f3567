"""A run's directory as a stranger's run leaves it: many groups, hostile texts, any script."""

import json
import math
from pathlib import Path
from typing import Any

HOSTILE = '<script>alert("x")</script>&\x00\ud800'
ARABIC = "مرحبا بالعالم"
LANGUAGES = [f"l{n:02d}" for n in range(28)] + ["ar"]
CATEGORIES = ["math", "alignment", "multilingual", HOSTILE.replace("/", "%2F")]


def line_of(step: int, num_steps: int) -> dict[str, Any]:
    """Metrics of a step of distillation, in two phases."""
    kl = 1.0 / (1 + step % (num_steps // 2 + 1))
    line: dict[str, Any] = {
        "step": step,
        "kl/reverse": kl,
        "loss/entropy": 1.5,
        "optim/lr": 1e-3,
        "optim/grad_norm": math.nan if step == 7 else 1.0 + step % 3,
        "rollout/response_length": 20.0 + step % 5,
        "rollout/truncated": 0.1,
        "moe/dead_experts": 2.0,
        "moe/max_violation": 1.0,
        "data/dropped_too_long": float(step % 2),
        "cascade/phase": int(step > num_steps // 2),
        "perf/tokens_per_second": 8e3,
        "memory/peak_gib": 0.5,
        "time/sample": 0.04,
        "time/train": 0.02,
        "time/step": 0.07,
    }
    for kind, names in (("category", CATEGORIES), ("language", LANGUAGES)):
        for place, name in enumerate(names):
            line[f"data/share/{kind}_{name}"] = 1 / len(names)
            for metric in ("kl/reverse", "kl/forward", "loss/entropy", "rollout/response_length"):
                line[f"{metric}/{kind}_{name}"] = kl + place
    for layer in range(28):
        line[f"moe/max_violation/layer_{layer}"] = 1.0 + layer
    return line


def sample_of(
    step: int, language: str, prompt: str, tokens: list[str], kl: list[float | None]
) -> dict[str, Any]:
    """A response of a step with each token's KL."""
    return {
        "step": step,
        "source": "math",
        "category": HOSTILE,
        "language": language,
        "prompt": prompt,
        "tokens": tokens,
        "kl": kl,
        "finish_reason": "stop",
    }


def write_run(directory: Path, num_steps: int) -> None:
    """Write what `marco_train` writes of a run of so many steps."""
    directory.mkdir(parents=True)
    cascade = {"first": {"num_steps": 5}, "second <b>": {"num_steps": 5}}
    config = {
        "name": HOSTILE,
        "stage": {"kind": "opd", "cascade": cascade, "rollout": {"urls": ["http://me:pw@host:1"]}},
        "data": {"sources": {"math": {"weight": 0.5}}},
        "long": "x" * 300,
    }
    (directory / "config.json").write_text(json.dumps(config))
    (directory / "header.json").write_text(json.dumps({"num_steps": num_steps, "name": HOSTILE}))
    with (directory / "metrics.jsonl").open("w") as file:
        for step in range(1, num_steps + 1):
            file.write(json.dumps(line_of(step, num_steps)) + "\n")
    samples = [
        sample_of(0, "ar", ARABIC, [ARABIC[:5], ARABIC[5:]], [0.5, -0.25]),
        sample_of(10, "en", HOSTILE, ["long", "_word"] * 400, [1.0, None] * 400),
    ]
    (directory / "samples.jsonl").write_text("".join(json.dumps(s) + "\n" for s in samples))
    warning = {"step": 3, "text": f"{HOSTILE} experts"}
    (directory / "warnings.jsonl").write_text(json.dumps(warning) + "\n")
