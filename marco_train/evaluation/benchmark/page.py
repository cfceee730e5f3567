"""The report of a benchmark as one HTML page that needs nothing else."""

from html import escape
from typing import Any

from marco_train.config.benchmark import FIXTURE, card_rows, reported
from marco_train.evaluation.html import Markup, Section, table
from marco_train.evaluation.html import page as html_page

LEFT, WIDTH, ROW = 170, 760, 22  # of a plot, in its own units


def page(found: dict[str, Any], details: dict[str, Any], *, with_published: bool) -> str:
    """Render a report.

    Args:
        found: What benchmark.json holds.
        details: What details.json holds.
        with_published: Whether the items are those that the published figures are of.
    """
    title = f"{found['model']}, suite {found['suite']}"
    card = {row.name: row for row in card_rows().values()}
    models = list(next(iter(card.values())).published) if with_published else []
    made_up = found["suite"] == FIXTURE
    said = ["The items are made up: scores say nothing of the model."] if made_up else []
    said += [
        f"{name}: its verifier failed on {more['verifier_errors']} answers, which count as wrong, "
        f"as {more['first_verifier_errors'][0]}"
        for name, more in details.items()
        if more["verifier_errors"]
    ]
    said += [f"{name}: {more['left_out']}" for name, more in details.items() if more["left_out"]]
    parts = []
    for section, names in reported(found["rows"]).items():
        rows = {name: found["rows"][name] for name in names if name in found["rows"]}
        if not rows:
            continue
        mean = f"mean {found['means'][section]:.1f} over {len(rows)} of {len(names)} rows"
        dots = _dots(rows, {name: card[name].published for name in rows} if models else {})
        lines = [
            [
                name,
                row["metric"],
                f"{row['score']:.1f}",
                "{:.1f} to {:.1f}".format(*row["ci95"]),
                f"{row['std']:.2f}",
                f"{details[name]['mean_tokens'] or 0:.0f}",
                f"{100 * row['extraction_failures']:.1f} %",
                f"{100 * row['truncated']:.1f} %",
                *(f"{card[name].published[model]:.1f}" for model in models),
            ]
            for name, row in rows.items()
        ]
        head = ["row", "metric", "ours", "95 %", "std", "tokens", "no answer", "cut", *models]
        parts.append(Section(f"{section.capitalize()}: {mean}", [dots, table(head, lines)]))
    codes = sorted({code for row in found["rows"].values() for code in row["languages"]})
    shown = {name: row for name, row in found["rows"].items() if len(row["languages"]) > 1}
    if shown:
        cells = [
            [name, *(f"{row['languages'][c]:.1f}" if c in row["languages"] else "" for c in codes)]
            for name, row in shown.items()
        ]
        parts.append(Section("By language", [table(["row", *codes], cells)]))
    return html_page(title, said, parts)


def _dots(rows: dict[str, Any], published: dict[str, dict[str, float]]) -> Markup:
    """A row a line: ours as a dot with its interval, the published ones as rings."""
    marks = []
    for number, (name, row) in enumerate(rows.items()):
        y = ROW * (number + 1)
        low, high = row["ci95"]
        marks += [
            f'<text x="{LEFT - 10}" y="{y + 4}" text-anchor="end">{escape(name)}</text>',
            f'<line x1="{LEFT}" x2="{LEFT + WIDTH}" y1="{y}" y2="{y}" stroke="#8883"/>',
            f'<line x1="{_x(low)}" x2="{_x(high)}" y1="{y}" y2="{y}" stroke="#c33" '
            'stroke-width="3"/>',
            *(
                f'<circle cx="{_x(score)}" cy="{y}" r="4" fill="none" stroke="#47a">'
                f"<title>{escape(model)} {score}</title></circle>"
                for model, score in published.get(name, {}).items()
            ),
            f'<circle cx="{_x(row["score"])}" cy="{y}" r="5" fill="#c33">'
            f"<title>ours {row['score']:.1f}</title></circle>",
        ]
    height = ROW * (len(rows) + 2)
    ticks = [
        f'<text x="{_x(tick)}" y="{height - 8}" text-anchor="middle">{tick}</text>'
        for tick in range(0, 101, 20)
    ]
    box = f"0 0 {LEFT + WIDTH + 40} {height}"
    drawn = f'<g font-size="12" fill="currentColor">{"".join(marks + ticks)}</g>'
    return Markup(f'<svg viewBox="{box}" role="img" width="100%">{drawn}</svg>')


def _x(score: float) -> float:
    return round(LEFT + WIDTH * score / 100, 1)
