"""Pages that stand alone: one HTML file without scripts or requests, for any screen, light or dark.

Whatever text a page shows is escaped here; only `Markup` is taken as it is, and only this module
makes it. Charts are SVG of at most `MAX_POINTS` points a series.
"""

import math
import re
import struct
import zlib
from base64 import b64encode
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from html import escape
from itertools import pairwise
from statistics import fmean
from typing import NewType

Markup = NewType("Markup", str)
"""HTML whose texts are escaped."""

NOT_SHOWN = re.compile(r"[\x00-\x08\x0b\x0c\x0e-\x1f\x7f-\x9f]")
MAX_POINTS = 240
NUM_COLORS = 8
NUM_SHADES = 7
"""Of a heat, to either side of 0."""
# A chart in units of its own drawing, which a phone shows about as large as CSS pixels.
WIDTH, HEIGHT, LEFT, RIGHT, TOP, BOTTOM = 360, 196, 44, 8, 16, 22

STYLE = """
:root{color-scheme:light dark;--paper:#fff;--card:#f6f7f9;--ink:#1c2128;--faint:#68717d;
--line:#d9dde3;--warn:#9a4b00;--hot:214,48,32;--cold:30,100,220;--c0:#2f6fde;--c1:#d9622b;
--c2:#25924a;--c3:#a045c4;--c4:#b8860b;--c5:#0e8f9c;--c6:#d13b74;--c7:#6b7280}
@media(prefers-color-scheme:dark){:root{--paper:#12151a;--card:#1b2027;--ink:#e6e9ee;
--faint:#98a2b0;--line:#333b46;--warn:#ffb060;--hot:255,96,72;--cold:90,150,255;--c0:#6ea3ff;
--c1:#ff9862;--c2:#58c97e;--c3:#cd8bec;--c4:#e2b84a;--c5:#4cc6d3;--c6:#ff7fae;--c7:#a5adba}}
*{box-sizing:border-box}
body{margin:0 auto;max-width:1240px;padding:16px;background:var(--paper);color:var(--ink);
font:15px/1.45 system-ui,sans-serif;overflow-wrap:anywhere}
h1{font-size:24px;margin:4px 0}h2{font-size:18px;margin:28px 0 10px}
nav a{margin-right:14px}a{color:var(--c0)}p{margin:6px 0}.faint,figcaption small{color:var(--faint)}
.warnings{color:var(--warn);padding-left:20px}
.grid{display:grid;gap:14px;grid-template-columns:repeat(auto-fill,minmax(min(100%,340px),1fr))}
figure,article{margin:0;padding:10px;background:var(--card);border:1px solid var(--line);
border-radius:8px;min-width:0}article{margin-bottom:10px}
figcaption{font-weight:600}svg{display:block;width:100%;height:auto}
svg text{font:10px system-ui,sans-serif;fill:var(--faint)}svg .axis{stroke:var(--line)}
svg .mark{stroke:var(--faint);stroke-dasharray:2 3}svg path{fill:none;stroke-width:1.6}
svg .band,svg .area{stroke:none}svg .band{opacity:.2}svg .area{opacity:.75}
.legend{display:flex;flex-wrap:wrap;gap:2px 12px;font-size:12px;margin-top:4px}
.legend span{white-space:nowrap;max-width:100%;overflow:hidden;text-overflow:ellipsis}
.legend i{display:inline-block;width:14px;height:3px;margin-right:5px;vertical-align:middle}
.scroll{overflow:auto;max-width:100%;max-height:70vh;margin:6px 0}
table{border-collapse:collapse;font-size:13px}
td,th{padding:3px 9px;border-bottom:1px solid var(--line);text-align:start;vertical-align:top}
td,th{overflow-wrap:break-word}
td.n,th.n{text-align:end;white-space:nowrap;font-variant-numeric:tabular-nums}
.text{white-space:pre-wrap;margin:4px 0;unicode-bidi:plaintext;font-size:14px}
.text b{font-weight:inherit;border-radius:2px}summary{cursor:pointer}
img.raster{width:100%;height:120px;image-rendering:pixelated}
"""


