"""Lay out a project of runs on W&B: sections and panels as code, saved as a view of the project.

Without `--save` nothing is sent: the view is printed as JSON.
"""

import argparse
import json
import sys
from collections.abc import Mapping, Sequence
from importlib.util import find_spec
from typing import Any

# By section: title and metrics of each panel. What ends with .* is a pattern: a panel with a line
# for each metric that it fits.
SECTIONS: Mapping[str, Mapping[str, Sequence[str]]] = {
    "overview": {
        "loss": ["loss/cross_entropy", "eval/cross_entropy"],
        "reverse KL": ["kl/reverse", "eval/reverse_kl"],
        "seconds a step": ["time/step"],
        "phase of the cascade": ["cascade/phase"],
    },
    "sft": {
        "loss": ["loss/cross_entropy", "eval/cross_entropy"],
        "gradient norm": ["optim/grad_norm"],
        "learning rate": ["optim/lr"],
        "shares of sources": ["data/share/source_.*"],
    },
    "opd": {
        "reverse and forward KL": ["kl/reverse", "kl/forward"],
        "reverse KL by category": ["kl/reverse/category_.*"],
        "reverse KL by language": ["kl/reverse/language_.*"],
        "advantage": ["kl/advantage/.*"],
        "weights above the cap": ["kl/ratio_truncated"],
        "sampler against policy": ["kl/sampler_mismatch"],
        "entropy": ["loss/entropy", "kl/teacher_entropy"],
    },
    "rollout": {
        "length": ["rollout/response_length"],
        "length by category": ["rollout/response_length/category_.*"],
        "length by language": ["rollout/response_length/language_.*"],
        "cut, empty, in a loop": ["rollout/truncated", "rollout/empty", "rollout/repetition"],
        "in the prompt's language": ["rollout/lang_match/language_.*"],
        "updates behind": ["rollout/staleness"],
    },
    "moe": {
        "load": ["moe/max_violation"],
        "load by layer": ["moe/max_violation/layer_.*"],
        "entropy of routers": ["moe/router_entropy"],
        "experts without a token": ["moe/dead_experts"],
        "losses of routers": ["loss/balance", "loss/router_z"],
    },
    "perf": {
        "tokens a second": ["perf/tokens_per_second", "perf/tokens_per_second_per_gpu"],
        "seconds by part": ["time/sync", "time/sample", "time/score", "time/train"],
        "share of the GPUs' peak": ["perf/mfu"],
        "peak memory, GiB": ["memory/peak_gib"],
    },
    "reliability": {
        "rows dropped": ["data/dropped_.*"],
        "teacher's requests again": ["teacher/repeated_requests"],
        "rollouts without a score": ["teacher/rejected"],
        "proved share of a sync": ["rollout/sync_proved"],
    },
    "eval": {
        "held-out loss": ["eval/cross_entropy"],
        "held-out reverse KL": ["eval/reverse_kl"],
        "score of the suite": ["eval/score"],
        "score by task": ["eval/score/task_.*"],
    },
}


DRAWN = {"id", "__id__", "ref"}


def main(arguments: Sequence[str] | None = None) -> int:
    """Read the command line, and print or save the view; ends with 1 where it cannot."""
    parser = argparse.ArgumentParser(prog="wandb_workspace", description=__doc__)
    parser.add_argument("project", help="of the runs, as logging.project")
    parser.add_argument("--entity", default="", help="user or team (your default one)")
    parser.add_argument("--save", action="store_true", help="save the view; needs an account")
    args = parser.parse_args(arguments)
    if find_spec("wandb_workspaces") is None:
        print(
            "error: wandb-workspaces is not installed: pip install 'marco-train[workspaces]'",
            file=sys.stderr,
        )
        return 1
    view = workspace(args.entity, args.project)
    if not args.save:
        print(json.dumps(spec_of(view), indent=2))
        return 0
    try:
        view.save()
    except Exception as error:  # the library lists none
        print(f"error: the view is not saved ({type(error).__name__}: {error})", file=sys.stderr)
        return 1
    print(view.url)
    return 0


def workspace(entity: str, project: str) -> Any:
    """Make the view of a project; nothing is sent."""
    import wandb_workspaces.reports.v2 as reports
    from wandb_workspaces import workspaces

    def panel(title: str, metrics: Sequence[str]) -> Any:
        is_pattern = metrics[0].endswith(".*")
        lines = {"metric_regex": metrics[0]} if is_pattern else {"y": list(metrics)}
        return reports.LinePlot(title=title, x="step", **lines)

    sections = [
        workspaces.Section(
            name=name,
            panels=[panel(title, metrics) for title, metrics in panels.items()],
            is_open=name == "overview",
        )
        for name, panels in SECTIONS.items()
    ]
    samples = reports.WeavePanelSummaryTable(table_name="samples")
    sections.insert(4, workspaces.Section(name="samples", panels=[samples], is_open=False))
    return workspaces.Workspace(
        entity=entity, project=project, name="marco_train", sections=sections
    )


def spec_of(view: Any) -> dict[str, Any]:
    """The view as JSON, without what is not set and the ids that are drawn anew each time."""
    spec: dict[str, Any] = _told(json.loads(view._to_model().model_dump_json()))
    return spec


def _told(value: Any) -> Any:
    if isinstance(value, dict):
        told = {name: item for name, item in value.items() if item is not None}
        return {name: _told(item) for name, item in told.items() if name not in DRAWN}
    return [_told(item) for item in value] if isinstance(value, list) else value
