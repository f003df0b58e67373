"""Writes docs/reference.md: every key of studies and policies, every column of tables (`lorameter list keys`).

Names, types and defaults come from the dataclasses that read the files, and the description of a field is the docstring
below it in the code. So the page always agrees with the code.
"""

from __future__ import annotations

import ast
import dataclasses
import inspect
import itertools
import json
import textwrap
import types
import typing
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from kernels_check import REQUIREMENTS
from lorameter.results.rows import DTYPES, SETTINGS, TABLES, FrameColumn
from lorameter.studies import claim, study_file
from lorameter.studies.claim import Claim, ClaimPart
from lorameter.studies.engine import Engine
from lorameter.studies.protocol import Protocol
from lorameter.studies.variant import AnyVariant, FullVariant, LoraVariant, PeftVariant, ScriptVariant, form_keys
from lorameter.studies.workload import OF_VARIANTS, DataColumns, Workload
from lorameter.verdicts import gate
from lorameter.verdicts.gate import LimitRule, Policy

INTRODUCTION = """\
# Reference: keys of studies and policies, columns of tables

Made by `lorameter list keys` from the code that reads them; `pytest tests/docs/test_pages.py` fails where it is not
current. A key that is not here is refused, with the nearest one that is. Times are in seconds, sizes in bytes, shares
are fractions: 0.05 is 5 %.
"""
SECTIONS: tuple[tuple[str, str, type], ...] = (
    (
        "## [workload]",
        "What all variants train on and answer.",
        Workload,
    ),
    ("## workload.columns", "The column of the data that plays each part, where it has another name.", DataColumns),
    ("## [protocol]", "How often and how long it is measured.", Protocol),
    (
        "## [controls], [axes], [sweeps], [[variant]]",
        "A variant, of LoRA where it has none of the keys below; `[controls]` are equal for all that have the key. "
        f"`workload.KEY` is what it is measured on, for {', '.join(f'`{key}`' for key in OF_VARIANTS)}: not in "
        "`[controls]`, and never of the reference.",
        LoraVariant,
    ),
    ("## Another method of PEFT", "In place of LoRA's own keys, from `r` to `init_lora_weights`.", PeftVariant),
    ("## Full fine-tuning", "In place of the same.", FullVariant),
    ("## A command", "In place of all keys of a variant but its name.", ScriptVariant),
    ("## [engine]", "Whose promises the claims are.", Engine),
    ("## [[claim]]", "A sentence and its evidence.", Claim),
    ("## claim.parts", "One statement that data can support or refute.", ClaimPart),
)
"""Heading, introduction and class of each table of a study."""
_KINDS: Mapping[Any, str] = {str: "text", int: "whole number", float: "number", bool: "true or false", Any: "any value"}


def write_reference() -> str:
    """The whole page."""
    settings = {column.name for column in SETTINGS}
    tables = {name: [one for one in columns if one.name not in settings] for name, columns in TABLES.items()}
    rules = texts_below(inspect.getsource(claim))["Rule"]
    paths = ", ".join(f"`{path}`" for path in REQUIREMENTS)
    parts = (
        INTRODUCTION,
        "## A study\n",
        _example_of(study_file),
        *(f"{title}\n\n{text}\n\n{_keys_of(cls)}" for title, text, cls in SECTIONS),
        f"### The rules of a part\n\n{' '.join(rules.split())}\n",
        "## [requirements]\n\nPaths of `kernels_check` that are required of every variant, in addition to those "
        f"that it implies:\n\n{paths}.\n",
        "## A policy\n\nA file for `--policy` of `gate`, `compare`, `report` and `ab`, and for `--lorameter-policy` "
        "of pytest.\n",
        _example_of(gate),
        f"### Keys\n\n{_keys_of(Policy)}",
        f"### [[limit]]\n\nThe last one that matches wins, key by key.\n\n{_keys_of(LimitRule)}",
        "## Columns of tables\n\nThe tables of `lorameter.load` and `lorameter export`; `trials` and `estimates` end "
        "with the columns of `settings`.\n",
        *(f"### `{name}`\n\n{_columns_of(columns)}" for name, columns in tables.items()),
        f"### `settings`\n\n{_columns_of(SETTINGS)}",
    )
    return "\n".join(parts)


