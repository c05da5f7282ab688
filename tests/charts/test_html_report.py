"""The HTML report: self-contained, well formed, with the numbers of the cost report; laid out for phone and desktop."""

from __future__ import annotations

import re
import shutil
import subprocess
from html.parser import HTMLParser
from pathlib import Path

import pytest

import tnmoe
from tnmoe.charts.html_report import html_report
from tnmoe.cli.main import main
from tnmoe.presets.registry import PRESETS

CHROMIUM = shutil.which("chromium")
VOID = {"meta", "br", "hr", "img", "link", "input"}


class Balanced(HTMLParser):
    """Every tag is closed in turn; what could be fetched is collected."""

    def __init__(self) -> None:
        super().__init__()
        self.open: list[str] = []
        self.links: list[str] = []
        self.text: list[str] = []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        if tag not in VOID:
            self.open.append(tag)
        self.links += [value for key, value in attrs if key in ("src", "href", "srcset", "data") and value]

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        pass

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        self.text.append(data)


@pytest.fixture(scope="module")
def page() -> str:
    return html_report([tnmoe.plan(PRESETS[name].spec, tokens=64) for name in ("gpt2-tr", "clip-128-cp")])


@pytest.mark.slow
def test_page_is_whole(page: str) -> None:
    """Nothing is fetched: links stay on the page, styles import nothing."""
    parser = Balanced()
    parser.feed(page)
    assert parser.open == []
    assert parser.links == ["#layer-0", "#layer-1"]
    assert "@import" not in page
    assert "url(" not in page
    assert "<script" not in page
    text = "".join(parser.text)
    for figure in ("4,784,808", "769,842", "class TensorRingMuMoEBlock", "class CPMuMoE"):
        assert figure in text
    assert page.count("<svg") == 3 + 2 + 2 + 1  # two networks with an order in the block, one in the head, two gates


def test_source_in_the_page_is_the_emitted_one() -> None:
    plan = tnmoe.plan(PRESETS["clip-128-cp"].spec, tokens=64)
    parser = Balanced()
    parser.feed(re.search(r'<pre class="code">.*?</pre>', html_report([plan]), re.S)[0])
    assert "".join(parser.text).strip() == tnmoe.emit(plan).strip()


def test_names_are_escaped() -> None:
    page = html_report([tnmoe.plan(PRESETS["clip-linear"].spec)], "<b>&", ["<i>"])
    assert "<title>&lt;b&gt;&amp;</title>" in page
    assert "<i>" not in page


def test_layers_that_are_not_emitted_say_so() -> None:
    page = html_report([tnmoe.plan(tnmoe.Network.parse("ab,bc->ac"), sizes={"a": 2, "b": 3, "c": 4})])
    assert "<svg" in page


def test_command_writes_it(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "report.html"
    with pytest.raises(SystemExit) as stop:
        main(["report", "clip-128-tr", "--title", "Heads", "-o", str(out)])
    assert stop.value.code == 0
    assert out.read_text().startswith("<!DOCTYPE html>")
    assert "<title>Heads</title>" in out.read_text()
    assert "wrote" in capsys.readouterr().out


@pytest.mark.slow
@pytest.mark.skipif(CHROMIUM is None, reason="Chromium is not installed")
@pytest.mark.parametrize("width", [390, 1280])
def test_page_fits_the_window(page: str, tmp_path: Path, width: int) -> None:
    """In a browser the page never scrolls sideways; wide tables scroll within themselves, and formulas are rendered."""
    probe = """<script>addEventListener("load", () => {
      const m = document.querySelector("math").getBoundingClientRect();
      document.title = [document.documentElement.scrollWidth, innerWidth, m.width > 20].join(" ");
    })</script></body>"""
    file = tmp_path / "page.html"
    file.write_text(page.replace("</body>", probe))
    flags = ["--headless", "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run", "--hide-scrollbars"]
    flags += ["--disable-background-networking", "--disable-component-update", "--disable-sync"]
    flags += [f"--user-data-dir={tmp_path / 'profile'}", f"--window-size={width},900", "--dump-dom"]
    done = subprocess.run([CHROMIUM, *flags, file.as_uri()], capture_output=True, text=True, timeout=120)
    content, window, rendered = re.search(r"<title>(.*?)</title>", done.stdout)[1].split()
    assert int(content) <= int(window)
    assert rendered == "true"