def _numbered_style() -> str:
    """Rules of the colours of series and of the shades of heat."""
    rules = [
        f".s{n}{{stroke:var(--c{n})}}.f{n}{{fill:var(--c{n});background:var(--c{n})}}"
        for n in range(NUM_COLORS)
    ]
    for n in range(1, NUM_SHADES + 1):
        strength = 0.75 * n / NUM_SHADES
        rules.append(f".h{n}{{background:rgba(var(--hot),{strength:.2f})}}")
        rules.append(f".k{n}{{background:rgba(var(--cold),{strength:.2f})}}")
    return "".join(rules)


def text(value: object) -> Markup:
    """Escape a text; what no page may hold becomes a replacement character."""
    whole = str(value).encode("utf-8", "replace").decode()
    return Markup(escape(NOT_SHOWN.sub("\ufffd", whole)))


@dataclass(frozen=True)
class Section:
    """A titled part of a page."""

    title: str
    parts: Sequence[Markup]


def page(title: str, said: Sequence[str], sections: Sequence[Section]) -> str:
    """Lay out a whole page.

    Args:
        title: Of the page.
        said: Sentences under the title.
        sections: In their order; those without parts are left out.
    """
    shown = [section for section in sections if section.parts]
    links = "".join(f'<a href="#s{n}">{text(s.title)}</a>' for n, s in enumerate(shown))
    body = "".join(
        f'<section id="s{n}"><h2>{text(section.title)}</h2>{"".join(section.parts)}</section>\n'
        for n, section in enumerate(shown)
    )
    paragraphs = "".join(f'<p dir="auto">{text(sentence)}</p>' for sentence in said)
    return (
        '<!doctype html>\n<html lang="en"><head><meta charset="utf-8">'
        '<meta name="viewport" content="width=device-width,initial-scale=1">'
        '<link rel="icon" href="data:,">'  # or a browser asks for one
        f"<title>{text(title)}</title><style>{STYLE}{_numbered_style()}</style></head>\n<body>"
        f'<h1 dir="auto">{text(title)}</h1>{paragraphs}<nav>{links}</nav>\n{body}</body></html>\n'
    )


def grid(parts: Iterable[Markup]) -> list[Markup]:
    """Put figures side by side, as many as the screen has room for; nothing of none."""
    joined = "".join(parts)
    return [Markup(f'<div class="grid">{joined}</div>')] if joined else []


def warnings(sentences: Sequence[str]) -> list[Markup]:
    """List what a reader should not overlook; nothing of none."""
    items = "".join(f'<li dir="auto">{text(sentence)}</li>' for sentence in sentences)
    return [Markup(f'<ul class="warnings">{items}</ul>')] if items else []


def folded(title: str, inside: Markup) -> Markup:
    """Hide a long part behind its title."""
    return Markup(f"<details><summary>{text(title)}</summary>{inside}</details>")


def table(
    head: Sequence[str],
    rows: Iterable[Sequence[object]],
    shades: Callable[[float], int] | None = None,
) -> Markup:
    """Lay out a table that scrolls by itself where the screen is too narrow.

    Args:
        head: Titles of the columns.
        rows: Their cells; numbers stand flush right, None is a dash.
        shades: Colours the numbers, as `shade_of` does. None: they have no colour.
    """
    lines = [list(row) for row in rows]
    numeric = {n for row in lines for n, value in enumerate(row) if isinstance(value, (int, float))}

    def cell(value: object) -> str:
        if isinstance(value, (int, float)):
            shade = _shade_class(shades(value)) if shades is not None else ""
            return f'<td class="n{shade and " " + shade}">{text(short(value))}</td>'
        return f'<td dir="auto">{text("–" if value is None else value)}</td>'

    titles = "".join(
        f"<th{' class=n' * (n in numeric)}>{text(title)}</th>" for n, title in enumerate(head)
    )
    body = "".join(f"<tr>{''.join(map(cell, row))}</tr>" for row in lines)
    return Markup(
        f'<div class="scroll"><table><thead><tr>{titles}</tr></thead>'
        f"<tbody>{body}</tbody></table></div>"
    )


