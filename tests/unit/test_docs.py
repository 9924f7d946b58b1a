"""The pages: links and anchors lead somewhere, messages that they quote are those of the code, examples run."""

from __future__ import annotations

import functools
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import typer

from testbed.cli import build

ROOT = Path(__file__).resolve().parents[2]
DOCS = ROOT / "docs"
PAGES = [ROOT / "README.md", *sorted(DOCS.rglob("*.md"))]
_LINK = re.compile(r"\[(?:[^\[\]]|\[[^\]]*\])*\]\(([^()\s]+)\)")
_FENCE = re.compile(r"^(```|~~~).*?^\1", re.MULTILINE | re.DOTALL)


def prose(page: Path) -> str:
    """Without code."""
    return re.sub(r"`[^`\n]*`", "`code`", _FENCE.sub("", page.read_text()))


def anchors(page: Path) -> set[str]:
    """Those that a forge makes of a page's headings."""
    found: set[str] = set()
    for heading in re.findall(r"^#{1,6} +(.*?)\s*$", _FENCE.sub("", page.read_text()), re.MULTILINE):
        text = re.sub(r"\[([^\]]*)\]\([^)]*\)", r"\1", heading)
        slug = re.sub(r"[^\w\- ]", "", text.lower()).replace(" ", "-")
        number, base = 1, slug
        while slug in found:
            slug, number = f"{base}-{number}", number + 1
        found.add(slug)
    return found


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_links_and_anchors_lead_somewhere(page: Path) -> None:
    wrong = []
    for link in _LINK.findall(prose(page)):
        if re.match(r"[a-z]+:", link):
            assert link.startswith("https://"), f"{page.name}: {link}"
            continue
        path, _, anchor = link.partition("#")
        target = (page.parent / path).resolve() if path else page
        if not target.exists() or ROOT not in target.parents:
            wrong.append(f"{link}: there is no such file")
        elif page != PAGES[0] and DOCS not in target.parents:
            wrong.append(f"{link}: not in docs/, so the site does not have it")
        elif anchor and anchor not in anchors(target):
            wrong.append(f"{link}: no such heading (there are: {', '.join(sorted(anchors(target)))})")
    assert not wrong, f"{page.relative_to(ROOT)}: " + "; ".join(wrong)


def test_pages_have_one_title_each() -> None:
    for page in PAGES[1:]:
        titles = re.findall(r"^# .+", _FENCE.sub("", page.read_text()), re.MULTILINE)
        assert len(titles) == 1, f"{page.relative_to(ROOT)} has {len(titles)} titles"


def _sources() -> str:
    """All of the code, its strings joined as Python joins them."""
    text = "".join(path.read_text() for package in ("testbed", "host", "idc", "guest", "images")
                   for pattern in ("*.py", "*.c") for path in (ROOT / package).rglob(pattern))
    makefile = (ROOT / "Makefile").read_text().replace("$(PYTHON)", "python3")
    return re.sub(r"[\"']\s*\n?\s*f?[\"']", "", text) + makefile


def test_messages_in_troubleshooting_are_those_of_the_code() -> None:
    """What others say (QEMU, the kernel) is in the table of hints, or named here."""
    foreign = {"close_peer_eventfds", "VFIO_IOMMU_MAP_DMA", "soft lockup", "Attempted to kill init", "MASKED", "LATE",
               "QmpFailed"}
    sources, missing = _sources(), []
    for row in re.findall(r"^\| (.*?) \|", (DOCS / "troubleshooting.md").read_text(), re.MULTILINE):
        for quoted in re.findall(r"`([^`]+)`", row):
            for piece in filter(None, (part.strip(" :") for part in quoted.split("..."))):
                words = [piece.replace("qemu-system-x86_64", "").strip(), re.sub(r'"\w+"', ".*", piece)]
                words.append(re.sub(r"\(signal \w+\)", "({how})", piece))
                if piece not in foreign and not any(word in sources for word in words):
                    missing.append(piece)
    assert not missing, f"no code says: {missing}"


def examples(page: str) -> list[str]:
    """The examples of a page that say that they run as a test."""
    return re.findall(r"<!-- runs as a test -->\n```python\n(.*?)```", (DOCS / page).read_text(), re.DOTALL)


def test_the_example_of_a_test_without_vms_runs(tmp_path: Path) -> None:
    _, example = examples("writing-tests.md")
    (tmp_path / "test_it.py").write_text(example)
    done = subprocess.run([sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "test_it.py"], cwd=tmp_path,
                          env={"PYTHONPATH": str(ROOT), "PATH": "/usr/bin:/bin"}, capture_output=True, text=True,
                          timeout=120, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "1 passed" in done.stdout


@functools.cache
def root_command() -> Any:
    return typer.main.get_command(build())


def commands(page: Path) -> list[str]:
    """What follows `testbed` on the page, in text and in code."""
    text = page.read_text()
    blocks = re.findall(r"^(?:    |\$ )(?:.*&& )?(?:\.venv/bin/)?testbed ([a-z].*)$", text, re.MULTILINE)
    return re.findall(r"`(?:\.venv/bin/)?testbed ([a-z][^`\n]*)`", text) + blocks


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_commands_and_options_that_a_page_names_are_there(page: Path) -> None:
    wrong = []
    for line in commands(page):
        words = re.split(r"\s{3,}|\s#|\s&&", line)[0].split()
        command = root_command()
        while words and (below := getattr(command, "commands", None)):
            name = words.pop(0).split("|")[0].rstrip(",")
            if name not in below:
                wrong.append(f"{line}: no command {name}")
                break
            command = below[name]
        known = {option for each in command.params for option in (*each.opts, *each.secondary_opts)} | {"--help"}
        for word in words[:words.index("--")] if "--" in words else words:
            option = word.strip("[],.").split("=")[0]
            if option.startswith("--") and option not in known:
                wrong.append(f"{line}: no option {option}")
    assert not wrong, f"{page.relative_to(ROOT)}: " + "; ".join(wrong)
