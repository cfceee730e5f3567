"""Reading pairs, finding repeated ones, ranking and embedding them, each resumable by shard."""

import gzip
import json
import shutil
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from marco_train.config.curation import EmbeddingConfig
from marco_train.curation import embedding
from marco_train.curation.duplicates import (
    ExactDuplicates,
    NearDuplicates,
    normal,
    rows_of_a_band,
)
from marco_train.curation.embedding import Similarity, load_model
from marco_train.curation.frame import Cost, Dropped, Pipeline, Ran, Row, RowSource, Step, run
from marco_train.curation.nllb import CUT, NLLB, domain_of
from marco_train.curation.selection import Best
from marco_train.errors import InputError
from tests.helpers.nllb_lines import (
    ENGLISH,
    NUM_LINES,
    OTHERS,
    line_of,
    lines_of,
    name_of,
    write_nllb,
)
from tests.helpers.world import World


@dataclass
class Given:
    """Rows that a test wrote."""

    rows: Sequence[Row]
    name: str = "given"

    def identity(self) -> Any:
        return list(self.rows)

    def plan(self) -> Cost:
        return Cost(len(self.rows))

    def read(self, skip: int) -> Iterator[Row | Dropped]:
        yield from self.rows[skip:]


def ran(source: RowSource, work: Path, *steps: Step, shard_rows: int = 4) -> Ran:
    return run(Pipeline("set", source, steps, [], {}, lambda counts: []), work, shard_rows)


def redone(work: Path, step: str, shard: int) -> None:
    """Leave a step as if it was killed while it wrote a shard."""
    (work / step / "complete.json").unlink()
    for path in sorted((work / step).glob("0*"))[shard:]:
        path.rename(path.with_name(f".{path.name}.partial"))


def test_pairs_are_read_whichever_side_english_stands_on(tmp_path: Path) -> None:
    write_nllb(tmp_path, ["de", "zh"])
    source = NLLB.of(tmp_path, ["de", "zh"])
    german, chinese = (next(iter(source.read(skip))) for skip in (0, NUM_LINES))
    assert german == {
        "id": "deu_Latn-eng_Latn:1",
        "language": "de",
        "english": ENGLISH[0],
        "other": OTHERS["de"][0],
        "laser": 1.3,
        "english_lid": 0.97,
        "other_lid": 0.98,
        "domain": "example.org",
    }
    assert isinstance(chinese, dict)
    assert (chinese["id"], chinese["other"]) == ("eng_Latn-zho_Hans:1", OTHERS["zh"][0])
    assert (chinese["english_lid"], chinese["other_lid"]) == (0.98, 0.97)


def test_lines_at_fault_are_dropped_and_counted(tmp_path: Path) -> None:
    good = line_of("de", 0, ENGLISH[0], OTHERS["de"][0])
    lines = [
        good,
        b"only\ttwo\n",
        b"\xff" + good,
        good.replace(b"1.30", b"high"),
        good.replace(b"1.30", b"nan"),
        good.replace(OTHERS["de"][0].encode(), b" "),
        b"long" * 50_000 + b"\n",
        good.rstrip(b"\n"),
    ]
    (tmp_path / "deu_Latn-eng_Latn.tsv").write_bytes(b"".join(lines))
    counts = ran(NLLB.of(tmp_path, ["de"]), tmp_path / "work").counts[0]
    assert counts.as_json()["languages"]["de"] == {
        "in": 8,
        "out": 2,
        "dropped": {
            "a line of more than 65536 bytes": 1,
            "a line of other than 9 columns": 1,
            "a line that is not UTF-8": 1,
            "a line whose scores are no numbers": 2,
            "a line with an empty side": 1,
        },
        "counted": {},
    }


