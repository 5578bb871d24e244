"""The README and the pages stay true: their python blocks run, their tables match the code."""

from __future__ import annotations

import inspect
import re
import sys
import tomllib
from importlib.util import find_spec
from pathlib import Path

import matplotlib.pyplot as plt
import pytest

import boltzsample as bz

ROOT = Path(__file__).parent.parent
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]


def blocks(page: Path) -> list[tuple[int, str, str | None]]:
    """(first line, code, the package it needs) of the page's python blocks; `<!-- needs: jax -->` on the line above names a package."""
    text = page.read_text()
    found = re.finditer(r"^(?:<!-- needs: (\w+) -->\n)?```python\n(.*?)^```$", text, re.M | re.S)
    return [(text[: m.start(2)].count("\n"), m[2], m[1]) for m in found]


@pytest.mark.parametrize("page", PAGES, ids=lambda p: p.name)
def test_examples_run(page: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    namespace: dict[str, object] = {"__name__": "example"}
    assert blocks(page), "a page has at least one executed example"
    missing = set()
    for line, code, needs in blocks(page):
        if needs is not None and find_spec(needs) is None:
            missing.add(needs)
        else:
            exec(compile("\n" * line + code, str(page), "exec"), namespace)  # blank lines: a traceback shows the page's line
    plt.close("all")
    if "jax" in sys.modules:
        sys.modules["jax"].config.update("jax_enable_x64", False)  # a page may switch it on
    if missing:
        pytest.skip(f"the other blocks ran; some need {', '.join(missing)}")


def test_ci_installs_what_the_pages_need() -> None:
    """CI installs the extra `test`: with it, no block of a page is passed over."""
    extras = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["optional-dependencies"]
    needed = {needs for page in PAGES for _, _, needs in blocks(page) if needs}
    assert "jax" in needed
    assert needed <= set(re.findall(r"\w+", extras["test"][0])), "the first entry of `test` names the extras it takes in"


def test_every_page_is_in_the_contents() -> None:
    contents = (ROOT / "docs" / "index.md").read_text()
    assert all(re.search(rf"^{p.stem}$", contents, re.M) for p in PAGES[1:] if p.stem != "index")


def test_readme_table_is_the_registry() -> None:
    from boltzsample.registry import METHODS

    table = re.search(r"<!-- methods: begin.*?-->\n(.*?)<!-- methods: end -->", (ROOT / "README.md").read_text(), re.S)
    assert table
    yes = {True: "yes", False: "no"}
    rows = [[cell.strip(" `") for cell in row.strip("|").split("|")] for row in re.findall(r"^\|.*`.*$", table[1], re.M)]
    assert rows == [[name, yes[m.needs_gradient], m.promise, yes[m.log_z]] for name, m in METHODS.items()]


def test_readme_names_real_commands() -> None:
    makefile = (ROOT / "Makefile").read_text()
    text = "".join(p.read_text() for p in [*PAGES, ROOT / "CONTRIBUTING.md"])
    commands = {word for line in re.findall(r"^make ([a-z ]+)", text, re.M) for word in line.split("  ")[0].split()}
    assert commands >= {"demo", "test"}
    assert all(f"\n{c}:" in makefile for c in commands)


@pytest.mark.parametrize("name", [n for n in bz.__all__ if not n.startswith("_")])
def test_public_names_have_docstrings(name: str) -> None:
    bz.sample, bz.load  # noqa: B018 (both import submodules, which must not take the place of a name)
    public = getattr(bz, name)
    assert callable(public) and not inspect.ismodule(public)
    assert (inspect.getdoc(public) or "").strip()


@pytest.mark.parametrize("page", [*PAGES, ROOT / "CONTRIBUTING.md"], ids=lambda p: p.name)
def test_links_lead_somewhere(page: Path) -> None:
    links = re.findall(r"\]\(([^)#]+)\)", page.read_text())
    assert all((page.parent / link).exists() for link in links if "://" not in link)
