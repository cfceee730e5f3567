"""What the page of a run tells, of whatever its directory holds."""

import json
from pathlib import Path

import pytest

from marco_train.commands.report import main
from marco_train.evaluation.run_files import read_run
from tests.helpers.pages import in_browser, shown_text, tags_of
from tests.helpers.run_directory import ARABIC, HOSTILE, write_run


def report(directory: Path) -> str:
    """The text of its page."""
    assert main([str(directory)]) == 0
    return shown_text((directory / "report.html").read_text())


def test_a_page_tells_what_a_run_logged(tmp_path: Path) -> None:
    write_run(tmp_path / "run", 40)
    said = report(tmp_path / "run")
    for expected in (
        "optim/grad_norm was no number at 1 steps, first at 7",
        "opd, not finished: it goes on, or was killed",
        "40 of 40 steps.",
        "Reverse KL by phase",
        "Reverse KL by category",
        "Reverse KL by language",
        "Entropy",
        "Length of responses",
        "Learning rate",
        "Load by layer",
        "Time of a step",
        "Tokens trained on",
        "Peak memory",
        "% of sequences",
        "step 10: ",
        "800 tokens, 1 nats a token",
        "… and 300 tokens more",
        ARABIC,
    ):
        assert expected in said, expected


def test_strangers_texts_stay_texts(tmp_path: Path) -> None:
    write_run(tmp_path / "run", 10)
    said = report(tmp_path / "run")
    assert HOSTILE.replace("\x00\ud800", "\ufffd?") in said
    page = (tmp_path / "run" / "report.html").read_text()
    assert "script" not in {tag for tag, _ in tags_of(page)}
    assert "http://<redacted>@host:1" in said and "me:pw" not in page


def test_the_page_of_4000_steps_is_below_3_megabytes(tmp_path: Path) -> None:
    write_run(tmp_path / "run", 4000)
    report(tmp_path / "run")
    assert (tmp_path / "run" / "report.html").stat().st_size < 3e6


