"""Sphinx configuration. The API pages and the tables of flags, errors and methods are made from the library at build time."""

from __future__ import annotations

import inspect
import pkgutil
import re
import sys
from importlib import import_module
from pathlib import Path

HERE = Path(__file__).parent
sys.path.insert(0, str(HERE.parent))

import boltzsample  # noqa: E402

project = "boltzsample"
author = "The boltzsample developers"
extensions = ["myst_parser", "sphinx.ext.autodoc", "sphinx.ext.viewcode"]
exclude_patterns = ["_build", "_generated"]
myst_enable_extensions = ["dollarmath"]
myst_heading_anchors = 3
default_role = "code"  # single backticks in docstrings are code
autodoc_default_options = {"members": True, "member-order": "bysource"}
html_theme = "furo"
html_title = "boltzsample"


def table(head: list[str], rows: list[list[str]]) -> str:
    """A Markdown table."""
    return "\n".join("| " + " | ".join(cells) + " |" for cells in [head, ["---"] * len(head), *rows]) + "\n"


def flags_table() -> str:
    from boltzsample.flags import KINDS

    rows = [[f"`{code}`", kind.severity, kind.meaning, kind.remedy] for code, kind in KINDS.items()]
    return table(["code", "severity", "what it says", "what to try"], rows)


def errors_table() -> str:
    from boltzsample import errors

    kinds = [e for e in vars(errors).values() if inspect.isclass(e) and issubclass(e, Exception) and e.__module__ == errors.__name__]
    rows = [[f"`{e.__name__}`", f"`{e.code}`" if hasattr(e, "code") else "", str(e.__doc__).split("\n")[0]] for e in kinds]
    return table(["error", "code", "what it says"], rows)


def api_page(name: str) -> str:
    """A page of one module; a package says where its public names live instead of describing them twice."""
    module = import_module(name)
    homes = {public: getattr(module, public).__module__ for public in getattr(module, "__all__", ()) if hasattr(module, "__path__")}
    names = "".join(f"- `{name}.{public}`: {{py:obj}}`{home}.{public}`\n" for public, home in homes.items())
    options = "   :no-members:\n" if hasattr(module, "__path__") else ""
    return f"# {name}\n\n```{{eval-rst}}\n.. automodule:: {name}\n{options}```\n\n{names}"


def api_pages() -> dict[str, str]:
    """One page for each module, and their list."""
    modules = ["boltzsample", *(m.name for m in pkgutil.walk_packages(boltzsample.__path__, "boltzsample.") if "._" not in m.name)]
    return {m: api_page(m) for m in modules} | {"index": "# API\n\n```{toctree}\n" + "\n".join(modules) + "\n```\n"}


def write_pages(*_: object) -> None:
    pages = {HERE / "api" / f"{name}.md": text for name, text in api_pages().items()}
    pages |= {HERE / "_generated" / "flags.md": flags_table(), HERE / "_generated" / "errors.md": errors_table()}
    for stale in {*HERE.glob("api/*.md"), *HERE.glob("_generated/*.md")} - pages.keys():
        stale.unlink()
    for path, text in pages.items():
        path.parent.mkdir(exist_ok=True)
        path.write_text(text)


def plain(app: object, what: str, name: str, obj: object, options: object, lines: list[str]) -> None:
    """Docstrings are plain text: indented lines and doctests stay as they stand, and no star or bar means markup."""
    out: list[str] = []
    doctest = listed = False
    for line in lines:
        doctest = bool(line.strip()) and (doctest or line.startswith(">>>"))
        listed = bool(line.strip()) and (listed or bool(re.match(r"(- |\d+\. )", line)))
        block = line.startswith(" ") and not listed and not doctest
        if block and not (out and (out[-1].startswith(" ") or out[-2:] == ["::", ""])):
            out += ["", "::", ""]
        elif not block and not listed and not doctest and out and out[-1].startswith(" "):
            out.append("")
        out.append(line if block or doctest else escaped(line))
    lines[:] = out


def escaped(line: str) -> str:
    """A line of prose with everything but its `code` escaped."""
    parts = re.split(r"(``?[^`]+``?)", line)
    return "".join(part if i % 2 else re.sub(r"([*|_])", r"\\\1", part) for i, part in enumerate(parts))


def setup(app: object) -> None:
    app.connect("config-inited", write_pages)  # type: ignore[attr-defined]
    app.connect("autodoc-process-docstring", plain)  # type: ignore[attr-defined]
