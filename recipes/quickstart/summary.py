"""Table, plot and summary.json of a finished quickstart: `summary.py --root outputs/quickstart`."""

import argparse
import json
import sys
from pathlib import Path
from typing import Any

CATEGORIES = ["instruction_following", "knowledge_reasoning", "alignment", "math", "multilingual"]
SHORT = dict(
    zip(
        [*CATEGORIES, "all"],
        ["if", "knowledge", "alignment", "math", "multiling.", "all"],
        strict=True,
    )
)
TITLES = {
    "sft": "SFT",
    "opd_first": "OPD, first teacher",
    "opd_second": "OPD, second teacher",
    "control_sft": "control: SFT continued",
    "control_first": "control: first teacher only",
    "control_second": "control: second teacher only",
    "first": "first teacher",
    "second": "second teacher",
}
MAIN_JOB = ["data", "base", "teacher_first", "teacher_second", "student", "sft", "opd", "evaluate"]
BESIDE, MEANWHILE = "teacher_second", ["base", "teacher_first"]  # at the same time
CONTROLS = ["control_sft", "control_first", "control_second", "evaluate_controls"]


def main() -> None:
    """Read what the stages wrote, and write and print what it comes to."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--root", type=Path, required=True, help="directory of the quickstart")
    root: Path = parser.parse_args().root
    evaluation = read_json(root / "evaluate" / "evaluation.json")
    controls = root / "evaluate_controls" / "evaluation.json"
    models = evaluation["models"]
    if controls.is_file():
        models = models | read_json(controls)["models"]
    summary = summarize(root, models, evaluation["teachers"])
    text = json.dumps(summary, indent=2)
    (root / "summary.json").write_text(text + "\n", encoding="utf-8")
    draw(root, summary)
    print(table(summary))
    print(answers(evaluation["answers"]))
    spent = summary["wall_seconds"]
    print("seconds: " + ", ".join(f"{name} {value:.0f}" for name, value in spent.items()))
    print(f"written: {root / 'summary.json'}, {root / 'summary.png'}; model: {summary['export']}")


def read_json(path: Path) -> dict[str, Any]:
    """Read a file that an earlier stage must have written."""
    if not path.is_file():
        sys.exit(f"error: {path} does not exist; run recipes/quickstart/run.sh first")
    content: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
    return content


def summarize(root: Path, models: dict[str, Any], teachers: dict[str, Any]) -> dict[str, Any]:
    """Put together summary.json: accuracies in per cent, KL in nats a token, times in seconds.

    A time is of the launch that finished a stage, start-up included; the total is the main job's,
    in which what ran at the same time counts once.
    """
    seconds = {
        name: float((root / "seconds" / name).read_text())
        for name in [*MAIN_JOB, *CONTROLS]
        if (root / "seconds" / name).is_file()
    }
    total = sum(spent for name, spent in seconds.items() if name in MAIN_JOB)
    total -= min(seconds.get(BESIDE, 0), sum(seconds.get(name, 0) for name in MEANWHILE))
    config = read_json(root / "opd" / "finished.json")["config"]
    return {
        "seed": config["seed"],
        "wall_seconds": seconds | {"total": round(total, 1)},
        "models": {
            name: {"avg_at_8": m["avg_at_n"], "reverse_kl": m["reverse_kl"]}
            for name, m in models.items()
        },
        "teachers": {name: {"avg_at_8": t["avg_at_n"]} for name, t in teachers.items()},
        "export": str(root / "opd" / "export"),
    }


def table(summary: dict[str, Any]) -> str:
    """Stage by category: avg@8 in per cent; reverse KL to each teacher in nats a token."""
    head = f"{'avg@8, %':30}" + "".join(f"{SHORT[c]:>11}" for c in [*CATEGORIES, "all"])
    lines = ["", head + f"{'KL first':>10}{'KL second':>11}"]
    for name, found in (summary["models"] | summary["teachers"]).items():
        scores = [found["avg_at_8"].get(category) for category in [*CATEGORIES, "all"]]
        cells = "".join(f"{'-' if s is None else f'{s:.1f}':>11}" for s in scores)
        kl = found.get("reverse_kl", {})
        kls = "".join(
            f"{f'{kl[teacher]:.3f}' if teacher in kl else '':>{width}}"
            for teacher, width in (("first", 10), ("second", 11))
        )
        lines.append(f"{TITLES[name]:30}{cells}{kls}")
    return "\n".join(lines)


def answers(by_model: dict[str, list[dict[str, Any]]]) -> str:
    """The same prompts, answered before and after distillation."""
    lines = ["", "sample answers (temperature 1, + accepted, - not):"]
    for before, after in zip(by_model["sft"], by_model["opd_second"], strict=True):
        lines.append(f"  [{before['category']}, {before['language']}] {before['prompt']!r}")
        lines.append(f"    expected  {before['reference']!r}")
        for label, answer in (("SFT", before), ("OPD", after)):
            mark = "+" if answer["accepted"] else "-"
            lines.append(f"    {label:8}{mark} {answer['answer']!r}")
    return "\n".join([*lines, ""])


def draw(root: Path, summary: dict[str, Any]) -> None:
    """Plot accuracy by category and KL by stage."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    models, teachers = summary["models"], summary["teachers"]
    figure, (left, right) = plt.subplots(
        1, 2, figsize=(13, 4.6), width_ratios=[2.2, 1], layout="constrained"
    )
    names = [*CATEGORIES, "all"]
    shown = {**models, **teachers}
    width = 0.85 / len(shown)
    stage_colors = plt.colormaps["viridis"]
    for place, (name, found) in enumerate(shown.items()):
        color = "0.75" if name == "first" else "0.5" if name == "second" else None
        left.bar(
            [x + (place - len(shown) / 2 + 0.5) * width for x in range(len(names))],
            [found["avg_at_8"].get(category, 0.0) for category in names],
            width,
            label=TITLES[name],
            color=color or stage_colors(0.9 * place / max(1, len(models) - 1)),
        )
    left.set_xticks(range(len(names)), [SHORT[c] for c in names])
    left.set_ylabel("avg@8 on the test split, %")
    left.set_title("Share of sampled answers accepted, temperature 1")
    left.legend(fontsize=8, ncols=4, loc="upper center", bbox_to_anchor=(0.5, -0.08))
    left.set_axisbelow(True)
    left.grid(axis="y", alpha=0.3)
    for teacher, marker in (("first", "o"), ("second", "s")):
        values = [m["reverse_kl"][teacher] for m in models.values()]
        right.plot(range(len(models)), values, marker, label=f"to the {TITLES[teacher]}", ms=8)
    right.set_xticks(
        range(len(models)),
        [TITLES[m].replace(", ", ",\n").replace(": ", ":\n") for m in models],
        fontsize=8,
        rotation=0 if len(models) < 4 else 45,
    )
    right.set_xlim(-0.5, len(models) - 0.5)
    right.set_ylim(bottom=0)
    right.set_ylabel("reverse KL, nats a token")
    right.set_title("Distance to the teachers")
    right.legend(fontsize=8)
    right.grid(alpha=0.3)
    figure.savefig(root / "summary.png", dpi=130)


if __name__ == "__main__":
    main()
