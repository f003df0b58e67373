"""Tests of the rules on imports: a lower layer never imports a higher one, and only measuring packages import torch."""

from __future__ import annotations

import ast
import functools
import graphlib
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
ORDER = (
    *"pipes terminal errors stats records measurements studies models machine wire trial attach".split(),
    *"verdicts results run profile parity report commands".split(),
)
"""Layers of lorameter, the lowest first."""
ENTRY_POINTS = ("cli", "pytest_plugin", "worker")
HARNESS_RANK = (
    {layer: place for place, layer in enumerate(ORDER)}
    | dict.fromkeys(ENTRY_POINTS, len(ORDER))
    | {"entry": len(ORDER) + 1, "__main__": len(ORDER) + 2}
)
CHECK_ORDER = (*"check rules observe trace judges step_watch ranks small_run selftest probe".split(),)
"""Layers of kernels_check; its entry points are its two dunder modules."""
CHECK_RANK = {layer: place for place, layer in enumerate(CHECK_ORDER)} | dict.fromkeys(
    ("__init__", "__main__"), len(CHECK_ORDER)
)
TORCH = ("trial", "attach")
FOLDERS = {"lorameter": "harness/lorameter"}
"""Folders of packages that are not in the root."""
QUICK = "stats studies records verdicts results".split()
"""Folders of tests that need neither torch nor a process (`make test-quick`)."""
HEAVY = {"torch", "transformers", "peft", "bitsandbytes", "datasets", "pandas"}


def modules(package: str) -> list[Path]:
    return sorted((ROOT / FOLDERS.get(package, package)).rglob("*.py"))


def parts_of(path: Path) -> tuple[str, ...]:
    """Return the dotted name of a file, in parts."""
    source = ROOT / "harness"
    return path.relative_to(source if path.is_relative_to(source) else ROOT).with_suffix("").parts


@functools.cache
def parse(path: Path) -> ast.Module:
    """Return the syntax tree of a file, read once for all tests."""
    return ast.parse(path.read_text())


@functools.cache
def imports(path: Path, *, at_import_only: bool = False) -> set[str]:
    """Return the dotted names that a file imports, without type-checking blocks."""
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


def layer_of(path: Path) -> str:
    return parts_of(path)[1]


def layer_of_name(name: str) -> str:
    return name.split(".")[1] if "." in name else ""


def module_of(path: Path) -> str:
    return ".".join(parts_of(path)).removesuffix(".__init__")


def import_graph(package: str) -> dict[str, set[str]]:
    """Return for each module of a package the modules of it that it imports, at any depth of the file."""
    known = {module_of(path): path for path in modules(package)}
    return {name: (imports(path) & set(known)) - {name} for name, path in known.items()}


def find_cycle(graph: dict[str, set[str]]) -> list[str]:
    """Return one cycle of a graph as the names along it, or an empty list."""
    try:
        tuple(graphlib.TopologicalSorter(graph).static_order())
    except graphlib.CycleError as error:
        return list(error.args[1])
    return []


def test_every_test_has_a_docstring():
    """Each test has a docstring, so that a failure reads as a sentence."""
    silent = [
        f"{path.name}::{node.name}"
        for folder in ("tests", "benchmarks")
        for path in modules(folder)
        for node in ast.walk(parse(path))
        if isinstance(node, ast.FunctionDef) and node.name.startswith("test_") and not ast.get_docstring(node)
    ]
    assert not silent


@pytest.mark.parametrize(("package", "rank"), [("lorameter", HARNESS_RANK), ("kernels_check", CHECK_RANK)])
def test_imports_point_down(package, rank):
    """A module imports only from strictly lower layers, including lazy imports."""
    layers = {layer_of(path) for path in modules(package)} - {"__init__"}
    assert layers <= set(rank), f"no place in the order: {layers - set(rank)}"
    up = [
        f"{name} imports {other}"
        for name, others in import_graph(package).items()
        for other in others
        for mine, its in [(name.split(".")[1:2], other.split(".")[1:2])]
        if mine and its and mine != its and rank[its[0]] >= rank[mine[0]]
    ]
    assert not up, "\n".join(up)


@pytest.mark.parametrize("layer", ["verdicts", "attach"])
def test_verdicts_and_the_meter_do_not_import_the_trial(layer):
    """Verdicts are computed from records only, and the meter runs in the user's process."""
    assert not [
        f"{name} imports {other}"
        for name, others in import_graph("lorameter").items()
        for other in others
        if (layer_of_name(name), layer_of_name(other)) == (layer, "trial")
    ]


@pytest.mark.parametrize("package", ["lorameter", "kernels_check"])
def test_no_cycle(package):
    """There is no import cycle, inside a layer and at any depth of a file."""
    assert not find_cycle(import_graph(package))


def test_no_module_is_longer_than_500_lines():
    """A longer module has several responsibilities."""
    paths = [path for package in ("lorameter", "kernels_check") for path in modules(package)]
    assert not [module_of(path) for path in paths if len(path.read_text().splitlines()) > 500]


def test_packages_import_nothing():
    """An `__init__` is only a docstring, so that commands do not pay for unused imports; attach loads its exports on
    access."""
    for layer in set(ORDER) - {"pipes", "terminal", "errors", "stats", "wire", "attach", "parity"}:
        path = ROOT / "harness" / "lorameter" / layer / "__init__.py"
        assert [type(node).__name__ for node in parse(path).body] == ["Expr"], layer


def test_only_packages_that_measure_import_torch():
    """The rule is about imports at module level, also of pandas and other slow libraries; the quick tests do not import
    torch either."""
    others = [path for path in modules("lorameter") if layer_of(path) not in TORCH]
    assert not [str(path) for folder in QUICK for path in modules(f"tests/{folder}") if "torch" in imports(path)]
    assert not [
        str(path) for path in others if {name.split(".")[0] for name in imports(path, at_import_only=True)} & HEAVY
    ]


def test_kernels_check_does_not_import_lorameter():
    """kernels_check imports nothing of lorameter."""
    assert not [
        module_of(path)
        for path in modules("kernels_check")
        if any(name.split(".")[0] == "lorameter" for name in imports(path))
    ]


def test_statistics_import_nothing_of_the_harness():
    """lorameter.stats computes on numbers only."""
    for path in modules("harness/lorameter/stats"):
        others = {
            name for name in imports(path) if name.startswith("lorameter.") and not name.startswith("lorameter.stats")
        }
        assert not others, path


def test_text_from_processes_has_an_error_handler():
    """A file name or a message may have another encoding and must not raise UnicodeDecodeError."""
    offenders = []
    for path in modules("lorameter"):
        calls = [node for node in ast.walk(parse(path)) if isinstance(node, ast.Call)]
        named = [{keyword.arg for keyword in call.keywords} for call in calls]
        if any("text" in one and one & {"stdout", "capture_output"} and "errors" not in one for one in named):
            offenders.append(module_of(path))
    assert not offenders
