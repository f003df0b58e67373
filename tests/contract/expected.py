"""Comparison with the expected files, which `LORAMETER_CONTRACT=write pytest tests/contract` updates.

Text is compared exactly; floats of a JSON document to ten significant digits, because the last digits depend on the
CPU; values that depend on the machine or the clock only by shape: keys and types. A missing expected file is a failure.

The shape of a list is the merged shape of its elements: an optional key ends in "?", and different types are joined by
"|".
"""

from __future__ import annotations

import difflib
import json
import math
import os
from pathlib import Path
from typing import Any

import pytest

FOLDER = Path(__file__).parent / "expected"
DIGITS = 10
NOTICE = {"code": "str", "message": "str", "remedy": "str"}
NULLABLE = {
    "low": "float", "high": "float", "mde80": "float", "replicates_needed": "int", "invalid": "str", "reason": "str",
    "explained": "bool", "first_difference": "int", "cuda": "str",
    "measured_bytes": "int", "error": "float",
}  # fmt: skip
"""Keys whose value depends on the noise of the machine, the build of torch, or whether a stored run is of this CPU,
with their types."""
MACHINE = ("settings", "libraries", "git")
"""Keys of the provenance whose content depends on the machine and on the checkout."""


def check_text(name: str, actual: str, *, ignore_space: bool = False) -> None:
    """Compare a text; `ignore_space` ignores where lines break."""
    actual = "\n".join(line.rstrip() for line in actual.splitlines()) + "\n"
    expected = _read(name)
    if ignore_space and expected is not None and expected.split() == actual.split():
        actual = expected
    _compare_text(name, actual, expected)


def check_document(name: str, actual: Any) -> None:
    """Compare a JSON document."""
    _compare_json(name, actual, _match_numbers)


def check_shape(name: str, actual: Any) -> None:
    """Compare the keys and types of a JSON document."""
    _compare_json(name, shape(actual), _match_shape)


def check_run(name: str, run: Path) -> None:
    """Compare the file names of a run, and keys and types of its manifest and of the last record of each trial, with
    isolated trials separately."""
    records = read_records(run)
    assert {record["status"] for record in records} == {"ok"}
    records = [_remove_host(record) for record in records]
    kinds = {
        "records": [record for record in records if not record["trial"].endswith("-isolated")],
        "isolated records": [record for record in records if record["trial"].endswith("-isolated")],
    }
    manifest = json.loads((run / "manifest.json").read_text(encoding="utf-8"))
    check_shape(f"runs/{name}", {"manifest": _remove_machine(manifest)} | kinds)
    check_document(f"runs/{name}-files", _list_files(run))


def read_records(run: Path) -> list[dict[str, Any]]:
    """Return the last record of each trial; a long trial has earlier ones, written while it was under way."""
    lines = (run / "trials.jsonl").read_text(encoding="utf-8").splitlines()
    return list({record["trial"]: record for record in map(json.loads, lines)}.values())


def parse(text: str) -> Any:
    """Return the only document in a text; NaN and infinity are invalid JSON."""

    def refuse(word: str) -> Any:
        raise AssertionError(f"{word} is not JSON")

    return json.loads(text, parse_constant=refuse)


def shape(value: Any) -> Any:
    """Return keys and types."""
    if isinstance(value, dict):
        return {key: _shape_of_key(key, one) for key, one in value.items()}
    if isinstance(value, list):
        shapes = [shape(one) for one in value]
        return [_merge_shapes(shapes)] if shapes else []
    return {bool: "bool", int: "int", float: "float", str: "str", type(None): "null"}[type(value)]


def _list_files(run: Path) -> list[str]:
    """Return the names of a run's files, with hashes removed."""
    names = (path.relative_to(run).as_posix() for path in run.rglob("*") if path.is_file())
    return sorted({f"tokens-*{Path(name).suffix}" if name.startswith("tokens-") else name for name in names})


def _remove_machine(manifest: dict[str, Any]) -> dict[str, Any]:
    """Return a manifest without keys that depend on the machine, and without notices after checking their shape."""
    assert all(shape(notice) == NOTICE for notice in manifest.pop("notices"))
    provenance = {key: value for key, value in manifest["provenance"].items() if key not in MACHINE}
    assert set(MACHINE) <= set(manifest["provenance"])
    return manifest | {"provenance": provenance}


def _remove_host(record: dict[str, Any]) -> dict[str, Any]:
    """Return a record without host counters, which depend on the kernel, without package versions, and without notices
    after checking their shape."""
    assert all(shape(notice) == NOTICE for notice in record.pop("notices"))
    software = record.pop("software")
    assert not software or "torch" in software
    record["values"] = {key: value for key, value in record["values"].items() if not key.startswith("host_")}
    return record


