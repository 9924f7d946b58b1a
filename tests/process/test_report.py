"""The report as a reader gets it: opened in a real browser, by mouse and keyboard, small and large, dark and light."""

from __future__ import annotations

import dataclasses
import json
import re
import shutil
from typing import TYPE_CHECKING, Any

import pytest
from axe_playwright_python.sync_playwright import Axe
from playwright.sync_api import sync_playwright
from report_support import made_up

from testbed.bootstrap import BROWSERS
from testbed.report.page import Against, render
from testbed.results.compare import compare

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

    from playwright.sync_api import Browser, Page

#: What is enough to have every kind of plot once: a page that is looked at by hundreds of rules at every element.
FEW = {"domains": ("process",), "devices": False, "names": ("rtt", "rate", "bulk")}
#: Of any wait for the browser, on a machine that has much else to do.
TIMEOUT_MS = 120_000
PHONE, DESK = {"width": 360, "height": 740}, {"width": 1280, "height": 900}


@pytest.fixture(scope="module")
def browser() -> Iterator[Browser]:
    found = next(filter(None, map(shutil.which, BROWSERS)), None)
    assert found, f"none of {', '.join(BROWSERS)} is installed; make setup-dev installs the first"
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=found, timeout=TIMEOUT_MS)
        yield browser
        browser.close()


@pytest.fixture(scope="module")
def file(tmp_path_factory: pytest.TempPathFactory, request: pytest.FixtureRequest) -> Path:
    """A page with everything on it, or with less."""
    run = made_up(**getattr(request, "param", {}))
    first, second = (dataclasses.replace(run.result, session="one", version=version,
                                         results=tuple(dataclasses.replace(row, rounds=row.rounds * 4)
                                                       for row in run.result.results[:30]))
                     for version in ("base", "this"))  # fmt: skip
    path = tmp_path_factory.mktemp("report") / "report.html"
    path.write_text(render(run, Against(6, 7, "this against base", compare(first, second))))
    return path


class Opened:
    """A page, and all that went wrong on it."""

    def __init__(self, page: Page, file: Path) -> None:
        self.page = page
        self.wrong: list[str] = []
        self.asked: list[str] = []
        page.on("console", lambda message: self.wrong.append(f"{message.type}: {message.text}"))
        page.on("pageerror", lambda error: self.wrong.append(f"error: {error}"))
        page.on("request", lambda request: self.asked.append(request.url))
        page.goto(file.as_uri())
        page.wait_for_selector(".plot svg")

    def places(self) -> Iterator[str]:
        """Shows one place after the other, as a reader would who has no mouse."""
        radios = self.page.locator(".places input")
        radios.first.focus()
        for number in range(radios.count()):
            if number:
                self.page.keyboard.press("ArrowRight")
            name = radios.nth(number).get_attribute("value")
            assert name is not None
            self.page.wait_for_function("id => [...document.querySelectorAll(`#${id} .plot`)].every(e => e.firstChild)",
                                        arg=name)
            yield name


@pytest.fixture
def opened(browser: Browser, file: Path, request: pytest.FixtureRequest) -> Iterator[Opened]:
    options = {"viewport": DESK, "color_scheme": "light"} | getattr(request, "param", {})
    context = browser.new_context(offline=True, **options)
    context.set_default_timeout(TIMEOUT_MS)
    found = Opened(context.new_page(), file)
    yield found
    context.close()
    assert found.wrong == []
    assert found.asked == [file.as_uri()], "it loads nothing"


def test_every_plot_has_marks_a_name_and_the_accelerator(opened: Opened, file: Path) -> None:
    found = re.search(r'<script type="application/json" id="data">(.*?)</script>', file.read_text(), re.DOTALL)
    assert found is not None
    figures: dict[str, Any] = json.loads(found[1])
    seen = set()
    for _ in opened.places():
        for plot in opened.page.locator(".plot:visible").all():
            name = plot.get_attribute("data-figure")
            assert name is not None
            seen.add(name)
            figure, svg = figures[name], plot.locator("svg").first
            shown = figure["series"] or figure["items"]
            assert svg.locator('[data-mark="dot"] path, [data-mark="dot"] circle').count() >= len(shown), name
            if figure["series"]:
                assert svg.locator('[data-mark="line"] path').count() == len(shown)
                assert svg.locator(".names text").count() == len(shown)
            assert "NaN" not in svg.evaluate("e => e.innerHTML"), name
            assert "TCG" in (svg.locator(".stamp").text_content() or ""), "also where no VM took part"
            assert svg.get_attribute("role") == "img"
            title = svg.locator("title").first.text_content()
            assert title == f"{figure['title']} ({figure['stamp']})"
            table = opened.page.locator(f"#{name}-table")
            assert table.locator("tbody tr").count() >= len(shown)
    assert seen == figures.keys()
    assert opened.page.locator("b").count() == 0, "what the data hold is text"


BOXES = """svg => [...svg.querySelectorAll("text")].filter(e => e.textContent.trim()).map(e => {
  const box = e.getBoundingClientRect(), own = svg.getBoundingClientRect();
  return [e.textContent, box.left, box.top + 2, box.right, box.bottom - 2, own.left, own.right]; })"""


