"""Every key of studies and policies, as Markdown, from the dataclasses that read them: `lorameter list keys`.

Names, types and defaults are those of the fields, and what is said of each is the line that stands below it in the
code. So the page cannot come to say something else than what is read.
"""

from __future__ import annotations

import ast
import dataclasses
import enum
import inspect
import itertools
import textwrap
import types
import typing
from collections.abc import Collection, Iterator, Mapping
from typing import Any

import msgspec

from kernels_check import REQUIREMENTS
from lorameter.commands import json_schema
from lorameter.commands.output import SCHEMA
from lorameter.results.columns import SETTINGS, TABLES
from lorameter.results.frames import DTYPES
from lorameter.studies import claim, study_file
from lorameter.studies.claim import Claim, ClaimPart
from lorameter.studies.engine import Engine
from lorameter.studies.protocol import Protocol
from lorameter.studies.variant import AnyVariant, FullVariant, LoraVariant, PeftVariant, ScriptVariant, form_keys
from lorameter.studies.workload import OF_VARIANTS, DataColumns, Workload
from lorameter.verdicts import gate
from lorameter.verdicts.gate import LimitRule, Policy

TITLE = "# Reference: keys of studies and policies, columns of tables"
INTRODUCTION = """\
Made by `lorameter list keys` from the code that reads them; `pytest tests/docs/test_reference.py` fails where it is not
current. A key that is not here is refused, with the nearest one that is. Times are in seconds, sizes in bytes, shares
are fractions: 0.05 is 5 %."""


def write_reference() -> str:
    """The whole page."""
    return "\n".join(_lines()) + "\n"


def _lines() -> Iterator[str]:
    yield from (TITLE, "", INTRODUCTION, "", "## A study", "")
    yield from _block(study_file)
    sections: tuple[tuple[str, type, str], ...] = (
        (
            "[workload]",
            Workload,
            "What all variants train on and answer.",
        ),
        ("workload.columns", DataColumns, "The column of the data that plays each part, where it has another name."),
        ("[protocol]", Protocol, "How often and how long it is measured."),
        (
            "[controls], [axes], [sweeps], [[variant]]",
            LoraVariant,
            "A variant, of LoRA where it has none of the keys below; `[controls]` are equal for all that have the key. "
            f"`workload.KEY` is what it is measured on, for {', '.join(f'`{key}`' for key in OF_VARIANTS)}: not in "
            "`[controls]`, and never of the reference.",
        ),
        ("Another method of PEFT", PeftVariant, "In place of LoRA's own keys, from `r` to `init_lora_weights`."),
        ("Full fine-tuning", FullVariant, "In place of the same."),
        ("A command", ScriptVariant, "In place of all keys of a variant but its name."),
        ("[engine]", Engine, "Whose promises the claims are."),
        ("[[claim]]", Claim, "A sentence and its evidence."),
        ("claim.parts", ClaimPart, "One statement that data can support or refute."),
    )
    for title, cls, said in sections:
        yield from ("", f"## {title}", "", said, "")
        yield from _table(cls)
    yield from ("", "### The rules of a part", "", " ".join(_doc_of(claim, "Rule").split()), "")
    yield from ("", "## [requirements]", "", "Paths of `kernels_check` that are required of every "
                "variant, in addition to those that it implies:", "",
                ", ".join(f"`{path}`" for path in REQUIREMENTS) + ".", "")  # fmt: skip
    yield from ("## A policy", "", "A file for `--policy` of `gate`, `compare`, `report` and `ab`, and for "
                "`--lorameter-policy` of pytest.", "")  # fmt: skip
    yield from _block(gate)
    yield from ("", "### Keys", "")
    yield from _table(Policy)
    yield from ("", "### [[limit]]", "", "The last one that matches wins, key by key.", "")
    yield from _table(LimitRule)
    yield from ("", "## Columns of tables", "", "The tables of `lorameter.load` and `lorameter export`; `trials` and "
                "`estimates` end with the columns of `settings`.")  # fmt: skip
    tables = {name: [one for one in columns if one not in SETTINGS] for name, columns in TABLES.items()}
    for name, columns in (*tables.items(), ("settings", SETTINGS)):
        yield from ("", f"### `{name}`", "", "| column | type | |", "|---|---|---|")
        yield from (f"| `{one.name}` | {DTYPES[one.kind]} | {_cell(one.says)} |" for one in columns)


def _block(module: types.ModuleType) -> Iterator[str]:
    """The example in a module's docstring: from its first key to its last."""
    lines = inspect.cleandoc(module.__doc__ or "").split("\n")
    places = [place for place, line in enumerate(lines) if " = " in line or line.startswith("[")]
    yield "```toml"
    yield from lines[places[0] : places[-1] + 1]
    yield "```"


def _table(cls: type) -> Iterator[str]:
    docs, hints = documents_of(cls), typing.get_type_hints(cls)
    fields = {field.name: field for field in dataclasses.fields(cls)}
    names = list(fields)
    if issubclass(cls, AnyVariant):
        names = [key for key in form_keys(cls) if cls is LoraVariant or key in cls.__annotations__]
    yield "| key | value | default | |"
    yield "|---|---|---|---|"
    for field in map(fields.__getitem__, names):
        said = _cell(" ".join(docs.get(field.name, "").split()))
        yield f"| `{field.name}` | {_cell(_kind(hints[field.name]))} | {_cell(_default(field))} | {said} |"


