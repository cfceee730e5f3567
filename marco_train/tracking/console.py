"""What a person reads of a run while it goes on."""

import sys

from tqdm import tqdm

from marco_train.config.secrets import redacted
from marco_train.metrics import Metrics


def log_line(text: str) -> None:
    """Print one line without secrets, past a progress bar if there is one."""
    tqdm.write(redacted(text), file=sys.stdout)
    sys.stdout.flush()


def step_line(step: int, until: int, phase: str | None, metrics: Metrics, eta: float) -> str:
    """Format one step for a reader."""
    parts = [f"step {step}/{until}"]
    if phase is not None:
        parts.append(f"phase {phase}")
    for label, name, form in (
        ("loss", "loss/cross_entropy", ".3f"),
        ("held-out", "eval/cross_entropy", ".3f"),
        ("kl", "kl/reverse", ".3f"),
        ("held-out kl", "eval/reverse_kl", ".3f"),
        ("score", "eval/score", ".1f"),
        ("grad", "optim/grad_norm", ".2f"),
        ("lr", "optim/lr", ".1e"),
        ("length", "rollout/response_length", ".1f"),
    ):
        if name in metrics:
            parts.append(f"{label} {metrics[name]:{form}}")
    if "perf/tokens_per_second" in metrics:
        parts.append(f"{metrics['perf/tokens_per_second'] / 1e3:.1f}k tok/s")
    timers = [
        f"{name} {format_seconds(metrics[f'time/{name}'])}"
        for name in ("sync", "sample", "score", "train")
        if f"time/{name}" in metrics
    ]
    if timers:
        parts.append(" ".join(timers))
    parts.append(f"eta {format_eta(eta)}")
    return " | ".join(parts)


def format_seconds(seconds: float) -> str:
    """Milliseconds below one second."""
    return f"{seconds * 1e3:.0f}ms" if seconds < 1 else f"{seconds:.1f}s"


def format_eta(seconds: float) -> str:
    """Hours, minutes and seconds without leading zeros."""
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    if hours:
        return f"{hours}h{minutes:02d}m"
    return f"{minutes}m{rest:02d}s" if minutes else f"{rest}s"
