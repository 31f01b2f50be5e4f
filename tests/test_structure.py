"""The shape of the package: who may import what, how long files are, and what a class may be."""

from __future__ import annotations

import ast
import dataclasses
import functools
import importlib
import importlib.util
import inspect
import pkgutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from pydantic import ValidationError

import fedlora
from fedlora.methods import METHODS
from fedlora.runs.callbacks import Callback
from fedlora.show import describe

SOURCE = Path(fedlora.__file__).parent
FILES = sorted(SOURCE.rglob("*.py"))
# what needs Flower is looked at where it is installed, by `make flower`
FLOWER = ("fedlora.federation.",)
MODULES = sorted(
    info.name
    for info in pkgutil.walk_packages([str(SOURCE)], "fedlora.")
    if info.name != "fedlora.__main__" and (importlib.util.find_spec("flwr") or not info.name.startswith(FLOWER))
)
MODULE_FILES = {
    ".".join(["fedlora", *path.relative_to(SOURCE).with_suffix("").parts]).removesuffix(".__init__"): path
    for path in FILES
}
DOORS = {
    "peft": ("tuning/",),
    "transformers": ("tasks/", "tuning/", "testing/"),
    "datasets": ("tasks/", "tuning/", "testing/"),
    "flwr": ("federation/flower/", "federation/deploy/simulate.py"),
    "cryptography": ("federation/deploy/keys.py", "federation/flower/runtime.py"),
    "typer": ("cli/",),
    "constriction": ("transport/",),
    "zlib_ng": ("transport/",),
}
FLOORS = (
    ("core",),
    ("transport", "tuning", "privacy"),
    ("tasks",),
    ("server",),
    ("recipe",),
    ("methods", "population", "client"),
    ("config", "engines"),
    ("rounds",),
    ("runs",),
    ("federation",),
    ("show",),
    ("study",),
    ("cli", "testing"),
)
"""The folders, lowest floor first: each imports what lies below it, and nothing beside or above it."""
BESIDE = {"__init__.py", "__main__.py", "parts.py"}
LONGER: dict[str, str] = {}
"""Functions above the limits, as ``file.py:name``, each with its reason; five at most."""
NEEDED = {
    "column": {"name"},
    "natural": {"column"},
    "files": {"train"},
    "hub": {"path"},
    "rows": {"train"},
    "collated": {"collator"},
    "image_folder": {"path"},
    "peft": {"config"},
    "central_gaussian": {"clip_norm"},
    "top_k": {"density"},
    "random_k": {"density"},
    "threshold": {"value"},
    "rank_slice": {"rank"},
    "sites": {"test"},
    "validation": {"source"},
    "norm_bound": {"norm"},
}


@functools.cache
def parsed(path: Path) -> ast.Module:
    return ast.parse(path.read_text(encoding="utf-8"))


def name_of(path: Path) -> str:
    return path.relative_to(SOURCE).as_posix()