def short(value: float) -> str:
    """Write a number in few characters."""
    if isinstance(value, bool) or not math.isfinite(value):
        return str(value)
    size = abs(value)
    if value == int(value) and size < 1e5:
        return f"{int(value):,}"
    for bound, unit in ((1e9, "G"), (1e6, "M"), (1e4, "k")):
        if size >= bound:
            return f"{value / (1e3 if unit == 'k' else bound):.3g}{unit}"
    return f"{value:.0f}" if size >= 1000 else f"{value:.3g}"


def shade_of(value: float, scale: float) -> int:
    """Choose the shade of a value: 0 of none, `NUM_SHADES` of one as large as `scale` or larger."""
    if not math.isfinite(value) or scale <= 0:
        return 0
    return max(-NUM_SHADES, min(NUM_SHADES, round(NUM_SHADES * value / scale)))


def _shade_class(shade: int) -> str:
    return f"h{shade}" if shade > 0 else f"k{-shade}" if shade < 0 else ""


def heat_text(tokens: Sequence[str], values: Sequence[float | None], scale: float) -> Markup:
    """Colour the tokens of a text by a value each: red above 0, blue below; the text stays whole.

    Args:
        tokens: Whose concatenation is the text; in any script, of either direction.
        values: Of each token, shown where a pointer rests on it. None: it has none.
        scale: Value of the strongest colour.
    """
    parts: list[str] = []
    for token, value in zip(tokens, values, strict=True):
        shade = "" if value is None else _shade_class(shade_of(value, scale))
        shown = text(token)
        if value is None or not shown:
            parts.append(shown)
        else:
            parts.append(f'<b{shade and f" class={shade}"} title="{short(value)}">{shown}</b>')
    return Markup(f'<div class="text" dir="auto">{"".join(parts)}</div>')


def plain_text(shown: str) -> Markup:
    """Show a text of several lines as it is."""
    return Markup(f'<div class="text" dir="auto">{text(shown)}</div>')


def card(title: str, parts: Sequence[Markup]) -> Markup:
    """Put what belongs together into a box with a line above it."""
    return Markup(f'<article><small class="faint">{text(title)}</small>{"".join(parts)}</article>')


def raster(title: str, shades: Sequence[Sequence[float]]) -> Markup:
    """Draw a grid of values as a picture of as many pixels, the darker the larger.

    Args:
        title: What is drawn.
        shades: Rows from the top, from 0 (white) to 1 (black) and cut beyond.
    """
    rows = (bytes(round(255 * (1 - min(1.0, max(0.0, v)))) for v in row) for row in shades)
    size = struct.pack(">IIBBBBB", len(shades[0]), len(shades), 8, 0, 0, 0, 0)  # 8 bits of grey
    lines = zlib.compress(b"".join(b"\0" + row for row in rows))
    chunks = ((b"IHDR", size), (b"IDAT", lines), (b"IEND", b""))
    png = b"\x89PNG\r\n\x1a\n" + b"".join(
        struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))
        for kind, data in chunks
    )
    source = f"data:image/png;base64,{b64encode(png).decode('ascii')}"
    return Markup(
        f"<figure><figcaption>{text(title)}</figcaption>"
        f'<img class="raster" alt="{text(title)}" src="{source}"></figure>'
    )


@dataclass(frozen=True)
class Series:
    """A curve: values over steps, both in the order of the steps."""

    name: str
    steps: Sequence[float]
    values: Sequence[float]


@dataclass(frozen=True)
class _Thinned:
    """The values of neighbouring steps taken together."""

    steps: list[float]
    means: list[float]
    lows: list[float]
    highs: list[float]


