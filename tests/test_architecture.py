"""Who may import whom: a lower layer never imports a higher one, and torch stays where it belongs."""

from __future__ import annotations

import ast
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
LAYERS: tuple[tuple[str, ...], ...] = (
    (
        "errors",
        "codec",
        "units",
        "variant",
        "workload",
        "protocol",
        "record",
        "failure",
        "processes",
        "locks",
        "claim",
        "study",
        "study_file",
        "plan",
    ),
    ("stats",),
    (
        "catalogue",
        "shapes",
        "fetch",
        "store",
        "provenance",
        "environments",
        "meters",
        "series",
        "disturbance",
        "feasibility",
        "forecast",
        "flops",
        "decoding",
        "peaks",
        "ceiling",
        "profile",
        "accounting",
        "memory_account",
        "memory_estimate",
        "activations",
        "adapter",
        "quantised",
        "diagnosis",
        "evidence",
        "levels",
        "budget",
        "stopping",
        "verdicts",
    ),
    (
        "executors",
        "sides",
        "training",
        "inference",
        "report",
        "comparands",
        "benchmark_json",
        "agreement",
        "compare",
        "ab_report",
        "calibrate",
        "doctor",
        "baselines",
        "remedy",
        "gate",
        "sample",
        "claims",
    ),
    ("conductor", "runner", "worker", "measure", "profiling", "resume", "ab"),
    (
        "cli",
        "commands",
        "commands_ab",
        "commands_doctor",
        "commands_estimate",
        "commands_profile",
        "commands_run",
        "commands_sample",
        "commands_study",
        "pytest_plugin",
        "pytest_export",
        "pytest_gate",
        "pytest_resume",
    ),
)
LEVEL = {name: level for level, names in enumerate(LAYERS) for name in names}
TORCH = ("training", "inference", "meters")
HEAVY = {"torch", "transformers", "peft", "bitsandbytes", "datasets", "pandas"}


def modules(package: str) -> list[Path]:
    return sorted((ROOT / package).rglob("*.py"))


def imports(path: Path, *, at_import_only: bool = False) -> set[str]:
    """Dotted names that a file imports, type-checking blocks left out."""
    names: set[str] = set()

    def walk(node: ast.AST) -> None:
        for child in ast.iter_child_nodes(node):
            if isinstance(child, ast.If) and "TYPE_CHECKING" in ast.unparse(child.test):
                continue
            if at_import_only and isinstance(child, (ast.FunctionDef, ast.AsyncFunctionDef, ast.Lambda)):
                continue
            if isinstance(child, ast.Import):
                names.update(alias.name for alias in child.names)
            elif isinstance(child, ast.ImportFrom) and child.module:
                names.add(child.module)
                names.update(f"{child.module}.{alias.name}" for alias in child.names)
            walk(child)

    walk(ast.parse(path.read_text()))
    return names


def layer_of(path: Path) -> str:
    return path.relative_to(ROOT / "harness").parts[0].removesuffix(".py")


def test_every_test_says_its_behaviour():
    """One docstring line each, so that a failure reads as a sentence."""
    silent = [
        f"{path.name}::{node.name}"
        for folder in ("tests", "benchmarks")
        for path in modules(folder)
        for node in ast.walk(ast.parse(path.read_text()))
        if isinstance(node, ast.FunctionDef) and node.name.startswith("test_") and not ast.get_docstring(node)
    ]
    assert not silent


def test_every_module_has_a_layer():
    """A new module must be placed before it can be used."""
    unplaced = {layer_of(path) for path in modules("harness")} - set(LEVEL) - {"__init__"}
    assert not unplaced


@pytest.mark.parametrize("path", modules("harness"), ids=lambda path: str(path.relative_to(ROOT)))
def test_layers_point_down(path):
    """What a module imports of the harness is on its own level or below."""
    if layer_of(path) == "__init__":
        return
    own = LEVEL[layer_of(path)]
    for name in imports(path):
        parts = name.split(".")
        if parts[0] == "harness" and len(parts) > 1 and parts[1] in LEVEL:
            assert LEVEL[parts[1]] <= own, f"{path.name} (level {own}) imports {name} (level {LEVEL[parts[1]]})"


@pytest.mark.parametrize("path", modules("harness"), ids=lambda path: str(path.relative_to(ROOT)))
def test_torch_stays_in_its_layers(path):
    """At import, torch and its kind are loaded by training, inference and meters only."""
    if layer_of(path) in TORCH:
        return
    loaded = {name.split(".")[0] for name in imports(path, at_import_only=True)}
    assert not loaded & HEAVY, path


@pytest.mark.parametrize("path", modules("kernels_check"), ids=lambda path: str(path.relative_to(ROOT)))
def test_kernels_check_stands_alone(path):
    """It knows nothing of the harness."""
    assert not {name for name in imports(path) if name.split(".")[0] == "harness"}


def test_the_statistics_know_numbers_and_not_trials():
    """harness.stats imports nothing else of the harness."""
    for path in modules("harness/stats"):
        others = {
            name for name in imports(path) if name.startswith("harness.") and not name.startswith("harness.stats")
        }
        assert not others, path