def test_a_run_that_has_logged_nothing_says_so(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text('{"name": "new", "stage": {"kind": "sft"}}')
    said = report(tmp_path)
    assert "new" in said and "No step was logged yet." in said


@pytest.mark.parametrize("torn", [b'{"step": 2, "kl/rev', b"null", b"\xff\xfe", b'{"step": "x"}'])
def test_a_torn_line_is_counted_and_left_out(torn: bytes, tmp_path: Path) -> None:
    (tmp_path / "metrics.jsonl").write_bytes(b'{"step": 1, "kl/reverse": 0.5}\n' + torn)
    (tmp_path / "samples.jsonl").write_bytes(torn)
    (tmp_path / "config.json").write_bytes(torn)
    said = report(tmp_path)
    assert "1 lines of metrics.jsonl are torn" in said
    assert "1 steps." in said


@pytest.mark.parametrize(
    ("right", "said"), [(True, "right"), (False, "wrong"), (None, "not judged")]
)
def test_an_answer_to_a_suite_is_shown_with_what_was_expected(
    right: bool | None, said: str, tmp_path: Path
) -> None:
    line = {"step": 4, "eval/score": 37.5, "eval/score/task_own": 37.5}
    (tmp_path / "metrics.jsonl").write_text(json.dumps(line))
    answer = {"step": 4, "category": "own", "prompt": "1 + 1?", "tokens": ["<3>"], "kl": [None]}
    answer |= {"reference": "2", "answer": "3", "right": right}
    (tmp_path / "samples.jsonl").write_text(json.dumps(answer))
    shown = report(tmp_path)
    assert f"step 4: own, {said}, expected 2" in shown and "<3>" in shown
    assert "score of the suite, per cent or BLEU" in shown


def test_what_is_no_number_is_no_metric(tmp_path: Path) -> None:
    line = {"step": 1, "kl/reverse": "much", "loss/entropy": None, "optim/lr": True, "x": 10**400}
    (tmp_path / "metrics.jsonl").write_text(json.dumps(line | {"optim/grad_norm": 2}))
    assert list(read_run(tmp_path).columns) == ["optim/grad_norm"]


def test_an_interrupted_run_says_what_ended_it(tmp_path: Path) -> None:
    write_run(tmp_path / "run", 10)
    (tmp_path / "run" / "exit_status.json").write_text('{"code": 143, "reason": "SIGTERM"}')
    assert "opd, ended before its time: SIGTERM" in report(tmp_path / "run")
    (tmp_path / "run" / "finished.json").write_text("{}")
    assert "opd, finished" in report(tmp_path / "run")


def test_an_evaluation_has_a_page(tmp_path: Path) -> None:
    answer = {"category": "math", "language": "ar", "prompt": ARABIC, "reference": "2"}
    found = {
        "models": {"sft": {"avg_at_n": {"math": 20.0, "all": 25.0}, "reverse_kl": {"first": 0.5}}},
        "teachers": {"first": {"avg_at_n": {"math": 50.0}}},
        "answers": {"sft": [answer | {"answer": "<3>", "accepted": False}]},
    }
    (tmp_path / "evaluation.json").write_text(json.dumps(found))
    distances = {"languages": ["en", "ar"], "distances": [[0.0, 0.75], [0.75, 0.0]]}
    (tmp_path / "signatures.json").write_text(json.dumps({"sft": distances}))
    said = report(tmp_path)
    for expected in ("sft2025", "first50–", "KL to first", ARABIC, "<3>", "no", "ar0.750"):
        assert expected in said, expected


@pytest.mark.parametrize("content", ["[]", '{"models": 3, "answers": {"a": [{}]}}', '{"models": {'])
def test_a_mutilated_evaluation_has_a_page_too(content: str, tmp_path: Path) -> None:
    (tmp_path / "evaluation.json").write_text(content)
    report(tmp_path)


def test_a_directory_of_no_run_is_refused(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main([str(tmp_path / "absent")]) == 1
    assert "there is no directory" in capsys.readouterr().err
    assert main([str(tmp_path)]) == 1
    assert "holds no run, as none of config.json, metrics.jsonl" in capsys.readouterr().err
    write_run(tmp_path / "run", 2)
    assert main([str(tmp_path / "run"), "--output", str(tmp_path / "absent" / "page.html")]) == 1
    assert "cannot be written" in capsys.readouterr().err


LAYOUT = """{
  shown: doc.documentElement.scrollWidth, wide: page.innerWidth,
  paper: page.getComputedStyle(doc.body).backgroundColor,
  ink: page.getComputedStyle(doc.body).color,
  requests: page.performance.getEntriesByType("resource").length,
  arabic: [...doc.querySelectorAll(".text")].filter(e => e.textContent.includes("مرحبا"))
    .map(e => page.getComputedStyle(e).direction),
  english: [...doc.querySelectorAll(".text")].filter(e => e.textContent.includes("long_word"))
    .map(e => page.getComputedStyle(e).direction),
  outside: [...doc.querySelectorAll("figure, article, h1, p, nav")]
    .filter(e => e.getBoundingClientRect().right > page.innerWidth).length,
  smallest: Math.min(...[...doc.querySelectorAll("svg text")]
    .map(e => e.getBoundingClientRect().height)),
  figures: doc.querySelectorAll("figure svg path").length,
}"""


@pytest.mark.browser
@pytest.mark.slow
@pytest.mark.parametrize("dark", [False, True])
@pytest.mark.parametrize("width", [390, 1280])
def test_a_browser_shows_a_page_on_any_screen(width: int, dark: bool, tmp_path: Path) -> None:
    write_run(tmp_path / "run", 60)
    main([str(tmp_path / "run")])
    found = in_browser(tmp_path / "run" / "report.html", width, dark, LAYOUT, tmp_path)
    assert found["shown"] <= found["wide"], "the page scrolls to the side"
    assert found["outside"] == 0
    assert found["requests"] == 0
    assert found["arabic"] == ["rtl", "rtl"] and found["english"] == ["ltr"]
    assert found["smallest"] >= 9  # CSS pixels
    assert found["figures"] > 20
    paper, ink = (
        ("rgb(18, 21, 26)", "rgb(230, 233, 238)"),
        ("rgb(255, 255, 255)", "rgb(28, 33, 40)"),
    )
    assert (found["paper"], found["ink"]) == (paper if dark else ink)