def documents_of(cls: type) -> Mapping[str, str]:
    """What is below each field of a dataclass in its source and in those of its bases."""
    found = dict[str, str]()
    for base in (one for one in reversed(cls.__mro__) if one.__module__.startswith("lorameter")):
        (tree,) = ast.parse(textwrap.dedent(inspect.getsource(base))).body
        found |= _below(tree.body) if isinstance(tree, ast.ClassDef) else {}
    return found


def _doc_of(module: types.ModuleType, name: str) -> str:
    return _below(ast.parse(inspect.getsource(module)).body)[name]


def _below(body: list[ast.stmt]) -> dict[str, str]:
    found = {}
    for one, following in itertools.pairwise(body):
        named: ast.expr | None = one.target if isinstance(one, ast.AnnAssign) else None
        named = one.targets[0] if isinstance(one, ast.Assign) else named
        text = following.value if isinstance(following, ast.Expr) else None
        if isinstance(named, ast.Name) and isinstance(text, ast.Constant) and isinstance(text.value, str):
            found[named.id] = text.value
    return found


_KINDS: Mapping[Any, str] = {str: "text", int: "whole number", float: "number", bool: "true or false", Any: "any value"}


def _kind(hint: Any) -> str:
    """What may be written, in words; of a word its choices."""
    origin, args = typing.get_origin(hint), typing.get_args(hint)
    if origin is typing.Literal:
        return ", ".join(f"`{_toml(one)}`" for one in args)
    if origin in (typing.Union, types.UnionType):
        return " or ".join(dict.fromkeys(_kind(one) for one in args if one is not type(None)))
    if origin is tuple:
        return f"list of: {_kind(args[0])}"
    if origin is dict:
        return f"table of: {_kind(args[1])}"
    return "table, see there" if dataclasses.is_dataclass(hint) else _KINDS.get(hint, str(hint))


def _default(field: dataclasses.Field[Any]) -> str:
    if field.default is dataclasses.MISSING and field.default_factory is dataclasses.MISSING:
        return "must be given" if field.name != "name" else ""
    value = field.default if field.default_factory is dataclasses.MISSING else field.default_factory()
    if value is None:
        return "not set"
    if dataclasses.is_dataclass(value) or value in ({}, ()):
        return "empty"
    return f"`{_toml(value)}`"


def _toml(value: Any) -> str:
    if isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, str):
        return f'"{value}"'
    return f"[{', '.join(map(_toml, value))}]" if isinstance(value, tuple) else str(value)


def write_documents() -> str:
    """The page of the JSON documents: what each command prints, and what that is made of."""
    lines = ["# What `--json` prints", "", "Made by `lorameter list documents` from the types in "
             "`lorameter.commands.json_schema`; `--json` after it prints them as JSON Schema.", ""]  # fmt: skip
    lines += [inspect.cleandoc(json_schema.__doc__ or "").partition("\n\n")[2], "", f"The schema is {SCHEMA}."]
    for cls in (*json_schema.DOCUMENTS, *json_schema.PARTS):
        lines += ["", f"## {cls.__name__}", "", inspect.cleandoc(cls.__doc__ or ""), ""]
        lines += _members(cls) if issubclass(cls, enum.Enum) else _fields(cls, json_schema.DOCUMENTS)
    return "\n".join(lines) + "\n"


def _members(cls: type[enum.Enum]) -> Iterator[str]:
    docs = documents_of(cls)
    yield "| value | |"
    yield "|---|---|"
    yield from (f"| `{one.value}` | {_cell(' '.join(docs.get(one.name, '').split()))} |" for one in cls)


def _fields(cls: Any, documents: Collection[type]) -> Iterator[str]:
    """A row of each field that a document does not have from another one that it extends."""
    docs = documents_of(cls)
    hints = typing.get_type_hints(cls)
    known = {name for base in cls.__mro__[1:] if base in documents for name in typing.get_type_hints(base)}
    yield "| key | value | |"
    yield "|---|---|---|"
    for field in msgspec.inspect.type_info(cls).fields:  # type: ignore[attr-defined]  # of a Struct or a dataclass
        if field.name not in known:
            said = " ".join(docs.get(field.name, "").split())
            yield f"| `{field.name}` | {_cell(_json_kind(hints[field.name]))} | {_cell(said)} |"


def _json_kind(hint: Any) -> str:
    origin, args = typing.get_origin(hint), typing.get_args(hint)
    if origin in (typing.Union, types.UnionType):
        return " or ".join("null" if one is type(None) else _json_kind(one) for one in args)
    if origin is typing.Literal:
        return ", ".join(map(str, args))
    if origin in (list, tuple):
        return f"list of {_json_kind(args[0])}"
    if origin in (dict, Mapping):
        return f"table of {_json_kind(args[1])}"
    return _KINDS.get(hint) or f"{hint.__name__}"


def _cell(text: str) -> str:
    return text.replace("|", "\\|")