def _shape_of_key(key: str, value: Any) -> Any:
    kind = shape(value)
    return "|".join(sorted({NULLABLE[key], "null"})) if key in NULLABLE and kind in (NULLABLE[key], "null") else kind


def _merge_shapes(shapes: list[Any]) -> Any:
    plain = [one["null or"] if isinstance(one, dict) and set(one) == {"null or"} else one for one in shapes]
    if not all(isinstance(one, str) for one in plain) and ("null" in plain or plain != shapes):
        return {"null or": _merge_shapes([one for one in plain if one != "null"])}
    if all(isinstance(one, dict) for one in shapes):
        keys = dict.fromkeys(key.removesuffix("?") for one in shapes for key in one)
        merged = {}
        for key in keys:
            values = [one.get(key, one.get(f"{key}?")) for one in shapes]
            always = all(key in one for one in shapes)
            merged[key if always else f"{key}?"] = _merge_shapes([one for one in values if one is not None])
        return merged
    if all(isinstance(one, list) for one in shapes):
        elements = [element for one in shapes for element in one]
        return [_merge_shapes(elements)] if elements else []
    if all(isinstance(one, str) for one in shapes):
        return "|".join(sorted({word for one in shapes for word in one.split("|")}))
    return shapes[0]


def _match_shape(expected: Any, actual: Any) -> Any:
    """Return the actual shape, with parts that the expected shape allows written as in the expected shape."""
    if isinstance(expected, dict) and isinstance(actual, dict):
        if set(expected) == {"null or"} != set(actual):
            return expected if _match_shape(expected["null or"], actual) == expected["null or"] else actual
        result = {}
        for key, value in expected.items():
            name = key.removesuffix("?")
            if name in actual or (f"{name}?" in actual and key != name):
                result[key] = _match_shape(value, actual.get(name, actual.get(f"{name}?")))
            elif key != name:
                result[key] = value
        return result | {key: value for key, value in actual.items() if key.removesuffix("?") not in _names(expected)}
    if isinstance(expected, dict) and set(expected) == {"null or"} and actual == "null":
        return expected
    if isinstance(expected, list) and isinstance(actual, list):
        return [_match_shape(expected[0], actual[0])] if expected and actual else actual or expected
    if isinstance(expected, str) and isinstance(actual, str) and set(actual.split("|")) <= set(expected.split("|")):
        return expected
    return actual


def _names(shape: dict[str, Any]) -> set[str]:
    return {key.removesuffix("?") for key in shape}


def _match_numbers(expected: Any, actual: Any) -> Any:
    """Return the actual document with rounded floats; floats that are equal within the precision are written as
    expected."""
    if isinstance(actual, dict):
        others = expected if isinstance(expected, dict) else {}
        return {key: _match_numbers(others.get(key), value) for key, value in actual.items()}
    if isinstance(actual, list):
        others = expected if isinstance(expected, list) and len(expected) == len(actual) else [None] * len(actual)
        return [_match_numbers(other, value) for value, other in zip(actual, others, strict=True)]
    if isinstance(actual, float) and math.isfinite(actual):
        same = isinstance(expected, float) and math.isclose(
            actual, expected, rel_tol=10.0 ** (1 - DIGITS), abs_tol=1e-13
        )
        return expected if same else float(f"{actual:.{DIGITS}g}")
    return actual


def _read(name: str) -> str | None:
    path = FOLDER / name
    return path.read_text(encoding="utf-8") if path.is_file() else None


def _compare_json(name: str, actual: Any, agree: Any) -> None:
    expected = _read(f"{name}.json")
    before = None if expected is None else json.loads(expected)
    agreed = agree(before, actual)
    text = json.dumps(agreed, indent=1, ensure_ascii=False, allow_nan=False, sort_keys=True) + "\n"
    _compare_text(f"{name}.json", text, expected)


def _compare_text(name: str, actual: str, expected: str | None) -> None:
    if os.environ.get("LORAMETER_CONTRACT") == "write":
        path = FOLDER / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(actual, encoding="utf-8")
        return
    if expected is None:
        pytest.fail(f"expected/{name} is missing. LORAMETER_CONTRACT=write writes it; actual:\n{actual}", pytrace=False)
    if actual != expected:
        lines = list(
            difflib.unified_diff(expected.splitlines(), actual.splitlines(), f"expected/{name}", "actual", n=2)
        )
        pytest.fail("\n".join(line.rstrip("\n") for line in lines[:200]), pytrace=False)