def thinned(series: Series, most: int = MAX_POINTS) -> _Thinned:
    """Take neighbouring values together until there are at most `most`; none is lost sight of.

    What is not finite is left out.
    """
    steps, values = series.steps, series.values
    if not all(map(math.isfinite, values)):
        kept = [n for n, value in enumerate(values) if math.isfinite(value)]
        steps, values = [steps[n] for n in kept], [values[n] for n in kept]
    size = max(1, math.ceil(len(values) / most))
    places = range(0, len(values), size)
    return _Thinned(
        [fmean(steps[n : n + size]) for n in places],
        [fmean(values[n : n + size]) for n in places],
        [min(values[n : n + size]) for n in places],
        [max(values[n : n + size]) for n in places],
    )


def line_chart(
    title: str,
    unit: str,
    series: Sequence[Series],
    marks: Mapping[float, str] | None = None,
) -> Markup:
    """Draw curves over steps; a single one has a band from its lowest to its highest values.

    Args:
        title: What is drawn.
        unit: Of the values.
        series: The curves; those without a finite value are left out.
        marks: Steps at which something began, with its name. None: nothing did.

    Returns:
        Empty where nothing is to be drawn.
    """
    drawn = [(each.name, thinned(each)) for each in series]
    drawn = [(name, found) for name, found in drawn if found.steps]
    steps = [step for each in series for step in (*each.steps[:1], *each.steps[-1:])]
    if not drawn:
        return Markup("")
    alone = len(drawn) == 1
    lows = [y for _, found in drawn for y in (found.lows if alone else found.means)]
    highs = [y for _, found in drawn for y in (found.highs if alone else found.means)]
    frame = _Frame.around(steps, min(lows), max(highs))
    shapes = []
    for number, (_, found) in enumerate(drawn):
        color, dash = number % NUM_COLORS, _dashes(number)
        if alone and found.highs != found.lows:
            band = frame.area(found.steps, found.lows, found.highs)
            shapes.append(f'<path class="band f{color}" d="{band}"/>')
        line = frame.line(found.steps, found.means)
        shapes.append(f'<path class="s{color}"{dash} d="{line}"/>')
    names = [(name, short(found.means[-1])) for name, found in drawn if name]
    return _figure(title, unit, frame, shapes, names, marks or {})


def stacked_chart(
    title: str,
    unit: str,
    series: Sequence[Series],
    marks: Mapping[float, str] | None = None,
) -> Markup:
    """Draw non-negative parts on top of each other; a part that is missing at a step is 0 there.

    Args and what is returned are as of `line_chart`.
    """
    steps = sorted({step for each in series for step in each.steps})
    filled = []
    for each in series:
        known = dict(zip(each.steps, each.values, strict=True))
        whole = Series(each.name, steps, [_finite(known.get(step, 0.0)) for step in steps])
        filled.append((each.name, thinned(whole)))
    filled = [(name, found) for name, found in filled if any(found.means)]
    if not filled:
        return Markup("")
    at = filled[0][1].steps
    edges = [[0.0] * len(at)]
    for _, found in filled:
        edges.append([a + b for a, b in zip(edges[-1], found.means, strict=True)])
    frame = _Frame.around(steps, 0.0, max(edges[-1]))
    shapes = [
        f'<path class="area f{number % NUM_COLORS}" d="{frame.area(at, low, high)}"/>'
        for number, (low, high) in enumerate(pairwise(edges))
    ]
    names = [(name, short(found.means[-1])) for name, found in filled]
    return _figure(title, unit, frame, shapes, names, marks or {})


def _finite(value: float) -> float:
    return value if math.isfinite(value) else 0.0


