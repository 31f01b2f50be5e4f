"""What ``mkdocs.yml`` adds to docs/: API pages, notebooks, and links to files elsewhere in the repository."""

from __future__ import annotations

import json
import os
import re
import tomllib
from pathlib import Path
from typing import Any

import griffe
from mkdocs.structure.files import File, Files

ROOT = Path(__file__).parents[1]
URL = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]["urls"]["Repository"]
DATACLASS = "dataclasses.dataclass"


class Fields(griffe.Extension):
    """Gives pydantic's dataclasses and named tuples the parameters of their fields, as griffe does for dataclasses."""

    def on_alias_instance(self, *, alias: griffe.Alias, **_: Any) -> None:
        """Follows the name by which the source imports the decorator."""
        if alias.target_path == "fedlora.core.component.dataclass":
            alias.target_path = DATACLASS

    def on_class_instance(self, *, cls: griffe.Class, **_: Any) -> None:
        """Treats a named tuple as a dataclass."""
        if "NamedTuple" in map(str, cls.bases):
            decorator = griffe.ExprName(DATACLASS)
            cls.decorators.append(griffe.Decorator(decorator, lineno=cls.lineno, endlineno=cls.lineno))


def api_pages() -> dict[str, str]:
    """A page for each group of names in the tables of docs/api-stability.md, by path."""
    text = (ROOT / "docs" / "api-stability.md").read_text(encoding="utf-8")
    pages: dict[str, str] = {}
    for title, module in (("`fedlora`", "fedlora"), ("Modules", "")):
        section = text.split(f"\n## {title}\n")[1].split("\n## ")[0]
        path = ""
        for first, names in re.findall(r"^\| (?:([^|]+) )?\| (`[^|]+) \|$", section, re.MULTILINE):
            if first:  # a row without a first cell continues the one above
                group = first.strip("`")
                path = f"api/{re.sub(r'[^a-z]+', '-', group.lower())}.md"
                pages[path] = f"# {module}: {group}\n" if module else f"# {group}\n"
            home = module or group
            pages[path] += "".join(f"\n::: {home}.{name}\n" for name in re.findall(r"`(\w+)`", names))
    return pages


def notebook_page(path: Path) -> str:
    """A notebook's cells as one page of Markdown."""
    cells = json.loads(path.read_text(encoding="utf-8"))["cells"]
    texts = [(cell["cell_type"], "".join(cell["source"])) for cell in cells]
    return "\n\n".join(text if kind == "markdown" else f"```python\n{text}\n```" for kind, text in texts) + "\n"


def with_api(entries: list[Any]) -> list[Any]:
    """The navigation with the API pages in place of ``api/``."""
    made: list[Any] = []
    for entry in entries:
        if isinstance(entry, dict):
            made.append(
                {title: with_api(below) if isinstance(below, list) else below for title, below in entry.items()}
            )
        else:
            made += list(api_pages()) if entry == "api/" else [entry]
    return made


def on_config(config: Any) -> Any:
    """Puts the API pages into the navigation."""
    config.nav = with_api(config.nav)
    return config


def on_files(files: Files, config: Any) -> Files:
    """Adds the pages that are made here."""
    for path, text in api_pages().items():
        files.append(File.generated(config, path, content=text))
    for file in [one for one in files if one.src_uri.endswith(".ipynb")]:
        page = notebook_page(Path(str(file.abs_src_path)))
        files.append(File.generated(config, file.src_uri.replace(".ipynb", ".md"), content=page))
    return files


def on_page_markdown(markdown: str, page: Any, files: Files, **_: Any) -> str:
    """Points links at files outside docs/ to the repository, and links at notebooks to their pages."""
    folder = os.path.dirname(os.path.join("docs", page.file.src_uri))

    def aimed(found: re.Match[str]) -> str:
        target = os.path.normpath(os.path.join(folder, found[1]))
        if re.match(r"[a-z]+:", found[1]):
            return found[0]
        if target.startswith("docs/"):
            return f"]({found[1].removesuffix('.ipynb')}.md{found[2]}" if target.endswith(".ipynb") else found[0]
        kind = "tree" if (ROOT / target).is_dir() else "blob"
        return f"]({URL}/{kind}/main/{target}{found[2]}"

    return re.sub(r"\]\(([^)#\s]+)((?:#[^)\s]*)?\))", aimed, markdown)
