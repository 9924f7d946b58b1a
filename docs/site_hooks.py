"""What mkdocs calls as it builds the site: places for pages that have none yet, and the API reference, from docstrings.

Depends on mkdocs and the standard library; imports nothing of this project.
"""

from __future__ import annotations

import ast
import logging
from pathlib import Path
from typing import TYPE_CHECKING, Any

from mkdocs.structure.files import File

if TYPE_CHECKING:
    from mkdocs.config.defaults import MkDocsConfig
    from mkdocs.structure.files import Files

ROOT = Path(__file__).resolve().parent.parent
#: Pages of the reference: the packages, and which of their modules those who use them need. What is below is ours.
REFERENCE = {
    "idc": ("domain", "endpoint", "endpoint.blocking", "endpoint.aio", "endpoint.stream", "endpoint.engine", "buffers",
            "buffers.pool", "remote", "registry", "device", "block", "block.device", "block.front", "block.back",
            "block.image", "block.overlay", "block.queues", "block.connection", "block.lease", "block.protocol",
            "block.netlink", "net", "net.device", "net.interface", "net.addresses", "console", "console.client",
            "console.service", "console.device", "console.server", "console.terminals", "console.terminal",
            "console.output", "console.screen", "console.tty", "console.protocol", "pump", "pump.queue", "pump.place",
            "pump.tap", "trace", "transport.base", "transport.address", "region", "channel", "ring", "layout", "blocks",
            "dump", "errors"),
    "testbed": ("bed", "vm", "calls", "topology", "build", "transfer", "network", "faults", "devices", "plugin", "run",
                "registry", "errors"),
    "host": ("region", "broker.service", "devices.controller", "ivshmem.client", "errors"),
    "guest": ("ivshmem", "vfio", "drivers", "agent"),
}

log = logging.getLogger("mkdocs.hooks")


def on_files(files: Files, config: MkDocsConfig) -> Files:
    """Add the reference, and give a place to each page that has none."""
    nav: list[Any] = config.nav if config.nav is not None else []
    pages = []
    for package, modules in REFERENCE.items():
        uri = f"reference/{package}.md"
        files.append(File.generated(config, uri, content=_page(package, modules)))
        pages.append(uri)
    nav.append({"Reference": pages})
    listed = set(_listed(nav))
    more = sorted(file.src_uri for file in files.documentation_pages() if file.src_uri not in listed)
    if more:
        log.info("pages without a place in mkdocs.yml, listed under More: %s", ", ".join(more))
        nav.append({"More": more})
    config.nav = nav
    return files


def _listed(nav: Any) -> list[str]:  # noqa: ANN401 - as YAML has it
    if isinstance(nav, str):
        return [nav]
    values = nav.values() if isinstance(nav, dict) else nav
    return [page for value in values for page in _listed(value)]


def _page(package: str, modules: tuple[str, ...]) -> str:
    """A page of Markdown; raises FileNotFoundError for a module that there is not."""
    parts = [f"# {package}", _summary(ROOT / package / "__init__.py")]
    parts += [f"::: {package}.{module}" for module in modules if _file(package, module)]
    return "\n\n".join(filter(None, parts)) + "\n"


def _file(package: str, module: str) -> Path:
    base = ROOT / package / module.replace(".", "/")
    for path in (base.with_suffix(".py"), base / "__init__.py"):
        if path.is_file():
            return path
    raise FileNotFoundError(f"docs/site_hooks.py lists {package}.{module}, which there is not")


def _summary(path: Path) -> str:
    text = ast.get_docstring(ast.parse(path.read_text())) if path.is_file() else None
    return (text or "").partition("\n\n")[0]
