"""The documentation: links resolve, and every file, table, module and command that a page names exists."""

from __future__ import annotations

import ast
import doctest
import functools
import importlib
import importlib.util
import re
import tomllib
from pathlib import Path

import pytest
import yaml

ROOT = Path(__file__).parents[1]
SOURCE = ROOT / "src" / "fedlora"
PAGES = sorted(
    [
        *ROOT.glob("*.md"),
        *ROOT.glob("docs/**/*.md"),
        *ROOT.glob("benchmarks/*.md"),
        *ROOT.glob(".github/**/*.md"),
    ]
)
TOP = ("src", "tests", "docs", "benchmarks", "examples", "studies", "scripts", ".github", ".ci")
"""Folders of the repository: a path that begins with one is a path from its root."""
ELSEWHERE = {"train_sparse_lora_het.py", "train_sparse_lora_dp.py"}
"""Files of other projects."""
MADE = {"fedlora.schema.json", ".venv", ".venv-flower", "benchmarks/out", "build/site", "results.json"}
"""What commands make, so that a clean checkout lacks it."""
TARGETS = set(re.findall(r"^([a-z]+):.*##", (ROOT / "Makefile").read_text(encoding="utf-8"), re.MULTILINE))


def name_of(path: Path) -> str:
    return path.relative_to(ROOT).as_posix()


@functools.cache
def prose(path: Path) -> str:
    """A page without its fenced code."""
    return re.sub(r"^( *)```.*?^\1```", "", path.read_text(encoding="utf-8"), flags=re.MULTILINE | re.DOTALL)


def tables(path: Path) -> list[list[list[str]]]:
    """The cells of a page's tables, by row."""
    blocks = re.findall(r"(?:^ *\|.*\n?)+", prose(path), re.MULTILINE)
    rows = [[line.strip().removeprefix("|").removesuffix("|") for line in block.splitlines()] for block in blocks]
    return [[[cell.strip() for cell in re.split(r"(?<!\\)\|", row)] for row in table] for table in rows]


def spans(path: Path) -> list[str]:
    """What a page shows as code within its sentences."""
    return [one.replace("\n", " ") for one in re.findall(r"`([^`]+)`", prose(path))]


@functools.cache
def anchors(path: Path) -> set[str]:
    """The fragments that a page's headings give it, by GitHub's rule."""
    found: dict[str, int] = {}
    made = set()
    for title in re.findall(r"^#{1,6} +(.+?) *#*$", prose(path), re.MULTILINE):
        text = re.sub(r"\[([^\]]*)\]\([^)]*\)", r"\1", title).replace("`", "").replace("*", "")
        slug = re.sub(r"[^\w\- ]", "", text.lower()).replace(" ", "-")
        made.add(f"{slug}-{found[slug]}" if slug in found else slug)
        found[slug] = found.get(slug, 0) + 1
    return made


def broken_links(path: Path) -> list[str]:
    targets = re.findall(r"\]\(\s*<?([^)\s>]+)>?[^)]*\)", re.sub(r"`[^`]*`", "", prose(path)))
    broken = []
    for target in targets:
        if re.match(r"[a-z]+:", target):
            continue
        file, _, anchor = target.partition("#")
        aim = (path.parent / file).resolve() if file else path
        if not aim.exists() or (anchor and (aim.suffix != ".md" or anchor not in anchors(aim))):
            broken.append(target)
    return broken


def exists(named: str, *folders: Path) -> bool:
    """Whether a path, which may hold ``*`` or end in ``/``, is there in one of the folders."""
    return any(list(folder.glob(named.rstrip("/"))) for folder in folders)


@functools.cache
def defined(path: Path) -> frozenset[str]:
    """The names that a module assigns, defines or imports at its top, those under an ``if`` included."""
    names = set()
    nodes = list(ast.parse(path.read_text(encoding="utf-8")).body)
    while nodes:
        match nodes.pop():
            case ast.If(body=body, orelse=other):
                nodes += body + other
            case ast.ClassDef(name=name) | ast.FunctionDef(name=name) | ast.AnnAssign(target=ast.Name(id=name)):
                names.add(name)
            case ast.Assign(targets=targets):
                names |= {target.id for target in targets if isinstance(target, ast.Name)}
            case ast.ImportFrom(names=imported):
                names |= {alias.asname or alias.name for alias in imported}
    return frozenset(names)