def imports(path: Path) -> Iterator[tuple[str, list[str]]]:
    """Every module that a file imports anywhere, now or later, with the names taken from it."""
    for node in ast.walk(parsed(path)):
        if isinstance(node, ast.Import) or (isinstance(node, ast.ImportFrom) and node.module == "fedlora.core.later"):
            yield from ((alias.name, []) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            yield node.module or "", [alias.name for alias in node.names]


def needs(path: Path) -> Iterator[str]:
    """The fedlora modules that a file imports anywhere, those for types alone left out."""
    typed = {
        id(inner)
        for node in ast.walk(parsed(path))
        if isinstance(node, ast.If) and "TYPE_CHECKING" in ast.unparse(node.test)
        for inner in ast.walk(node)
    }
    for node in ast.walk(parsed(path)):
        if isinstance(node, ast.ImportFrom) and id(node) not in typed and (node.module or "").startswith("fedlora"):
            for alias in node.names:
                one = f"{node.module}.{alias.name}"
                yield one if one in MODULE_FILES else str(node.module)


def classes() -> dict[str, type]:
    found = {}
    for name in MODULES:
        for value in vars(importlib.import_module(name)).values():
            if inspect.isclass(value) and value.__module__.startswith("fedlora"):
                found[f"{value.__module__}.{value.__qualname__}"] = value
    return found


@pytest.mark.parametrize("library", DOORS)
def test_a_library_comes_in_by_its_door_alone(library: str) -> None:
    users = {name_of(path) for path in FILES if any(module.split(".")[0] == library for module, _ in imports(path))}
    assert [user for user in users - {"core/later.py"} if not user.startswith(DOORS[library])] == []


def test_every_file_lives_in_a_folder_of_a_floor() -> None:
    folders = {folder for floor in FLOORS for folder in floor}
    assert {name_of(path).split("/")[0] for path in FILES} == folders | BESIDE
    assert len(BESIDE) <= 4


def test_imports_go_down_only() -> None:
    floor = {folder: number for number, folders in enumerate(FLOORS) for folder in folders}
    wrong = [
        f"{name_of(path)} imports {needed}"
        for path in FILES
        if name_of(path) not in BESIDE
        for needed in needs(path)
        if (folder := needed.split(".")[1] if "." in needed else "") != (own := name_of(path).split("/")[0])
        if floor.get(folder, 99) >= floor[own]
    ]
    assert wrong == []


def test_no_file_needs_itself_in_order_to_be_imported() -> None:
    arrows = {module: {*needs(path)} - {module} for module, path in MODULE_FILES.items()}
    while leaves := [module for module, needed in arrows.items() if not needed & arrows.keys()]:
        for module in leaves:
            del arrows[module]
    assert sorted(arrows) == []


@pytest.mark.parametrize("folder", sorted({path.parent for path in FILES}), ids=name_of)
def test_a_folder_says_what_lives_there_and_what_may_not(folder: Path) -> None:
    said = ast.get_docstring(parsed(folder / "__init__.py")) or ""
    assert len([one for one in said.replace("\n", " ").split(". ") if one]) >= 2


def test_no_file_is_longer_than_400_lines_and_no_function_than_60_or_12_branches() -> None:
    sizes = {
        f"{name_of(path)}:{node.name}": (node.end_lineno - node.lineno + 1, branches(node))
        for path in FILES
        for node in ast.walk(parsed(path))
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef) and node.end_lineno is not None
    }
    over = {name: size for name, size in sizes.items() if size[0] > 60 or size[1] > 12}
    assert {name: size for name, size in over.items() if name not in LONGER} == {}
    assert [name for name in LONGER if name not in over] == []
    assert [name_of(path) for path in FILES if path.read_text(encoding="utf-8").count("\n") > 400] == []


def test_few_functions_are_longer_and_each_has_a_reason() -> None:
    assert len(LONGER) <= 5
    assert all(LONGER.values())


def branches(function: ast.AST) -> int:
    """Where a function can go one way or another; functions, classes and lambdas inside it count for themselves."""
    count, left = 0, list(ast.iter_child_nodes(function))
    while left:
        node = left.pop()
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef | ast.Lambda):
            continue
        count += isinstance(node, ast.If | ast.For | ast.While | ast.ExceptHandler | ast.IfExp | ast.match_case)
        count += len(node.values) - 1 if isinstance(node, ast.BoolOp) else 0
        count += len(node.ifs) if isinstance(node, ast.comprehension) else 0
        left += ast.iter_child_nodes(node)
    return count


def test_branches_are_counted_as_stated() -> None:
    code = """
    def outer(a, b):
        for x in [y for y in a if y and b]:      # 3
            try:
                inner = lambda z: 1 if z else 2  # its own
            except ValueError:                   # 1
                pass
        match a:
            case 1 if b or x:                    # 2
                while b: pass                    # 1
        return 1 if a else 2                     # 1
    """
    assert branches(ast.parse(inspect.cleandoc(code)).body[0]) == 8


def test_the_two_halves_of_a_round_are_read_in_one_sitting() -> None:
    def code(name: str) -> int:
        tree = ast.parse((SOURCE / name).read_text(encoding="utf-8"))
        return len(ast.unparse(_without_docstrings(tree)).splitlines())

    assert code("rounds/round.py") + code("client/turn.py") < 300


def _without_docstrings(tree: ast.Module) -> ast.Module:
    for node in ast.walk(tree):
        if isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef) and ast.get_docstring(node) is not None:
            node.body = node.body[1:] or [ast.Pass()]
    return tree


def test_nothing_is_imported_wholesale_or_unpickled() -> None:
    assert [name_of(path) for path in FILES if any("*" in names for _, names in imports(path))] == []
    picklers = {"pickle", "cloudpickle", "dill", "marshal", "shelve"}
    # workers are this process's own children, at the other end of an anonymous pipe
    assert {(name_of(path), module) for path in FILES for module, _ in imports(path) if module in picklers} == {
        ("engines/processes.py", "pickle")
    }
    barred = {"torch.load", "torch.save", "numpy.load", "np.load", "eval", "exec", "hasattr"}
    called = {
        (name_of(path), ast.unparse(node.func))
        for path in FILES
        for node in ast.walk(parsed(path))
        if isinstance(node, ast.Call)
    }
    assert {place for place in called if place[1] in barred} == set()


