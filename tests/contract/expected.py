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
    "explained": "bool", "first_difference": "int",
}  # fmt: skip
"""Keys whose presence depends on the noise of the machine, with their types."""
MACHINE = ("settings", "libraries", "git")
"""Keys of the provenance whose content depends on the machine and on the checkout."""


def check_text(name: str, found: str, *, ignore_space: bool = False) -> None:
    """Compare a text; `ignore_space` ignores where lines break."""
    found = "\n".join(line.rstrip() for line in found.splitlines()) + "\n"
    kept = _read(name)
    if ignore_space and kept is not None and kept.split() == found.split():
        found = kept
    _settle(name, found, kept)


def check_document(name: str, found: Any) -> None:
    """Compare a JSON document."""
    _settle_json(name, found, _same_numbers)


def check_shape(name: str, found: Any) -> None:
    """Compare the keys and types of a JSON document."""
    _settle_json(name, shape(found), _covered)


def check_run(name: str, run: Path) -> None:
    """Compare the file names of a run, and keys and types of its manifest and of the last record of each trial, with
    isolated trials separately."""
    last = {record["trial"]: record for record in read_records(run)}
    assert {record["status"] for record in last.values()} == {"ok"}
    records = [_without_the_host(record) for record in last.values()]
    kinds = {
        "records": [record for record in records if not record["trial"].endswith("-isolated")],
        "isolated records": [record for record in records if record["trial"].endswith("-isolated")],
    }
    manifest = json.loads((run / "manifest.json").read_text(encoding="utf-8"))
    check_shape(f"runs/{name}", {"manifest": _without_the_machine(manifest)} | kinds)
    check_document(f"runs/{name}-files", _files_of(run))


def read_records(run: Path) -> list[dict[str, Any]]:
    """Return the lines of trials.jsonl."""
    return [json.loads(line) for line in (run / "trials.jsonl").read_text(encoding="utf-8").splitlines()]


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
        return [_merged(shapes)] if shapes else []
    return {bool: "bool", int: "int", float: "float", str: "str", type(None): "null"}[type(value)]


def _files_of(run: Path) -> list[str]:
    """Return the names of a run's files, with hashes removed."""
    names = (path.relative_to(run).as_posix() for path in run.rglob("*") if path.is_file())
    return sorted({f"tokens-*{Path(name).suffix}" if name.startswith("tokens-") else name for name in names})


def _without_the_machine(manifest: dict[str, Any]) -> dict[str, Any]:
    """Return a manifest without keys that depend on the machine, and without notices after checking their shape."""
    assert all(shape(notice) == NOTICE for notice in manifest.pop("notices"))
    provenance = {key: value for key, value in manifest["provenance"].items() if key not in MACHINE}
    assert set(MACHINE) <= set(manifest["provenance"])
    return manifest | {"provenance": provenance}


def _without_the_host(record: dict[str, Any]) -> dict[str, Any]:
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


def _merged(shapes: list[Any]) -> Any:
    plain = [one["null or"] if isinstance(one, dict) and set(one) == {"null or"} else one for one in shapes]
    if not all(isinstance(one, str) for one in plain) and ("null" in plain or plain != shapes):
        return {"null or": _merged([one for one in plain if one != "null"])}
    if all(isinstance(one, dict) for one in shapes):
        keys = dict.fromkeys(key.removesuffix("?") for one in shapes for key in one)
        merged = {}
        for key in keys:
            given = [one.get(key, one.get(f"{key}?")) for one in shapes]
            always = all(key in one for one in shapes)
            merged[key if always else f"{key}?"] = _merged([one for one in given if one is not None])
        return merged
    if all(isinstance(one, list) for one in shapes):
        elements = [element for one in shapes for element in one]
        return [_merged(elements)] if elements else []
    if all(isinstance(one, str) for one in shapes):
        return "|".join(sorted({word for one in shapes for word in one.split("|")}))
    return shapes[0]


def _covered(kept: Any, found: Any) -> Any:
    """Return the found shape, with parts that the expected shape allows written as in the expected shape."""
    if isinstance(kept, dict) and isinstance(found, dict):
        if set(kept) == {"null or"} != set(found):
            return kept if _covered(kept["null or"], found) == kept["null or"] else found
        result = {}
        for key, value in kept.items():
            name = key.removesuffix("?")
            if name in found or (f"{name}?" in found and key != name):
                result[key] = _covered(value, found.get(name, found.get(f"{name}?")))
            elif key != name:
                result[key] = value
        return result | {key: value for key, value in found.items() if key.removesuffix("?") not in _names(kept)}
    if isinstance(kept, dict) and set(kept) == {"null or"} and found == "null":
        return kept
    if isinstance(kept, list) and isinstance(found, list):
        return [_covered(kept[0], found[0])] if kept and found else found or kept
    if isinstance(kept, str) and isinstance(found, str) and set(found.split("|")) <= set(kept.split("|")):
        return kept
    return found


def _names(shape: dict[str, Any]) -> set[str]:
    return {key.removesuffix("?") for key in shape}


def _same_numbers(kept: Any, found: Any) -> Any:
    """Return the found document with rounded floats; floats that are equal within the precision are written as
    expected."""
    if isinstance(found, dict):
        others = kept if isinstance(kept, dict) else {}
        return {key: _same_numbers(others.get(key), value) for key, value in found.items()}
    if isinstance(found, list):
        others = kept if isinstance(kept, list) and len(kept) == len(found) else [None] * len(found)
        return [_same_numbers(other, value) for value, other in zip(found, others, strict=True)]
    if isinstance(found, float) and math.isfinite(found):
        same = isinstance(kept, float) and math.isclose(found, kept, rel_tol=10.0 ** (1 - DIGITS), abs_tol=1e-13)
        return kept if same else float(f"{found:.{DIGITS}g}")
    return found


def _read(name: str) -> str | None:
    path = FOLDER / name
    return path.read_text(encoding="utf-8") if path.is_file() else None


def _settle_json(name: str, found: Any, agree: Any) -> None:
    kept = _read(f"{name}.json")
    before = None if kept is None else json.loads(kept)
    agreed = agree(before, found)
    text = json.dumps(agreed, indent=1, ensure_ascii=False, allow_nan=False, sort_keys=True) + "\n"
    _settle(f"{name}.json", text, kept)


def _settle(name: str, found: str, kept: str | None) -> None:
    if os.environ.get("LORAMETER_CONTRACT") == "write":
        path = FOLDER / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(found, encoding="utf-8")
        return
    if kept is None:
        pytest.fail(f"expected/{name} is missing. LORAMETER_CONTRACT=write writes it; found:\n{found}", pytrace=False)
    if found != kept:
        lines = list(difflib.unified_diff(kept.splitlines(), found.splitlines(), f"expected/{name}", "found", n=2))
        pytest.fail("\n".join(line.rstrip("\n") for line in lines[:200]), pytrace=False)
