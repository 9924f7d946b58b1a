"""The documentation as a site: built with warnings as errors, searchable, with the reference, fetching nothing."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from html.parser import HTMLParser
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]


class Page(HTMLParser):
    """Ids, links, and what a browser would fetch."""

    def __init__(self, path: Path) -> None:
        super().__init__()
        self.ids: set[str] = set()
        self.links: list[str] = []
        self.fetched: list[str] = []
        self.feed(path.read_text())

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        given = dict(attrs)
        self.ids |= {value for name in ("id", "name") if (value := given.get(name))}
        if tag == "a" and (link := given.get("href")):
            self.links.append(link)
        source = given.get("src") if tag in ("script", "img", "iframe") else (
            given.get("href") if tag == "link" and given.get("rel") in ("stylesheet", "icon") else None)
        if source:
            self.fetched.append(source)


def build(config: Path, target: Path) -> subprocess.CompletedProcess[str]:
    return subprocess.run([sys.executable, "-m", "mkdocs", "build", "-f", str(config), "-d", str(target)],
                          cwd=config.parent, env={**os.environ, "NO_MKDOCS_2_WARNING": "1"}, capture_output=True,
                          text=True, timeout=280, check=False)


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Path:
    target = tmp_path_factory.mktemp("site")
    done = build(ROOT / "mkdocs.yml", target)
    assert done.returncode == 0, done.stdout + done.stderr
    return target


@pytest.fixture(scope="module")
def pages(site: Path) -> dict[Path, Page]:
    return {path: Page(path) for path in site.rglob("*.html")}


def test_every_page_is_there_and_nothing_is_fetched_from_elsewhere(site: Path, pages: dict[Path, Page]) -> None:
    names = {str(path.relative_to(site)) for path in pages}
    docs = ROOT / "docs"
    assert {str(path.relative_to(docs).with_suffix(".html")) for path in docs.rglob("*.md")} <= names
    assert {f"reference/{package}.html" for package in ("idc", "testbed", "host", "guest")} <= names
    for path, page in pages.items():
        for source in page.fetched:
            assert not re.match(r"(https?:)?//", source), f"{path.name} fetches {source}"


def test_links_of_the_site_lead_somewhere(site: Path, pages: dict[Path, Page]) -> None:
    wrong = []
    for path, page in pages.items():
        if path.name == "404.html":
            continue  # its links are from the root of a server
        for link in page.links:
            if re.match(r"[a-z]+:", link):
                continue
            where, _, anchor = link.partition("#")
            target = (path.parent / where).resolve() if where else path
            if target.is_dir():
                target /= "index.html"
            if not target.exists() or (anchor and target in pages and anchor not in pages[target].ids):
                wrong.append(f"{path.relative_to(site)}: {link}")
    assert not wrong


def test_the_reference_has_what_users_need(site: Path, pages: dict[Path, Page]) -> None:
    ids = pages[site / "reference/idc.html"].ids
    assert {"idc.domain.Domain", "idc.domain.Domain.connect", "idc.endpoint.blocking.Caller.transact",
            "idc.registry.Registry"} <= ids
    assert {"testbed.bed.Testbed", "testbed.vm.Vm.succeed"} <= pages[site / "reference/testbed.html"].ids


def test_search_finds_pages_and_docstrings(site: Path) -> None:
    index = json.loads((site / "search/search_index.json").read_text())
    found = {entry["location"].partition("#")[0] for entry in index["docs"] if "doorbell" in entry["text"].lower()}
    assert {"protocol.html", "idc.html", "reference/idc.html"} <= found


def small(tmp_path: Path, **pages: str) -> subprocess.CompletedProcess[str]:
    """A site of these pages by our own settings and hooks, but without the reference and the list of pages."""
    (tmp_path / "docs").mkdir()
    config = (ROOT / "mkdocs.yml").read_text().partition("  - mkdocstrings")[0]
    (tmp_path / "mkdocs.yml").write_text(config + "nav:\n  - index.md\n")
    text = (ROOT / "docs/site_hooks.py").read_text()
    hooks = re.sub(r"REFERENCE = \{.*?\n\}", "REFERENCE = {}", text, flags=re.DOTALL)
    (tmp_path / "docs/site_hooks.py").write_text(hooks)
    for name, content in pages.items():
        (tmp_path / f"docs/{name}.md").write_text(content)
    return build(tmp_path / "mkdocs.yml", tmp_path / "site")


@pytest.mark.parametrize("link", ["absent.md", "#absent"])
def test_what_is_wrong_is_an_error_that_names_it(tmp_path: Path, link: str) -> None:
    done = small(tmp_path, index=f"# x\n[y]({link})\n")
    assert done.returncode == 1
    assert link in done.stderr + done.stdout
    assert "strict mode" in done.stderr + done.stdout


def test_a_page_without_a_place_is_listed_all_the_same(tmp_path: Path) -> None:
    done = small(tmp_path, index="# x\n", new="# A new page\n")
    assert done.returncode == 0, done.stderr
    assert "pages without a place in mkdocs.yml, listed under More: new.md" in done.stderr + done.stdout
    assert "new.html" in Page(tmp_path / "site/index.html").links