def test_of_a_file_that_is_cut_what_is_there_is_read(tmp_path: Path) -> None:
    whole = [line_of("de", n, f"{ENGLISH[0]} {n}", OTHERS["de"][0]) for n in range(2000)]
    packed = gzip.compress(b"".join(whole))
    (tmp_path / name_of("de")).write_bytes(packed[: len(packed) // 2])
    write_nllb(tmp_path, ["fr"])
    first, again = (
        ran(NLLB.of(tmp_path, ["de", "fr"]), tmp_path / f"work{n}", shard_rows=100).counts[0]
        for n in range(2)
    )
    german = first.languages["de"]
    assert german.dropped[CUT] == 1 and 100 < german.rows_out < 1900
    assert first.languages["fr"].rows_in == NUM_LINES
    assert first.as_json() == again.as_json()


def test_reading_goes_on_behind_what_was_read(tmp_path: Path) -> None:
    source = NLLB.of(write_nllb(tmp_path, ["de", "fr", "zh"]), ["de", "fr", "zh"])
    whole = list(source.read(0))
    assert len(whole) == 3 * NUM_LINES
    for skip in (1, NUM_LINES, NUM_LINES + 3, 3 * NUM_LINES):
        assert list(source.read(skip)) == whole[skip:]


def test_a_language_without_a_file_is_refused(tmp_path: Path) -> None:
    write_nllb(tmp_path, ["de"])
    (tmp_path / "notes.txt").write_text("not mine")
    with pytest.raises(InputError, match=r"has no file of fr, as fra_Latn-eng_Latn\.gz; leave"):
        NLLB.of(tmp_path, ["de", "fr"])
    (tmp_path / "deu_Latn-eng_Latn.tsv").write_bytes(b"")
    with pytest.raises(InputError, match="input has two files of de"):
        NLLB.of(tmp_path, ["de"])
    with pytest.raises(InputError, match="there is no file and no directory"):
        NLLB.of(tmp_path / "no", ["de"])


def test_a_plan_knows_the_lines_of_a_short_file_and_guesses_those_of_a_long_one(
    tmp_path: Path,
) -> None:
    assert NLLB.of(write_nllb(tmp_path, ["de"]), ["de"]).plan().rows == NUM_LINES
    (tmp_path / name_of("fr")).write_bytes(b"".join(lines_of("fr")) * 2000)
    assert NLLB.of(tmp_path, ["fr"]).plan().rows == pytest.approx(2000 * NUM_LINES, rel=0.05)


@pytest.mark.parametrize(
    ("address", "domain"),
    [
        ("http://www.example.org/page?x=1", "example.org"),
        ("https://a.b.example.co.uk:80/", "example.co.uk"),
        ("news.example.de", "example.de"),
        ("http://[broken/", ""),
        ("", ""),
        ("localhost", ""),
    ],
)
def test_a_domain_is_the_registered_name(address: str, domain: str) -> None:
    assert domain_of(address) == domain


LONG = "The {} committee will meet again next week to discuss the proposal for a new bridge."
SENTENCES = [
    {"language": "de", "t": LONG.format("first")},
    {"language": "fr", "t": LONG.format("first")},  # in another language
    {"language": "de", "t": f"  {LONG.format('FIRST')} "},  # equal but for case and spaces
    {"language": "de", "t": "An apple a day keeps the doctor away, as they say in England."},
    {"language": "de", "t": LONG.format("third")},  # nearly the first
    {"language": "fr", "t": "Short"},
    {"language": "fr", "t": "short"},
    {"language": "de", "t": LONG.format("a")},  # nearly the first, in the next shard
    {"language": "fr", "t": "An apple a day keeps the doctor away, as they say in England."},
]


def text_of(row: Row) -> str:
    return normal(row["t"])


def kept(found: Ran) -> list[int]:
    return [n for n, row in enumerate(SENTENCES) if row in list(found.shards.rows())]


@pytest.mark.parametrize("shard_rows", [1, 4, 100])
def test_repeated_rows_are_told_within_a_language(tmp_path: Path, shard_rows: int) -> None:
    exact = ran(
        Given(SENTENCES), tmp_path / "1", ExactDuplicates(text_of, "t"), shard_rows=shard_rows
    )
    assert kept(exact) == [0, 1, 3, 4, 5, 7, 8]
    near = ran(
        Given(SENTENCES), tmp_path / "2", NearDuplicates(text_of, "t", 0.8), shard_rows=shard_rows
    )
    assert kept(near) == [0, 1, 3, 5, 8]
    equal = ran(
        Given(SENTENCES), tmp_path / "3", NearDuplicates(text_of, "t", 1.0), shard_rows=shard_rows
    )
    assert kept(equal) == [0, 1, 3, 4, 5, 7, 8]


@pytest.mark.parametrize(
    "step",
    [ExactDuplicates(text_of, "t"), NearDuplicates(text_of, "t", 0.8)],
    ids=["exact", "near"],
)
def test_a_shard_that_is_redone_does_not_repeat_itself(tmp_path: Path, step: Step) -> None:
    calm = [*ran(Given(SENTENCES), tmp_path, step).shards.rows()]
    for shard in (0, 1, 2):
        redone(tmp_path, f"01-{step.name}", shard)  # its store holds all of the rows
        assert [*ran(Given(SENTENCES), tmp_path, step).shards.rows()] == calm


def test_bands_are_as_long_as_nearly_all_similar_rows_allow() -> None:
    assert [rows_of_a_band(similarity) for similarity in (0.5, 0.8, 0.95)] == [3, 6, 16]


def scored(*rows: tuple[str, str, float]) -> list[Row]:
    return [{"language": a, "domain": b, "score": c} for a, b, c in rows]


def best(work: Path, rows: list[Row], count: int, share: float) -> Ran:
    return ran(Given(rows), work, Best(lambda row: row["score"], "score", count, share, 2))


def test_the_best_of_each_language_are_kept(tmp_path: Path) -> None:
    rows = scored(
        ("de", "a", 1.0), ("de", "b", 3.0), ("fr", "a", 0.5), ("de", "c", 2.0), ("de", "d", 2.0)
    )
    found = best(tmp_path, rows, 2, 1.0)
    assert [*found.shards.rows()] == [rows[1], rows[2], rows[3]]  # of equal ones the first
    assert found.counts[1].whole.dropped == {"not among the best": 2}


def test_a_domain_has_at_most_its_share_while_others_remain(tmp_path: Path) -> None:
    crowd = scored(*(("de", "big", 9.0 - n / 10) for n in range(6)))
    unknown = scored(*(("de", "", 5.0) for _ in range(3)))  # which are of no domain
    others = scored(*(("de", f"d{n}", 1.0) for n in range(6)))
    found = best(tmp_path / "1", crowd + unknown + others, 8, 0.25)
    domains = [row["domain"] for row in found.shards.rows()]
    assert domains == ["big", "big", "", "", "", "d0", "d1", "d2"]
    assert found.counts[1].whole.dropped == {
        "its domain has its share": 4,
        "not among the best": 3,
    }
    few = best(tmp_path / "2", crowd + unknown + others[:2], 8, 0.25)
    domains = [row["domain"] for row in few.shards.rows()]
    assert domains == ["big", "big", "big", "", "", "", "d0", "d1"]
    assert few.counts[1].whole.counted == {"rows of domains over their share": 1}


def test_a_ranking_that_is_redone_is_the_same(tmp_path: Path) -> None:
    rows = scored(*(("de", f"d{n % 3}", n % 5) for n in range(20)))
    calm = [*best(tmp_path, rows, 7, 0.3).shards.rows()]
    redone(tmp_path, "01-best", 2)
    assert [*best(tmp_path, rows, 7, 0.3).shards.rows()] == calm


class Counts:
    """An embedding model: how often a text has each of some letters."""

    def __init__(self, letters: str) -> None:
        self._letters = letters

    def encode(self, texts: list[str], **_: Any) -> Any:
        found = np.array(
            [[text.count(letter) for letter in self._letters] for text in texts], float
        )
        return found / np.maximum(np.linalg.norm(found, axis=1, keepdims=True), 1e-9)


def test_a_model_of_another_dimension_is_refused_in_a_run_that_goes_on(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    rows = [{"a": "aab", "b": "aab"}, {"a": "a", "b": "b"}, {"a": "abb", "b": "ab"}] * 2
    step = Similarity(EmbeddingConfig(model="letters"), lambda row: (row["a"], row["b"]))
    monkeypatch.setattr(embedding, "load_model", lambda cfg: Counts("ab"))
    found = ran(Given(rows), tmp_path, step)
    assert [row["similarity"] for row in found.shards.rows()] == [1.0, 0.0, 0.948683] * 2
    redone(tmp_path, "01-similarity", 1)
    monkeypatch.setattr(embedding, "load_model", lambda cfg: Counts("abc"))
    with pytest.raises(
        InputError, match="'letters' gives 3 numbers a text, and gave 2 for earlier"
    ):
        ran(Given(rows), tmp_path, step)
    other = replace(step, cfg=EmbeddingConfig(model="other"))
    assert len([*ran(Given(rows), tmp_path, other).shards.rows()]) == 6


@pytest.mark.slow  # the library takes seconds to load
def test_an_embedding_model_that_is_not_there_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    step = Similarity(EmbeddingConfig(model=str(tmp_path / "no")), lambda row: ("a", "b"))
    with pytest.raises(InputError, match=r"embedding\.model .* cannot be loaded"):
        ran(Given([{"a": 1}]), tmp_path / "work", step)


@pytest.mark.slow  # the library takes seconds to load
def test_a_causal_model_without_a_pad_token_is_no_embedding_model(
    world: World, tmp_path: Path
) -> None:
    model = tmp_path / "model"
    shutil.copytree(world.path("student"), model)
    file = model / "tokenizer_config.json"
    config = json.loads(file.read_text())
    config.pop("pad_token", None)
    file.write_text(json.dumps(config))
    with pytest.raises(InputError, match="has no pad token, so it cannot take texts together"):
        load_model(EmbeddingConfig(model=str(model)))


def test_rows_of_shards_are_json(tmp_path: Path) -> None:
    odd = {"text": "line\u2028 \ud800 tab\t", "language": "de"}
    ran(Given([odd]), tmp_path)
    (line,) = (tmp_path / "00-given" / "00000" / "rows.jsonl").read_text("utf-8").split("\n")[:-1]
    assert json.loads(line)["text"] == "line\u2028 ? tab\t"
