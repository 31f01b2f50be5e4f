"""What is public is in ``fedlora.__all__`` and on docs/api-stability.md, and pages and examples use nothing else."""

from __future__ import annotations

import ast
import doctest
import importlib
import inspect
import re
from collections.abc import Iterator
from pathlib import Path

import pytest

import fedlora
from fedlora.runs.services import Service
from fedlora.show.describe import SLOTS

ROOT = Path(__file__).parents[1]
PAGES = [
    ROOT / "README.md",
    *sorted((ROOT / "docs").rglob("*.md")),
    *(one for one in sorted((ROOT / "examples").rglob("*")) if one.suffix in (".py", ".toml", ".md")),
]
PAGE = (ROOT / "docs" / "api-stability.md").read_text(encoding="utf-8")


def rows(title: str) -> dict[str, list[str]]:
    """The rows of the table in a section of the page: the first cell -> the names in the second.

    A row whose first cell is empty continues the one above.
    """
    section = PAGE.split(f"\n## {title}\n")[1].split("\n## ")[0]
    found: dict[str, list[str]] = {}
    key = ""
    for line in [line for line in section.splitlines() if line.startswith("| ")][2:]:
        first, second = line.strip("|").split("|")
        key = first.strip().strip("`") or key
        found.setdefault(key, []).extend(re.findall(r"`(\w+)`", second))
    return found


MODULES = rows("Modules")


def imports(path: Path) -> Iterator[tuple[str, str]]:
    """What a page or an example imports of fedlora, as module and name."""
    text = path.read_text(encoding="utf-8")
    if path.suffix == ".py":
        blocks = [text]
    elif path.suffix == ".toml":
        blocks = [" ".join(re.findall(r"from fedlora[\w.]* import [\w, ]+", text)[:1])]
    else:
        fenced = re.findall(r"^```python\n(.*?)^```", text, re.MULTILINE | re.DOTALL)
        sessions = ["".join(one.source for one in doctest.DocTestParser().get_examples(block)) for block in fenced]
        blocks = [session or block for session, block in zip(sessions, fenced, strict=True)]
        blocks += re.findall(r'python -c "(from fedlora[\w.]* import [\w, ]+)', text)
    for block in blocks:
        for node in ast.walk(ast.parse(block)):
            if isinstance(node, ast.ImportFrom) and (node.module or "").split(".")[0] == "fedlora":
                yield from ((str(node.module), alias.name) for alias in node.names)
            elif isinstance(node, ast.Import):
                yield from ((alias.name, "") for alias in node.names if alias.name.startswith("fedlora"))
            elif isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name) and node.value.id == "fedlora":
                yield "fedlora", node.attr


def test_the_page_and_the_list_of_names_agree() -> None:
    named = [name for names in rows("`fedlora`").values() for name in names]
    assert sorted(named) == sorted(fedlora.__all__)


@pytest.mark.parametrize("module", MODULES)
def test_a_listed_module_has_its_names(module: str) -> None:
    found = importlib.import_module(module)
    assert MODULES[module] == sorted(MODULES[module], key=lambda name: (not name.isupper(), name[0].islower(), name))
    assert [name for name in MODULES[module] if name not in vars(found)] == []


def test_the_classes_of_every_slot_are_public() -> None:
    listed = {*fedlora.__all__, *(name for names in MODULES.values() for name in names)}
    private = {
        cls.__name__
        for slot, table in SLOTS.items()
        for cls in table.values()
        # services are chosen by name alone, in `track`
        if slot != "engine" and cls.__name__ not in listed and not issubclass(cls, Service)
    }
    # what studies put in place of the test rows
    assert private == {"Validation"}


def test_public_classes_and_functions_say_what_they_are() -> None:
    assert [name for name in fedlora.__all__ if not inspect.getdoc(getattr(fedlora, name))] == []


@pytest.mark.parametrize("path", PAGES, ids=lambda path: path.relative_to(ROOT).as_posix())
def test_pages_and_examples_import_what_is_public(path: Path) -> None:
    private = [
        f"{module}.{name}"
        for module, name in imports(path)
        if not (module == "fedlora" and name in ("", *fedlora.__all__)) and name not in MODULES.get(module, [])
    ]
    assert private == []


def test_imports_are_found(tmp_path: Path) -> None:
    page = tmp_path / "page.md"
    page.write_text(
        "```python\nimport fedlora\nfrom fedlora.core import tree\nfedlora.run(1)\n```\n"
        "```python\n>>> from fedlora import LoRA\n>>> 1\n1\n```\n"
        "```\n" + 'python -c "from fedlora import Docstrings; Docstrings()"\n```\n'
    )
    assert set(imports(page)) == {
        ("fedlora", ""),
        ("fedlora", "run"),
        ("fedlora.core", "tree"),
        ("fedlora", "LoRA"),
        ("fedlora", "Docstrings"),
    }
