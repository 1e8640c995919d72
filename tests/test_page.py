"""page.py and what it makes, in a real browser: the slider is moved and the numbers are read."""

from __future__ import annotations

import copy
import json
import re
import shlex
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from browser import CHROMIUM, Browser
from programs import COMMON, ROOT, Road, exit_code, run

from supernet.amounts import format_amount

needs_chromium = pytest.mark.skipif(CHROMIUM is None, reason="no Chromium here: apt-get install chromium")


@pytest.fixture(scope="module")
def folder(road: Road, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An evaluated super-network and its page."""
    folder = tmp_path_factory.mktemp("evaluated")
    run("main.py", "--eval", *COMMON, "--checkpoint", road.super_network, "--baseline", road.contracted,
        "--frontier", 5, "--output-dir", folder)  # fmt: skip
    run("page.py", folder)
    return folder


@pytest.fixture(scope="module")
def report(folder: Path) -> dict[str, Any]:
    return json.loads((folder / "frontier.json").read_text())


@pytest.fixture(scope="module")
def browser(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Browser]:
    with Browser(tmp_path_factory.mktemp("profile")) as browser:
        yield browser


def from_small_to_large(report: dict[str, Any]) -> list[dict[str, Any]]:
    return sorted(report["sizes"], key=lambda size: size["macs_linear"])


def assert_shows(browser: Browser, size: dict[str, Any], report: dict[str, Any]) -> None:
    """Everything that the page says of its chosen size, against the report."""
    assert browser.text("#op-code") == str(size["op_code"])
    assert browser.text("#macs").splitlines()[0] == format_amount(size["macs_linear"])
    assert browser.text("#params") == format_amount(size["params"])
    assert browser.text("#agreement") == f"{size['agreement']:.2f} %"
    assert browser.text("#kl") == f"{size['kl']:.2g} nats"
    top1, baseline = browser.text("#top1").splitlines()
    assert top1 == f"{size['top1']:.2f} %" and baseline == f"{size['baseline_top1']:.2f} % untrained"
    shown, unit = browser.text("#latency").splitlines()[0].split()
    assert unit == "ms" and float(shown) == pytest.approx(1000 / size["images_per_second"], rel=0.01)
    rows = browser.run(
        "[...document.querySelectorAll('#widths tr')].map((row) => [...row.cells].map((c) => c.innerText))"
    )
    full = report["full_widths"]
    for block, (name, _, attention, _, hidden) in enumerate(rows):
        assert name == str(block)
        for key, text in ((f"{block}.attn", attention), (f"{block}.mlp", hidden)):
            assert text == (f"{size['widths'][key]} of {full[key]}" if size["widths"][key] else "bypassed")
    assert 2 * len(rows) == len(full)
    assert f"--op-code {size['op_code']} --write-sub-networks" in browser.text("#command")
    assert browser.run("location.hash") == f"#op_code={size['op_code']}"
    assert browser.run(
        "[...document.querySelectorAll('#sizes tr[aria-current]')].map((row) => row.cells[0].innerText)"
    ) == [str(size["op_code"])]


def place_of(browser: Browser, selector: str) -> list[float]:
    """Left, right and middle height of an element, in pixels."""
    place = f"document.querySelector({json.dumps(selector)}).getBoundingClientRect()"
    return browser.run(f"(({{left, right, top, height}}) => [left, right, top + height / 2])({place})")


@needs_chromium
def test_the_slider_shows_each_size(browser: Browser, folder: Path, report: dict[str, Any]):
    browser.open(folder / "index.html")
    sizes = from_small_to_large(report)
    assert len(sizes) == 5
    assert_shows(browser, sizes[2], report)
    browser.press("Tab")
    assert browser.run("document.activeElement.id") == "size"
    for key, index in (("Home", 0), ("ArrowRight", 1), ("ArrowRight", 2), ("End", 4), ("ArrowLeft", 3)):
        browser.press(key)
        assert_shows(browser, sizes[index], report)
    browser.screenshot(folder / "page.png")  # to look at, where pytest keeps it
    assert (folder / "page.png").read_bytes().startswith(b"\x89PNG")
    assert format_amount(sizes[3]["macs_linear"]) in browser.run(
        "document.activeElement.getAttribute('aria-valuetext')"
    )
    assert browser.complaints == []


@needs_chromium
def test_the_slider_and_the_points_heed_the_mouse(browser: Browser, folder: Path, report: dict[str, Any]):
    browser.open(folder / "index.html")
    sizes = from_small_to_large(report)
    left, right, y = place_of(browser, "#size")
    browser.click(right - 4, y)
    assert_shows(browser, sizes[-1], report)
    browser.click(left + 4, y)
    assert_shows(browser, sizes[0], report)
    left, right, y = place_of(browser, ".point:nth-of-type(4)")
    browser.click((left + right) / 2, y)
    assert_shows(browser, sizes[3], report)
    assert browser.complaints == []


@needs_chromium
def test_an_address_names_a_size(browser: Browser, folder: Path, report: dict[str, Any]):
    for size in report["sizes"]:
        browser.open(folder / "index.html", f"#op_code={size['op_code']}")
        assert_shows(browser, size, report)
    browser.run("location.hash = '#op_code=0'")
    browser.open(folder / "index.html", "#op_code=<img>")
    assert_shows(browser, from_small_to_large(report)[2], report)


@needs_chromium
@pytest.mark.parametrize(
    ("values", "ticks"),
    [
        # measure -> the values of two sizes, what the page says of them; the ticks of the first measure
        ({"agreement": (85.5, 99.0, "85.50 %", "99.00 %"), "kl": (0.0123, 2.5e-7, "0.012 nats", "2.5e-07 nats")},
         ["85", "90", "95", "100"]),
        ({"token_cosine": (-0.25, 1.0000001, "-0.2500", "1.0000"), "token_cosine_p5": (-0.5, 0.75, "-0.5000", "0.7500"),
          "feature_cosine": (0.5, 0.98766, "0.5000", "0.9877")}, ["-0.5", "0.0", "0.5", "1.0"]),
        ({"knn": (97.0, 97.0, "97.00 %", "97.00 %")}, ["97", "98"]),
    ],
)  # fmt: skip
def test_what_was_measured_is_shown(values: dict, ticks: list[str], browser: Browser, report: dict, tmp_path: Path):
    """Without labels, and of encoders."""
    changed = copy.deepcopy(report)
    changed["sizes"] = from_small_to_large(changed)[:2]
    for size in changed["sizes"]:
        for name in ("top1", "top5", "loss", "agreement", "kl", "baseline_top1"):
            size.pop(name, None)
    for index, size in enumerate(changed["sizes"]):
        size |= {name: found[index] for name, found in values.items()}
    (tmp_path / "frontier.json").write_text(json.dumps(changed))
    run("page.py", tmp_path)
    browser.resize(1000, 900)
    for index, size in enumerate(changed["sizes"]):
        browser.open(tmp_path / "index.html", f"#op_code={size['op_code']}")
        assert {name: browser.text(f"#{name}") for name in values} == {
            n: found[2 + index] for n, found in values.items()
        }
    marks = "[...document.querySelectorAll('#chart text')].map((mark) => mark.textContent)"
    assert browser.run(marks)[: len(ticks)] == ticks
    points = "[...document.querySelectorAll('.point')].every((p) => p.getBBox().y > 0 && p.getBBox().y < 360)"
    assert browser.run(points)
    assert "top-1" not in browser.text("main").lower().replace("same top-1 as", "") and browser.complaints == []


@needs_chromium
@pytest.mark.parametrize("width", [320, 390, 1000])
def test_it_fits_the_screen_and_loads_nothing(width: int, browser: Browser, folder: Path):
    browser.resize(width, 800)
    browser.open(folder / "index.html")
    assert browser.run("document.documentElement.scrollWidth") <= width
    assert browser.run("chart.getBoundingClientRect().width") > 0.8 * min(width, 960)
    assert browser.run("performance.getEntriesByType('resource').length") == 0


@needs_chromium
@pytest.mark.parametrize(
    "text", ["</script><script>document.title = 'broken'</script>", "<!--<script>", "&lt;b> {{data}}"]
)
def test_nothing_in_a_report_breaks_out_of_it(text: str, browser: Browser, report: dict[str, Any], tmp_path: Path):
    hostile = copy.deepcopy(report) | {"title": text, "weights": text, "device": text, "arguments": [text]}
    hostile["full_widths"][text] = 8
    for size in hostile["sizes"]:
        size["widths"][text] = 4
    (tmp_path / "frontier.json").write_text(json.dumps(hostile))
    run("page.py", tmp_path)
    browser.open(tmp_path / "index.html")
    assert browser.run("document.title") == text and browser.text("h1") == text
    assert text in browser.text("#facts") and shlex.quote(text) in browser.text("#command")
    assert browser.run("document.scripts.length") == 2
    assert browser.complaints == []


def test_the_command_cuts_out_what_the_page_shows(folder: Path, report: dict[str, Any], tmp_path: Path):
    page = (folder / "index.html").read_text()
    data = json.loads(re.search(r'<script type="application/json" id="data">(.*?)</script>', page, re.DOTALL)[1])
    size = data["sizes"][1]
    program, *words = shlex.split(size["command"])[1:]
    words[words.index("--output-dir") + 1] = str(tmp_path)
    run(program, *words, "--workers", 0, "--device", "cpu")
    written = json.loads((tmp_path / f"op_{size['op_code']}" / "config.json").read_text())
    assert written["widths"] == size["widths"] and written["params"] == size["params"]
    assert written["accuracy"]["top1"] == pytest.approx(size["top1"])


def test_the_page_in_docs_is_of_this_template():
    """docs/index.html is what page.py makes of its data now: neither half was changed alone."""
    template = re.split(r"\{\{\w+\}\}", (ROOT / "report" / "page.html").read_text())
    page = (ROOT / "docs" / "index.html").read_text()
    assert all(part in page for part in template)
    assert "http" not in re.sub(r'"http://www.w3.org/2000/svg"', "", page)
    assert "/tmp/" not in page and "/home/" not in page


@pytest.mark.parametrize(
    ("change", "named"),
    [
        (lambda report: report.pop("full_widths"), "full_widths"),
        (lambda report: report.update(sizes=[]), "no sizes"),
        (lambda report: report["sizes"][1].pop("widths"), "sizes.1.widths"),
        (lambda report: report["sizes"][0].update(top1=float("nan")), "sizes.0.top1"),
        (lambda report: [report["sizes"][0].pop(key) for key in ("top1", "top5", "agreement", "kl")], "sizes.0.top1"),
        (lambda report: report["sizes"][1].pop("kl"), "sizes.1.kl"),
        (lambda report: report["sizes"][1].update(agreement=-1), "sizes.1.agreement"),
        (lambda report: report["sizes"][0].update(macs_linear="1"), "sizes.0.macs_linear"),
        (lambda report: report["full_widths"].update({"0.mlp": 0}), "full_widths.0.mlp"),
    ],
)
def test_a_report_that_lacks_something_is_refused(change, named: str, report: dict[str, Any], tmp_path: Path, capsys):
    damaged = copy.deepcopy(report)
    change(damaged)
    (tmp_path / "frontier.json").write_text(json.dumps(damaged))
    assert exit_code("page.py", tmp_path) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("page.py: error: ") and named in line
    assert not (tmp_path / "index.html").exists()


def test_a_file_that_is_no_page_is_not_written_over(folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture):
    (tmp_path / "notes.html").write_text("mine")
    assert exit_code("page.py", folder, "--output", tmp_path / "notes.html") == 2
    assert "notes.html exists and is not a page of page.py: give another --output" in capsys.readouterr().err
    assert (tmp_path / "notes.html").read_text() == "mine"
    for _ in range(2):  # a page is made anew as often as one likes
        run("page.py", folder, "--output", tmp_path / "index.html")


def test_a_folder_without_a_report_is_named(tmp_path: Path, capsys: pytest.CaptureFixture):
    assert exit_code("page.py", tmp_path / "nowhere") == 2
    assert f"cannot read {tmp_path / 'nowhere' / 'frontier.json'}" in capsys.readouterr().err
