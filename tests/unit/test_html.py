"""The pages that stand alone."""

import math
import re
import struct
import zlib
from base64 import b64decode

import pytest

from marco_train.evaluation.html import (
    MAX_POINTS,
    Section,
    Series,
    card,
    folded,
    heat_text,
    line_chart,
    page,
    plain_text,
    raster,
    shade_of,
    short,
    stacked_chart,
    table,
    text,
    thinned,
    ticks,
    warnings,
)
from tests.helpers.pages import shown_text, tags_of

HOSTILE = "\"<img src=x onerror=alert(1)>&'"


def test_a_text_is_escaped_whatever_part_shows_it() -> None:
    one = Series(HOSTILE, [1, 2], [0.5, 1.0])
    parts = [
        *warnings([HOSTILE]),
        folded(HOSTILE, plain_text(HOSTILE)),
        table([HOSTILE], [[HOSTILE]]),
        heat_text([HOSTILE], [1.0], 1.0),
        card(HOSTILE, [plain_text(HOSTILE)]),
        line_chart(HOSTILE, HOSTILE, [one], {1.0: HOSTILE}),
        stacked_chart(HOSTILE, HOSTILE, [one], {1.0: HOSTILE}),
    ]
    whole = page(HOSTILE, [HOSTILE], [Section(HOSTILE, parts)])
    assert not any(tag == "img" for tag, _ in tags_of(whole))
    assert not any("onerror" in attributes for _, attributes in tags_of(whole))
    assert shown_text(whole).count(HOSTILE) >= len(parts)


@pytest.mark.parametrize(
    ("given", "escaped"),
    [("a<b", "a&lt;b"), ("\x00\x1b", "\ufffd\ufffd"), ("\ud800", "?"), ("a\n\tb", "a\n\tb")],
)
def test_what_no_page_may_hold_is_replaced(given: str, escaped: str) -> None:
    assert text(given) == escaped


def test_a_page_asks_for_nothing_and_is_made_for_phones() -> None:
    whole = page("run", [], [Section("part", [plain_text("text")]), Section("empty", [])])
    tags = tags_of(whole)
    assert ("meta", {"name": "viewport", "content": "width=device-width,initial-scale=1"}) in tags
    addresses = [a.get("src") or a.get("href") or "" for _, a in tags]
    assert all(address[:5] in {"", "#s0", "data:"} for address in addresses)
    assert {"script", "iframe", "object"}.isdisjoint(tag for tag, _ in tags)
    assert "url(" not in whole and "@import" not in whole
    assert "prefers-color-scheme:dark" in whole
    assert "empty" not in shown_text(whole)


def test_the_tokens_of_a_heat_are_the_text_with_a_value_each() -> None:
    found = heat_text(["a ", "b\n", "", "<c>"], [2.0, -1.0, 0.5, None], scale=2.0)
    assert shown_text(found) == "a b\n<c>"
    values = [(a["title"], a.get("class")) for tag, a in tags_of(found) if tag == "b"]
    assert values == [("2", "h7"), ("-1", "k4")]


@pytest.mark.parametrize(
    ("value", "scale", "shade"),
    [(0, 1, 0), (1, 1, 7), (9, 1, 7), (-9, 1, -7), (0.5, 1, 4), (1, 0, 0), (math.nan, 1, 0)],
)
def test_a_shade_is_bounded(value: float, scale: float, shade: int) -> None:
    assert shade_of(value, scale) == shade


@pytest.mark.parametrize(
    ("value", "written"),
    [
        (0, "0"),
        (0.12345, "0.123"),
        (12.0, "12"),
        (4000, "4,000"),
        (1234.5, "1234"),
        (12345.6, "12.3k"),
        (2.5e6, "2.5M"),
        (3e9, "3G"),
        (1e-6, "1e-06"),
        (math.inf, "inf"),
    ],
)
def test_a_number_is_short(value: float, written: str) -> None:
    assert short(value) == written


def test_a_thinned_curve_keeps_its_extremes() -> None:
    values = [1.0] * 4000
    values[1234], values[3999] = 50.0, -3.0
    values[5] = math.nan
    found = thinned(Series("loss", list(range(1, 4001)), values))
    assert len(found.steps) <= MAX_POINTS
    assert max(found.highs) == 50.0 and min(found.lows) == -3.0
    assert all(map(math.isfinite, found.means))
    few = thinned(Series("loss", [1, 2, 3], [0.5, 0.25, 0.125]))
    assert (few.steps, few.means) == ([1, 2, 3], [0.5, 0.25, 0.125])


@pytest.mark.parametrize(
    ("low", "high", "expected"),
    [
        (0, 1, [0, 0.2, 0.4, 0.6, 0.8, 1.0]),
        (-3, 3, [-2, 0, 2]),
        (1, 4000, [1000, 2000, 3000, 4000]),
    ],
)
def test_axes_have_round_numbers(low: float, high: float, expected: list[float]) -> None:
    assert ticks(low, high) == pytest.approx(expected)


@pytest.mark.parametrize("values", [[0.0, 0.0], [5.0, 5.0], [1e-9, 2e-9], [-4.0, 1e12]])
def test_a_curve_lies_in_its_frame(values: list[float]) -> None:
    drawn = line_chart("loss", "", [Series("", [1, 2], values)])
    (path,) = re.findall(r'class="s0" d="M([^"]*)"', drawn)
    places = [tuple(map(float, point.split())) for point in path.split("L")]
    assert places[0][0] < places[1][0]
    assert all(0 <= x <= 360 and 0 <= y <= 196 for x, y in places)


def test_nothing_is_drawn_of_what_was_never_a_number() -> None:
    nothing = Series("loss", [1, 2], [math.nan, math.inf])
    assert line_chart("loss", "", [nothing]) == line_chart("loss", "", []) == ""
    assert stacked_chart("time", "", [nothing]) == ""


def test_parts_are_stacked_step_by_step() -> None:
    drawn = stacked_chart(
        "time", "seconds", [Series("a", [1, 2], [1.0, 1.0]), Series("b", [2], [3.0])]
    )
    upper = re.findall(r'class="area f1" d="M([^"]*)Z"', drawn)[0].split("L")
    tops, bottoms = upper[:2], upper[2:]
    assert tops[0] == bottoms[1]  # b has nothing at the first step
    height = [float(point.split()[1]) for point in (tops[1], bottoms[0])]
    assert height[0] < height[1]


def test_numbers_of_a_table_stand_under_their_title() -> None:
    found = table(["name", "value"], [["a", 1.5], ["b", None]])
    assert [a.get("class") for tag, a in tags_of(found) if tag == "th"] == [None, "n"]
    assert shown_text(found) == "namevaluea1.5b–"


def test_a_raster_is_a_grey_picture_of_its_values() -> None:
    drawn = raster(HOSTILE, [[0.0, 0.5, 1.0], [2.0, -1.0, 0.2]])
    (source,) = [attributes["src"] for tag, attributes in tags_of(drawn) if tag == "img"]
    png = b64decode(str(source).removeprefix("data:image/png;base64,"))
    assert png.startswith(b"\x89PNG\r\n\x1a\n")
    assert struct.unpack(">II", png[16:24]) == (3, 2)
    size = int.from_bytes(png[33:37], "big")
    assert png[37:41] == b"IDAT"
    assert list(zlib.decompress(png[41 : 41 + size])) == [0, 255, 128, 0, 0, 0, 255, 204]
    assert int.from_bytes(png[41 + size : 45 + size], "big") == zlib.crc32(png[37 : 41 + size])
    assert not any("onerror" in attributes for _, attributes in tags_of(drawn))
