"""Mutants of kernels_check: one rule dropped or moved, one comparison of a judge changed."""

from __future__ import annotations

import ast
import copy
import json
import re
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

RULES = "kernel_rules.json"
JUDGES = (
    *("check", "verification"),
    *("judges/adapter", "judges/attached", "judges/attention", "judges/base_layers", "judges/base_products"),
    *("judges/batch", "judges/execution", "judges/fused", "judges/learning", "judges/loss", "judges/optimizer"),
    *("judges/paths", "judges/request", "judges/trained"),
    *("observation/adapter_biases", "observation/adapter_calls", "observation/adapter_kinds"),
    *("observation/adapter_layers", "observation/events", "observation/mixing", "observation/operators"),
    *("observation/adapter_targets", "observation/adapter_updates", "observation/adapter_values"),
    *("observation/attention_calls", "observation/attention_layers", "observation/base_state", "observation/blocks"),
    *("observation/backward_passes", "observation/broken_calls", "observation/calls", "observation/census"),
    *("observation/compilations", "observation/compiled_blocks", "observation/cross_entropies"),
    *("observation/digest", "observation/fourbit", "observation/forwards", "observation/gradients"),
    *("observation/inputs", "observation/isolation", "observation/layer_products", "observation/optimizers"),
    *("observation/packed_step", "observation/padding", "observation/perturbation", "observation/products"),
    *("observation/recomputed_blocks", "observation/records", "observation/storage", "observation/stored_layout"),
    *("observation/loss_tokens", "observation/swapped", "observation/trained_parts", "observation/updates"),
    *("ranks/activity", "ranks/judges"),
)
"""Modules that judge, and those that decide what a judge is shown; each is called by its last name."""
NEGATED = {
    **{ast.Eq: ast.NotEq, ast.NotEq: ast.Eq, ast.Is: ast.IsNot, ast.IsNot: ast.Is, ast.In: ast.NotIn},
    **{ast.NotIn: ast.In, ast.Lt: ast.GtE, ast.GtE: ast.Lt, ast.Gt: ast.LtE, ast.LtE: ast.Gt},
}
MOVED = {ast.Lt: ast.LtE, ast.LtE: ast.Lt, ast.Gt: ast.GtE, ast.GtE: ast.Gt}


@dataclass(frozen=True, slots=True, kw_only=True)
class Mutant:
    """One change of one file of the package."""

    key: str
    file: str
    text: str
    function: str | None = None
    """Enclosing function, whose tests are asked; None asks those that read the rules."""


def all_mutants(package: Path, names: Path, only: str | None) -> list[Mutant]:
    """Every mutant, or those of one module, or of the rules."""
    known = json.loads(names.read_text())
    mutants = list(rule_mutants(json.loads((package / RULES).read_text()), known))
    for module in JUDGES:
        mutants += code_mutants(f"{module}.py", (package / f"{module}.py").read_text())
    return [mutant for mutant in mutants if only in (None, Path(mutant.file).stem)]


def rule_mutants(document: dict[str, Any], names: dict[str, dict[str, list[str]]]) -> Iterator[Mutant]:
    """Drop each rule; move each in front of an earlier one with which it shares a known name."""
    for table, known in (("rules", names["kernels"]), ("operators", names["operators"])):
        rules = document[table]
        every = [name.removeprefix("void ") for group in known.values() for name in group]
        matching = [{name for name in every if re.search(rule["pattern"], name)} for rule in rules]
        for index, rule in enumerate(rules):
            rest = [*rules[:index], *rules[index + 1 :]]
            yield _rules(f"{RULES}: drop {table} {rule['name']}", document | {table: rest})
            for earlier in range(index):
                if matching[earlier] & matching[index]:
                    moved = [*rest[:earlier], rule, *rest[earlier:]]
                    where = f"{rule['name']} before {rules[earlier]['name']}"
                    yield _rules(f"{RULES}: {table} {where}", document | {table: moved})


def _rules(key: str, document: dict[str, Any]) -> Mutant:
    return Mutant(key=key, file=RULES, text=json.dumps(document))


def code_mutants(file: str, source: str) -> Iterator[Mutant]:
    """Change every comparison, ``and``, ``or`` and ``not`` of a module, one at a time."""
    module = Path(file).stem
    tree = ast.parse(source)
    enclosing = {
        id(node): outer.name
        for outer in ast.walk(tree)
        if isinstance(outer, ast.FunctionDef)
        for node in ast.walk(outer)
    }  # ast.walk is breadth first: of nested functions the inner one comes last and stays
    seen = Counter[str]()
    for number, node in enumerate(ast.walk(tree)):
        for change in _changes(node):
            changed = copy.deepcopy(tree)
            target = next(other for index, other in enumerate(ast.walk(changed)) if index == number)
            before = ast.unparse(target)
            replaced = change(target)
            if replaced is not target:
                changed = _Replace(target, replaced).visit(changed)
            function = enclosing.get(id(node))
            key = f"{module}.{function}: {before} -> {ast.unparse(replaced)}"
            seen[key] += 1
            key += f" #{seen[key]}" if seen[key] > 1 else ""
            yield Mutant(key=key, file=file, text=ast.unparse(changed), function=f"{module}.{function}")


def _changes(node: ast.AST) -> Iterator[Callable[[Any], ast.expr]]:
    """Ways to change one node; each works on a copy of it."""
    if isinstance(node, ast.Compare):
        for position, operator in enumerate(node.ops):
            for kinds in (NEGATED, MOVED):
                if type(operator) in kinds:
                    yield _with_operator(position, kinds[type(operator)])
    elif isinstance(node, ast.BoolOp):
        yield _exchanged
    elif isinstance(node, ast.UnaryOp) and isinstance(node.op, ast.Not):
        yield lambda negation: negation.operand


def _with_operator(position: int, kind: type[ast.cmpop]) -> Callable[[Any], ast.expr]:
    def change(comparison: Any) -> Any:
        comparison.ops[position] = kind()
        return comparison

    return change


def _exchanged(operation: Any) -> Any:
    operation.op = ast.Or() if isinstance(operation.op, ast.And) else ast.And()
    return operation


class _Replace(ast.NodeTransformer):
    def __init__(self, old: ast.AST, new: ast.AST) -> None:
        self._old, self._new = old, new

    def visit(self, node: ast.AST) -> ast.AST:
        return self._new if node is self._old else self.generic_visit(node)