def test_only_methods_know_the_names_of_methods() -> None:
    compared = {
        (name_of(path), operand.value)
        for path in FILES
        for node in ast.walk(parsed(path))
        if isinstance(node, ast.Compare)
        for operand in node.comparators
        if isinstance(operand, ast.Constant) and isinstance(operand.value, str)
    }
    # a scheme of partition is called after FLASC's authors too, and tables compare with dense LoRA
    assert {place for place in compared if place[1] in METHODS} <= {
        ("population/partitions.py", "flasc"),
        ("show/compare.py", "lora"),
    }


@pytest.mark.parametrize("name", MODULES)
def test_a_public_list_is_sorted_and_true(name: str) -> None:
    module = importlib.import_module(name)
    public = getattr(module, "__all__", [])
    assert public == sorted(public, key=_constants_first) or public == sorted(public)
    assert [one for one in public if not hasattr(module, one)] == []


def _constants_first(name: str) -> tuple[int, str]:
    return (0 if name.isupper() else 1 if name[0].isupper() else 2, name)


def test_the_package_gives_what_it_promises() -> None:
    assert fedlora.__all__ == sorted(fedlora.__all__, key=_constants_first)
    assert set(fedlora.__all__) == set(fedlora._HOME)
    for name in fedlora.__all__:
        assert getattr(fedlora, name).__name__ == name
    assert set(dir(fedlora)) >= set(fedlora.__all__)


def test_a_name_that_is_not_there_is_an_attribute_error() -> None:
    with pytest.raises(AttributeError, match="module 'fedlora' has no attribute 'nonsense'"):
        fedlora.nonsense  # noqa: B018


def test_a_class_is_abstract_or_final() -> None:
    found = classes()
    assert len(found) > 60
    bases = {base for cls in found.values() for base in cls.__bases__ if base.__module__.startswith("fedlora")}
    # whatever a callback does not define does nothing
    open_ones = (fedlora.FedloraError, fedlora.TrainingError, Callback)
    assert [base.__qualname__ for base in bases if not inspect.isabstract(base) and base not in open_ones] == []


def test_what_stands_in_a_slot_is_a_frozen_value_with_its_name() -> None:
    for slot, table in describe.SLOTS.items():
        for kind, value in table.items():
            if slot in ("method", "engine", "track"):
                continue
            cls: Any = value
            assert dataclasses.is_dataclass(cls), kind
            assert vars(cls)["__dataclass_params__"].frozen, kind
            assert vars(cls)["kind"] == kind


@pytest.mark.parametrize(("slot", "kind"), [(slot, kind) for slot, table in describe.SLOTS.items() for kind in table])
def test_a_value_of_a_slot_needs_the_fields_stated_and_no_others(slot: str, kind: str) -> None:
    value: Any = describe.SLOTS[slot][kind]
    if slot in ("engine", "track"):
        assert inspect.getdoc(value)
        return
    try:
        value()
        missing = set()
    except ValidationError as error:
        missing = {str(one["loc"][0]) for one in error.errors() if one["type"].startswith("missing")}
    assert missing == NEEDED.get(kind, set())


def test_every_component_of_the_configuration_is_in_a_table() -> None:
    listed = {value for table in describe.SLOTS.values() for value in table.values()}
    kinds = {cls for cls in classes().values() if isinstance(getattr(cls, "kind", None), str)}
    assert kinds - listed == set()


def test_every_public_function_and_class_has_a_docstring() -> None:
    silent = [
        f"{name_of(path)}:{node.lineno}"
        for path in FILES
        for node in parsed(path).body
        if isinstance(node, ast.ClassDef | ast.FunctionDef) and not node.name.startswith("_")
        if ast.get_docstring(node) is None
    ]
    assert silent == []


def test_every_public_method_has_a_docstring_of_its_own_or_of_what_it_overrides() -> None:
    silent = [
        f"{name}.{method}"
        for name, cls in classes().items()
        for method, value in vars(cls).items()
        if not method.startswith("_") and (isinstance(value, property) or getattr(value, "__name__", "") == method)
        if not inspect.getdoc(getattr(cls, method))
    ]
    assert silent == []


def test_the_help_of_a_method_is_its_settings() -> None:
    rows = {kind: settings for kind, _, settings in describe.choices("method")}
    assert rows["full"] == "rounds, server, local"
    assert METHODS.keys() == rows.keys()
