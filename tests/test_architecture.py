"""Who may import whom: a lower layer never imports a higher one, and torch stays where it belongs."""

from __future__ import annotations

import ast
import functools
import graphlib
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
ORDER = (
    *"errors stats records studies models machine wire trial attach verdicts results run".split(),
    *"profile parity report commands".split(),
)
"""The rooms, from the ground up."""
DOORS = ("cli", "pytest_plugin", "worker")
RANK = (
    {room: place for place, room in enumerate(ORDER)}
    | dict.fromkeys(DOORS, len(ORDER))
    | {"entry": len(ORDER) + 1, "__main__": len(ORDER) + 2}
)
FLOORS = (
    *"pipes terminal check rules observe trace judges isolation step_watch ranks small_run selftest probe".split(),
)
"""Those of kernels_check; its doors are its two dunder modules."""
STOREYS = {room: place for place, room in enumerate(FLOORS)} | dict.fromkeys(("__init__", "__main__"), len(FLOORS))
TORCH = ("trial", "attach")
FOLDERS = {"lorameter": "harness/lorameter"}
"""Where a package lies that has no folder of its own at the top."""
HEAVY = {"torch", "transformers", "peft", "bitsandbytes", "datasets", "pandas"}


def modules(package: str) -> list[Path]:
    return sorted((ROOT / FOLDERS.get(package, package)).rglob("*.py"))


def parts_of(path: Path) -> tuple[str, ...]:
    """The dotted name of a file, in parts."""
    source = ROOT / "harness"
    return path.relative_to(source if path.is_relative_to(source) else ROOT).with_suffix("").parts


@functools.cache
def parse(path: Path) -> ast.Module:
    """The syntax tree of a file, read once for all tests."""
    return ast.parse(path.read_text())


@functools.cache
def imports(path: Path, *, at_import_only: bool = False) -> set[str]:
    """Dotted names that a file imports, type-checking blocks left out."""
    names: set[str] = set()

    def walk(node: ast.AST) -> None:
        for child in ast.iter_child_nodes(node):
            if isinstance(child, ast.If) and getattr(child.test, "id", "") == "TYPE_CHECKING":
                continue
            if at_import_only and isinstance(child, (ast.FunctionDef, ast.AsyncFunctionDef, ast.Lambda)):
                continue
            if isinstance(child, ast.Import):
                names.update(alias.name for alias in child.names)
            elif isinstance(child, ast.ImportFrom) and child.module:
                names.add(child.module)
                names.update(f"{child.module}.{alias.name}" for alias in child.names)
            walk(child)

    walk(parse(path))
    return names


def room_of(path: Path) -> str:
    return parts_of(path)[1]


def room_of_name(name: str) -> str:
    return name.split(".")[1] if "." in name else ""


def module_of(path: Path) -> str:
    return ".".join(parts_of(path)).removesuffix(".__init__")


def arrows(package: str) -> dict[str, set[str]]:
    """Which modules of a package each of its modules imports, at any depth of the file."""
    known = {module_of(path): path for path in modules(package)}
    return {name: (imports(path) & set(known)) - {name} for name, path in known.items()}


def circle(graph: dict[str, set[str]]) -> list[str]:
    """One circle of a graph, as the names along it; empty where there is none."""
    try:
        tuple(graphlib.TopologicalSorter(graph).static_order())
    except graphlib.CycleError as error:
        return list(error.args[1])
    return []


def test_every_test_says_its_behaviour():
    """One docstring line each, so that a failure reads as a sentence."""
    silent = [
        f"{path.name}::{node.name}"
        for folder in ("tests", "benchmarks")
        for path in modules(folder)
        for node in ast.walk(parse(path))
        if isinstance(node, ast.FunctionDef) and node.name.startswith("test_") and not ast.get_docstring(node)
    ]
    assert not silent


@pytest.mark.parametrize(("package", "rank"), [("lorameter", RANK), ("kernels_check", STOREYS)])
def test_rooms_point_down(package, rank):
    """What a module imports of another room lies strictly below; lazy imports included, no exceptions."""
    rooms = {room_of(path) for path in modules(package)} - {"__init__"}
    assert rooms <= set(rank), f"no place in the order: {rooms - set(rank)}"
    up = [
        f"{name} imports {other}"
        for name, others in arrows(package).items()
        for other in others
        for room, its in [(name.split(".")[1:2], other.split(".")[1:2])]
        if room and its and room != its and rank[its[0]] >= rank[room[0]]
    ]
    assert not up, "\n".join(up)


@pytest.mark.parametrize("room", ["verdicts", "attach"])
def test_nobody_but_those_who_measure_knows_the_trial(room):
    """What judges records, and what runs in the user's process, must not import it."""
    assert not [
        f"{name} imports {other}"
        for name, others in arrows("lorameter").items()
        for other in others
        if (room_of_name(name), room_of_name(other)) == (room, "trial")
    ]


@pytest.mark.parametrize("package", ["lorameter", "kernels_check"])
def test_no_circle(package):
    """Modules import each other in one direction, inside a room and at any depth of a file."""
    assert not circle(arrows(package))


def test_no_module_is_longer_than_500_lines():
    """A longer one holds several ideas."""
    paths = [path for package in ("lorameter", "kernels_check") for path in modules(package)]
    assert not [module_of(path) for path in paths if len(path.read_text().splitlines()) > 500]


def test_a_room_holds_nothing_but_its_name():
    """The `__init__` of a room is a docstring, or every command pays for what it imports; what scripts import of attach
    is loaded when it is asked for."""
    for room in set(ORDER) - {"errors", "stats", "wire", "attach"}:
        path = ROOT / "harness" / "lorameter" / room / "__init__.py"
        assert [type(node).__name__ for node in parse(path).body] == ["Expr"], room


def test_torch_stays_in_its_layers():
    """At import, torch and its kind are loaded by the packages that measure only."""
    others = [path for path in modules("lorameter") if room_of(path) not in TORCH]
    assert not [
        module_of(path)
        for path in others
        if {name.split(".")[0] for name in imports(path, at_import_only=True)} & HEAVY
    ]


def test_kernels_check_stands_alone():
    """It imports nothing of the harness."""
    assert not [
        module_of(path)
        for path in modules("kernels_check")
        if any(name.split(".")[0] == "lorameter" for name in imports(path))
    ]


def test_the_statistics_know_numbers_and_not_trials():
    """lorameter.stats imports nothing else of the harness."""
    for path in modules("harness/lorameter/stats"):
        others = {
            name for name in imports(path) if name.startswith("lorameter.") and not name.startswith("lorameter.stats")
        }
        assert not others, path


def test_what_programs_print_is_read_in_any_encoding():
    """A file name or a message in another encoding is no reason to fail: text from a process says what to do with bytes
    that are not valid."""
    offenders = []
    for path in modules("lorameter"):
        calls = [node for node in ast.walk(parse(path)) if isinstance(node, ast.Call)]
        named = [{keyword.arg for keyword in call.keywords} for call in calls]
        if any("text" in one and one & {"stdout", "capture_output"} and "errors" not in one for one in named):
            offenders.append(module_of(path))
    assert not offenders