@functools.cache
def words() -> frozenset[str]:
    """Every identifier of the source and of the tests of structure."""
    files = [*SOURCE.rglob("*.py"), ROOT / "tests" / "test_structure.py"]
    return frozenset(word for file in files for word in re.findall(r"\w+", file.read_text(encoding="utf-8")))


def resolves(dotted: str) -> bool:
    """Whether ``fedlora.a.b`` is a module, or a name in one; where Flower is missing its modules need only be there."""
    parts = dotted.split(".")
    for length in range(len(parts), 0, -1):
        file = SOURCE.joinpath(*parts[1:length])
        module = file if file.is_dir() else file.with_suffix(".py")
        if not module.exists():
            continue
        if length < len(parts) and parts[1] == "federation" and not importlib.util.find_spec("flwr"):
            return parts[length] in defined(module / "__init__.py" if module.is_dir() else module)
        if length == len(parts):
            return True
        value = importlib.import_module(".".join(parts[:length]))
        for part in parts[length:]:
            if not hasattr(value, part):
                return False
            value = getattr(value, part)
        return True
    return False


@pytest.mark.parametrize("path", PAGES, ids=name_of)
def test_every_link_and_every_anchor_resolves(path: Path) -> None:
    assert broken_links(path) == []


def test_broken_links_are_found(tmp_path: Path) -> None:
    page, other = tmp_path / "page.md", tmp_path / "other.md"
    other.write_text("# A `b`, and *c*: [d](x)\n\n## Again\n\n## Again\n```\n# code\n```\n")
    good = "[a](other.md) [b](other.md#a-b-and-c-d) [c](#top) [d](https://x.org/y) [e](other.md#again-1) `[f](no.md)`"
    page.write_text(f"# Top\n{good}\n[x](gone.md) [y](other.md#code) [z](#bottom) ![w](none.png)\n")
    assert broken_links(page) == ["gone.md", "other.md#code", "#bottom", "none.png"]


@pytest.mark.parametrize("path", [path for path in PAGES if path.name != "CHANGELOG.md"], ids=name_of)
def test_every_file_that_a_page_names_exists(path: Path) -> None:
    missing = []
    for span in spans(path):
        file = span.split("::")[0].split(" ")[-1]
        if not re.fullmatch(r"[\w./*-]+", file) or re.search(r"\b[A-Z]{4,}\b", file) or file in ELSEWHERE | MADE:
            continue
        if file.split("/")[0] in TOP and "/" in file:
            found = exists(file, ROOT)
        elif file.endswith(".py"):
            found = exists(file, ROOT, SOURCE, ROOT / "tests") or ("/" not in file and exists(f"**/{file}", SOURCE))
        else:
            continue
        missing += [] if found else [span]
    assert missing == []


@pytest.mark.parametrize("path", [path for path in PAGES if path.name != "CHANGELOG.md"], ids=name_of)
def test_every_module_and_public_name_that_a_page_names_exists(path: Path) -> None:
    text = path.read_text(encoding="utf-8")
    named = set(re.findall(r"(?<![\w./@-])fedlora(?:\.[A-Za-z_]\w*)+(?![\w/])", text))
    for block in re.findall(r"^```python\n(.*?)^```", text, re.MULTILINE | re.DOTALL):
        session = doctest.DocTestParser().get_examples(block)
        for node in ast.walk(ast.parse("".join(one.source for one in session) or block)):
            if isinstance(node, ast.ImportFrom) and (node.module or "").startswith("fedlora"):
                named |= {f"{node.module}.{alias.name}" for alias in node.names}
    assert [one for one in sorted(named) if one not in MADE and not resolves(one)] == []


def test_every_file_that_the_code_names_exists() -> None:
    missing = []
    for path in [*SOURCE.rglob("*.py"), *(ROOT / "tests").rglob("*.py"), *(ROOT / "benchmarks").rglob("*.py")]:
        for file in re.findall(r"``([\w./]+\.py)``", path.read_text(encoding="utf-8")):
            if not (exists(file, ROOT) or exists(f"**/{file}", SOURCE, ROOT / "tests")):
                missing.append(f"{name_of(path)}: {file}")
    assert missing == []


@pytest.mark.parametrize("path", [ROOT / "README.md", *sorted(ROOT.glob("docs/**/*.md"))], ids=name_of)
def test_tables_have_short_cells_and_full_rows(path: Path) -> None:
    for table in tables(path):
        assert [cell for row in table for cell in row if len(cell) > 120] == []
        assert [row for row in table if len(row) != len(table[0])] == []