@dataclass(frozen=True)
class _Frame:
    """Where values lie in the drawing."""

    first: float
    last: float
    low: float
    high: float

    @classmethod
    def around(cls, steps: Sequence[float], low: float, high: float) -> "_Frame":
        """Leave room about all of the values."""
        margin = 0.05 * (high - low) or 0.1 * abs(high) or 1.0
        bottom = 0.0 if low == 0 else low - margin
        first, last = min(steps), max(steps)
        return cls(first, last if last > first else first + 1, bottom, high + margin)

    def x(self, step: float) -> float:
        """Place of a step."""
        share = (step - self.first) / (self.last - self.first)
        return LEFT + share * (WIDTH - LEFT - RIGHT)

    def y(self, value: float) -> float:
        """Place of a value."""
        share = (value - self.low) / (self.high - self.low)
        return HEIGHT - BOTTOM - share * (HEIGHT - TOP - BOTTOM)

    def line(self, steps: Sequence[float], values: Sequence[float]) -> str:
        """Path through values; a single one is a short dash."""
        points = [f"{self.x(x):.1f} {self.y(y):.1f}" for x, y in zip(steps, values, strict=True)]
        return f"M{'L'.join(points)}" + ("h4" if len(points) == 1 else "")

    def area(self, steps: Sequence[float], lows: Sequence[float], highs: Sequence[float]) -> str:
        """Path around all between two lines."""
        there = self.line(steps, highs)[1:].removesuffix("h4")
        back = self.line(steps[::-1], lows[::-1])[1:].removesuffix("h4")
        return f"M{there}L{back}Z"


def _dashes(number: int) -> str:
    """Tell curves of one colour apart."""
    pattern = ("", "6 3", "2 3", "8 3 2 3")[number // NUM_COLORS % 4]
    return f' stroke-dasharray="{pattern}"' if pattern else ""


def ticks(low: float, high: float, most: int = 5) -> list[float]:
    """Choose round values between two bounds."""
    rough = (high - low) / most
    size = 10.0 ** math.floor(math.log10(rough))
    step = next(factor * size for factor in (1, 2, 5, 10) if factor * size >= rough)
    first = math.ceil(low / step)
    return [n * step for n in range(first, math.floor(high / step) + 1)]


def _figure(
    title: str,
    unit: str,
    frame: _Frame,
    shapes: Sequence[str],
    names: Sequence[tuple[str, str]],
    marks: Mapping[float, str],
) -> Markup:
    """Put axes around what was drawn, and names under it."""
    lines, right, bottom = [], WIDTH - RIGHT, HEIGHT - BOTTOM
    for value in ticks(frame.low, frame.high):
        y = f"{frame.y(value):.1f}"
        lines.append(f'<line class="axis" x1="{LEFT}" x2="{right}" y1="{y}" y2="{y}"/>')
        lines.append(f'<text x="{LEFT - 4}" y="{y}" dy="3" text-anchor="end">{short(value)}</text>')
    for step in ticks(frame.first, frame.last, 4):
        x = f"{frame.x(step):.1f}"
        lines.append(f'<text x="{x}" y="{HEIGHT - 8}" text-anchor="middle">{short(step)}</text>')
    for step, name in marks.items():
        if frame.first <= step <= frame.last:
            x = f"{frame.x(step):.1f}"
            lines.append(f'<line class="mark" x1="{x}" x2="{x}" y1="{TOP}" y2="{bottom}"/>')
            lines.append(f'<text x="{x}" y="{TOP - 4}" dx="-2">{text(name)}</text>')
    legend = "".join(
        f'<span dir="auto"><i class="f{number % NUM_COLORS}"></i>{text(name)} '
        f'<small class="faint">{value}</small></span>'
        for number, (name, value) in enumerate(names)
    )
    said = text(f"{title}, {unit}" if unit else title)
    small = f" <small>{text(unit)}</small>" if unit else ""
    return Markup(
        f"<figure><figcaption>{text(title)}{small}</figcaption>"
        f'<svg viewBox="0 0 {WIDTH} {HEIGHT}" role="img" aria-label="{said}">'
        f"{''.join(lines)}{''.join(shapes)}</svg>"
        + (f'<div class="legend">{legend}</div>' if legend else "")
        + "</figure>"
    )