@pytest.mark.parametrize("opened", [{"viewport": PHONE}, {"viewport": DESK}], indirect=True, ids=["phone", "desk"])
def test_nothing_overlaps_or_hangs_out(opened: Opened) -> None:
    width = opened.page.evaluate("innerWidth")
    for _ in opened.places():
        assert opened.page.evaluate("document.documentElement.scrollWidth") <= width, "no horizontal scrolling"
        for svg in opened.page.locator(".plot:visible svg[role=img]").all():
            words = svg.evaluate(BOXES)
            for index, (text, left, top, right, bottom, low, high) in enumerate(words):
                assert low - 1 <= left, text
                assert right <= high + 1, text
                for other, left2, top2, right2, bottom2, *_ in words[:index]:
                    apart = right <= left2 or right2 <= left or bottom <= top2 or bottom2 <= top
                    assert apart, f"{text!r} and {other!r} in {svg.locator('title').first.text_content()}"


@pytest.mark.parametrize("opened", [{"color_scheme": "dark"}, {"color_scheme": "light"}], indirect=True,
                         ids=["dark", "light"])
@pytest.mark.parametrize("file", [FEW], indirect=True, ids=["few"])
def test_it_can_be_read_by_all(opened: Opened) -> None:
    for details in opened.page.locator("details").all()[:2]:
        details.evaluate("e => { e.open = true }")
    found = Axe().run(opened.page)
    assert found.violations_count == 0, found.generate_report()
    contrasts = opened.page.evaluate(CONTRASTS)
    assert len(contrasts) >= 7
    assert {name: ratio for name, ratio in contrasts.items() if ratio < 3} == {}, "WCAG 1.4.11: graphics, 3 to 1"


CONTRASTS = """() => {
  const probe = document.body.appendChild(document.createElement("span"));
  const light = (name) => { probe.style.color = `var(${name})`;
    const [r, g, b] = getComputedStyle(probe).color.match(/[\\d.]+/g).map(v => v / 255).map(v => v <= 0.04045 ? v / 12.92 : ((v + 0.055) / 1.055) ** 2.4);
    return 0.2126 * r + 0.7152 * g + 0.0722 * b; };
  const back = light("--back"), found = {};
  for (const name of ["polled", "doorbell", "adaptive", "peer", "peer2", "limit", "other"]) {
    const own = light(`--c-${name}`);
    found[name] = (Math.max(own, back) + 0.05) / (Math.min(own, back) + 0.05);
  }
  probe.remove();
  return found; }"""  # noqa: E501 - arithmetic of WCAG


def test_lines_differ_in_more_than_colour(file: Path) -> None:
    styles = {name or quoted: (symbol, dash) for name, quoted, symbol, dash in
              re.findall(r'(?:(\w+)|"([\w-]+)"): \["\w+", "(\w+)"(?:, "([\d ]+)")?\]', file.read_text())}
    assert len(styles) > 15
    found = re.search(r'id="data">(.*?)</script>', file.read_text(), re.DOTALL)
    assert found is not None
    for figure in json.loads(found[1]).values():
        looks = [styles[each["style"]] for each in figure["series"]]
        assert len(set(looks)) == len(looks), figure["id"]


def test_tables_sort_and_filter_by_keyboard(opened: Opened) -> None:
    page = opened.page
    filter_ = page.locator("#rows-table").locator("xpath=ancestor::*[@data-table]").locator("input")
    rows = page.locator("#rows-table tbody tr")
    whole = rows.count()
    filter_.focus()
    page.keyboard.type("STREAM 64 kib")
    shown = page.locator("#rows-table tbody tr:visible")
    few = shown.count()
    assert 0 < few < whole
    assert all("stream" in text for text in shown.all_inner_texts())
    status = page.locator("#rows-table").locator("xpath=ancestor::*[@data-table]").locator("[role=status]")
    assert status.text_content() == f"{few} of {whole} rows"
    page.keyboard.press("Tab")  # the region that scrolls
    page.keyboard.press("Tab")
    heads = page.locator("#rows-table th")
    for _ in range(4):
        page.keyboard.press("Tab")
    assert page.evaluate("document.activeElement.textContent") == "median"
    for key, direction in (("Enter", "ascending"), ("Space", "descending")):
        page.keyboard.press(key)
        assert heads.nth(4).get_attribute("aria-sort") == direction
        values = [float(value or 0) for value in
                  shown.locator("td:nth-child(5)").evaluate_all("cells => cells.map(e => e.dataset.sort)")]
        assert values == sorted(values, reverse=direction == "descending")
    heads.nth(2).locator("button").click()
    texts = shown.locator("td:nth-child(3)").all_inner_texts()
    assert texts == sorted(texts, key=str.lower)
    assert heads.nth(4).get_attribute("aria-sort") == "none"


def test_a_plot_follows_the_width_of_its_window(opened: Opened) -> None:
    box = opened.page.locator(".plot:visible").first
    before = box.locator("svg").first.get_attribute("width")
    opened.page.set_viewport_size({"width": 700, "height": 900})
    opened.page.wait_for_function("before => document.querySelector('.plot svg').getAttribute('width') !== before",
                                  arg=before)
    assert float(box.locator("svg").first.get_attribute("width") or 0) <= 700


@pytest.mark.parametrize("file", [FEW], indirect=True, ids=["few"])
def test_without_javascript_every_figure_is_there(browser: Browser, file: Path) -> None:
    context = browser.new_context(java_script_enabled=False)
    context.set_default_timeout(TIMEOUT_MS)
    page = context.new_page()
    page.goto(file.as_uri())
    assert page.locator("noscript").is_visible()
    assert page.locator("#rows-table tbody tr").count() > 40
    assert page.locator("[data-place]").first.is_visible()
    context.close()