def test_the_cells_of_tables_are_found(tmp_path: Path) -> None:
    page = tmp_path / "page.md"
    page.write_text("# Top\na | b\n\n| x | y |\n| --- | --- |\n| `a \\| b` | |\n\n| z |\n```\n| code |\n```\n")
    assert tables(page) == [[["x", "y"], ["---", "---"], ["`a \\| b`", ""]], [["z"]]]


@pytest.mark.parametrize("path", PAGES, ids=name_of)
def test_every_make_target_that_a_page_names_exists(path: Path) -> None:
    named = {match for span in spans(path) for match in re.findall(r"^make ([a-z]+)", span)}
    assert named - TARGETS == set()


def test_the_source_page_has_a_line_for_each_folder() -> None:
    tree = (ROOT / "docs" / "concepts" / "source.md").read_text(encoding="utf-8").split("```")[1]
    inner = re.findall(r"^  (\w+)/ ", tree, re.MULTILINE)
    outer = re.findall(r"^(\w+)/ ", tree, re.MULTILINE)
    assert sorted(inner) == sorted(one.parent.name for one in SOURCE.glob("*/__init__.py"))
    assert set(outer) == {one for one in TOP if not one.startswith(".")} - {"src"}


def test_the_index_has_every_page() -> None:
    folder = ROOT / "docs"
    text = (folder / "index.md").read_text(encoding="utf-8")
    pages = [one for pattern in ("*.md", "howto/*.md", "concepts/*.md") for one in folder.glob(pattern)]
    missing = [one for page in pages if f"]({(one := page.relative_to(folder).as_posix())})" not in text]
    assert missing == ["index.md"]


def test_the_readme_is_short_and_its_links_work_on_a_package_index() -> None:
    text = (ROOT / "README.md").read_text(encoding="utf-8")
    assert len(text.splitlines()) <= 150
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))
    url = project["project"]["urls"]["Repository"]
    assert all(one.startswith(url) for one in project["project"]["urls"].values())
    for rule in project["tool"]["hatch"]["metadata"]["hooks"]["fancy-pypi-readme"]["substitutions"]:
        text = re.sub(rule["pattern"], rule["replacement"], text)
    links = re.findall(r"(!?)\[[^\]]*\]\(([^)\s]+)\)", text)
    assert len(links) > 20
    for picture, target in links:
        kind, _, path = target.removeprefix(f"{url}/").partition("/main/")
        assert (kind, (ROOT / path).exists()) == ("raw" if picture else "blob", True), target


# -- CONTRIBUTING ----------------------------------------------------------------------------------------------------

CONTRIBUTING = ROOT / "CONTRIBUTING.md"


def slots() -> list[list[str]]:
    rows = (ROOT / "CONTRIBUTING.md").read_text(encoding="utf-8").split("| to add a |")[1].split("\n\n")[0]
    return [[cell.strip() for cell in line.strip("|").split("|")] for line in rows.splitlines()[2:]]


@pytest.mark.parametrize("row", slots(), ids=lambda row: row[0])
def test_a_row_of_slots_names_files_tables_and_tests_that_exist(row: list[str]) -> None:
    _, home, tables, tests = row
    own = re.findall(r"`([^`]+)`", home)[0]
    assert exists(own, SOURCE)
    named = 0
    for entry in tables.split("; "):
        place, _, names = entry.partition(":")
        file = SOURCE / (own if place == "there" else place.strip("`"))
        for name in re.findall(r"`(\w+)`", names):
            assert name in defined(file), f"{file} lacks {name}"
            assert not _imported(file, name), f"{file} only passes {name} on"
            named += 1
    assert named
    named_tests = re.findall(r"`([^`]+)`", tests)
    assert named_tests
    assert [one for one in named_tests if not exists(one, ROOT / "tests")] == []


def _imported(file: Path, name: str) -> bool:
    """Whether a module only passes a name on, so that nothing can be added to it there."""
    return any(
        name in {alias.name for alias in node.names}
        for node in ast.parse(file.read_text(encoding="utf-8")).body
        if isinstance(node, ast.ImportFrom)
    )