def _table(heads: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """A Markdown table; its last column has no header."""
    lines = [f"| {' | '.join(heads)} | |", f"|{'---|' * (len(heads) + 1)}"]
    for row in rows:
        cells = " | ".join(cell.replace("|", "\\|") for cell in row)
        lines.append(f"| {cells} |")
    return "\n".join([*lines, ""])


def _columns_of(columns: Iterable[FrameColumn]) -> str:
    return _table(("column", "type"), ((f"`{one.name}`", DTYPES[one.kind], one.description) for one in columns))


def _example_of(module: types.ModuleType) -> str:
    """The example in a module's docstring: from its first key to its last."""
    lines = inspect.cleandoc(module.__doc__ or "").split("\n")
    places = [place for place, line in enumerate(lines) if " = " in line or line.startswith("[")]
    return "\n".join(["```toml", *lines[places[0] : places[-1] + 1], "```\n"])


def _keys_of(cls: type) -> str:
    """The table of a class: each key with its values, its default and its description."""
    texts, hints = documents_of(cls), typing.get_type_hints(cls)
    fields = {field.name: field for field in dataclasses.fields(cls)}
    names: Iterable[str] = fields
    if issubclass(cls, AnyVariant):
        names = [key for key in form_keys(cls) if cls is LoraVariant or key in cls.__annotations__]
    rows = (
        (f"`{name}`", _kind(hints[name]), _default(fields[name]), " ".join(texts.get(name, "").split()))
        for name in names
    )
    return _table(("key", "value", "default"), rows)


def documents_of(cls: type) -> dict[str, str]:
    """The docstring below each field of a dataclass, including inherited fields."""
    bases = [base for base in reversed(cls.__mro__) if base.__module__.startswith("lorameter")]
    return {name: text for base in bases for name, text in texts_below(inspect.getsource(base)).items()}


def texts_below(source: str) -> dict[str, str]:
    """The docstrings below the names that a module, or the only class in it, defines."""
    body = ast.parse(textwrap.dedent(source)).body
    body = body[0].body if isinstance(body[0], ast.ClassDef) else body
    texts = {}
    for one, following in itertools.pairwise(body):
        if isinstance(one, (ast.AnnAssign, ast.Assign)) and isinstance(following, ast.Expr):
            (name,) = [one.target] if isinstance(one, ast.AnnAssign) else one.targets
            texts[ast.unparse(name)] = ast.literal_eval(following.value)
    return texts


def _kind(hint: Any) -> str:
    """The possible values of a key, as text."""
    origin, args = typing.get_origin(hint), typing.get_args(hint)
    if origin is typing.Literal:
        return ", ".join(f"`{json.dumps(one, ensure_ascii=False)}`" for one in args)
    if origin in (typing.Union, types.UnionType):
        return " or ".join(dict.fromkeys(_kind(one) for one in args if one is not type(None)))
    if origin is tuple:
        return f"list of: {_kind(args[0])}"
    if origin is dict:
        return f"table of: {_kind(args[1])}"
    return "table, see there" if dataclasses.is_dataclass(hint) else _KINDS.get(hint, str(hint))


def _default(field: dataclasses.Field[Any]) -> str:
    value = field.default_factory() if callable(field.default_factory) else field.default
    if value is dataclasses.MISSING:
        return "must be given" if field.name != "name" else ""
    if value is None:
        return "not set"
    if dataclasses.is_dataclass(value) or value in ({}, ()):
        return "empty"
    return f"`{json.dumps(value, ensure_ascii=False)}`"
