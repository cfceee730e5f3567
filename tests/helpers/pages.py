"""What a page holds, as a parser and as a browser see it."""

import json
import subprocess
from html import unescape
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

VOID = {"meta", "link", "img", "br"}


class _Reader(HTMLParser):
    def __init__(self) -> None:
        super().__init__()
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.open: list[str] = []
        self.text: list[str] = []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))
        if tag not in VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))

    def handle_endtag(self, tag: str) -> None:
        assert self.open and self.open.pop() == tag, f"</{tag}> closes what is not open"

    def handle_data(self, data: str) -> None:
        if self.open and self.open[-1] not in {"style", "title"}:
            self.text.append(data)


def _read(page: str) -> _Reader:
    reader = _Reader()
    reader.feed(page)
    reader.close()
    assert reader.open == [], f"{reader.open} are never closed"
    return reader


def tags_of(page: str) -> list[tuple[str, dict[str, str | None]]]:
    """Each element's name and attributes; every element must be closed."""
    return _read(page).tags


def shown_text(page: str) -> str:
    """All that is shown."""
    return "".join(_read(page).text)


def in_browser(page: Path, width: int, dark: bool, script: str, scratch: Path) -> dict[str, Any]:
    """Show a page in headless Chromium, and say what an expression makes of it.

    Args:
        page: The file.
        width: Of the screen, CSS pixels.
        dark: Whether the reader prefers a dark one.
        script: An expression of JavaScript of the page's window `page` and document `doc`.
        scratch: A directory to write to.
    """
    content = json.dumps(page.read_text()).replace("</", "<\\/")
    around = scratch / "around.html"
    around.write_text(
        f"""<!doctype html><body><iframe width="{width}" height="800"></iframe><pre></pre><script>
const frame = document.querySelector("iframe");
frame.onload = () => {{
  const page = frame.contentWindow, doc = page.document;
  document.querySelector("pre").textContent = JSON.stringify({script});
}};
frame.srcdoc = {content};
</script>""",
    )
    done = subprocess.run(
        [
            "chromium",
            "--headless",
            "--no-sandbox",
            "--disable-gpu",
            f"--user-data-dir={scratch / 'profile'}",
            f"--blink-settings=preferredColorScheme={0 if dark else 1}",
            "--virtual-time-budget=10000",
            "--dump-dom",
            around.as_uri(),
        ],
        check=True,
        capture_output=True,
        text=True,
        timeout=120,
    )
    said = done.stdout.split("<pre>")[1].split("</pre>")[0]
    found: dict[str, Any] = json.loads(unescape(said))
    return found