def test_every_table_that_a_new_component_must_enter_is_named() -> None:
    text = CONTRIBUTING.read_text(encoding="utf-8")
    unions, by_hand = set(), set()
    for file in SOURCE.rglob("*.py"):
        code = file.read_text(encoding="utf-8")
        unions |= set(re.findall(r"^ *(Any[A-Z]\w+) = Annotated", code, re.MULTILINE))
        # tables that list their values again instead of reading them from the union, and are filled by classes
        by_hand |= set(re.findall(r"^(_?[A-Z_]+): dict\[\w+, type\[\w+\]\] = \{", code, re.MULTILINE))
    assert {name for name in unions | by_hand if f"`{name}`" not in text} == set()


def test_every_path_and_name_in_contributing_exists() -> None:
    unknown = []
    for span in spans(CONTRIBUTING):
        if re.search(r"[A-Z]{4,}\.json|OLD NEW", span) or span.startswith(("make ", "pip ", "pre-commit ", "WHICH=")):
            continue
        if span in MADE:
            known = True
        elif "/" in span or span.startswith("."):
            known = exists(span, ROOT, SOURCE, ROOT / "tests")
        elif re.search(r"\.(py|toml|txt|json|yml)$", span):
            known = exists(span, ROOT, SOURCE)
        else:
            known = set(re.findall(r"\w+", span)) <= words()
        unknown += [] if known else [span]
    assert unknown == []


# -- what runs the checks --------------------------------------------------------------------------------------------


def made(text: str) -> set[str]:
    """The make targets that a script calls."""
    calls = re.findall(r"^\s*(?:-?\s*run: )?make ([a-z ]+?)(?:\s+WHAT=.*|\s+\|.*)?$", text, re.MULTILINE)
    return {target for call in calls for target in call.split()}


def test_the_workflows_call_what_the_project_calls() -> None:
    flows = {path.stem: path.read_text(encoding="utf-8") for path in (ROOT / ".github" / "workflows").glob("*.yml")}
    assert set(flows) == {"check", "test", "docs"}
    called = {target for text in flows.values() for target in made(text)}
    own = (ROOT / ".ci" / "run").read_text(encoding="utf-8")
    assert called == made(own) == {"check", "test", "docs", "flower", "slow"}
    assert called <= TARGETS
    (part,) = re.findall(r"make slow (WHAT='[^']*')", own)
    assert part in flows["test"]
    for text in flows.values():
        flow = yaml.safe_load(text)
        assert flow["permissions"] == {"contents": "read"}
        assert all(job["timeout-minutes"] <= 120 for job in flow["jobs"].values())


def test_the_issue_forms_are_forms() -> None:
    folder = ROOT / ".github" / "ISSUE_TEMPLATE"
    assert {path.name for path in folder.iterdir()} == {"bug.yml", "feature.yml", "question.yml", "config.yml"}
    for path in folder.iterdir():
        form = yaml.safe_load(path.read_text(encoding="utf-8"))
        if path.name == "config.yml":
            assert form["blank_issues_enabled"] is False
            continue
        assert form.keys() >= {"name", "description", "body"}
        fields = [field for field in form["body"] if field["type"] != "markdown"]
        assert fields
        assert all(field["attributes"]["label"] for field in fields)
        named = re.findall(r"\b(?:docs/[\w./-]+|[A-Z]{5,}\.md)", path.read_text(encoding="utf-8"))
        assert [one for one in named if not exists(one.rstrip("."), ROOT)] == []
        assert len({field["id"] for field in fields}) == len(fields)


def test_the_hooks_before_a_commit_are_local_and_check_what_make_check_does() -> None:
    config = yaml.safe_load((ROOT / ".pre-commit-config.yaml").read_text(encoding="utf-8"))
    assert [one["repo"] for one in config["repos"]] == ["local"]
    hooks = {hook["id"]: hook for hook in config["repos"][0]["hooks"]}
    assert set(hooks) == {"ruff-format", "ruff-check", "mypy"}
    for hook in hooks.values():
        assert hook["language"] == "system"
        assert hook["entry"].startswith(".venv/bin/python -m ")


def test_the_changelog_has_a_section_for_the_version() -> None:
    text = (ROOT / "CHANGELOG.md").read_text(encoding="utf-8")
    versions = re.findall(r"^## (\d+\.\d+\.\d+) \((\d{4}-\d\d-\d\d|unreleased)\)$", text, re.MULTILINE)
    assert len(versions) == len(re.findall(r"^## ", text, re.MULTILINE))
    assert [when for _, when in versions[1:] if when == "unreleased"] == []
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]["version"]
    assert project in dict(versions)
