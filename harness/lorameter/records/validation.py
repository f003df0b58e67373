"""The form of what a run keeps as plain tables, held against it when it is read.

Provenance, tokens, sides and the evidence of checks are written by rooms above this one and kept as they are, so that a
reader of another version finds what was there. Whoever reads a run still rests on a few of their keys. These are held
to their types here, so that a damaged file is refused by its name wherever it is read; one that is missing is unknown.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from typing import TYPE_CHECKING, Any, NoReturn

from lorameter.errors import UsageError, shorten
from lorameter.records import codec

if TYPE_CHECKING:
    from lorameter.records.manifest import Manifest
    from lorameter.records.record import TrialRecord

Form = Mapping[str, Any]
"""The type of each key that is rested on, or the form of the table below it."""

GIT: Form = {"commit": str | None, "dirty": bool | None}
PROVENANCE: Form = {
    "device": str,
    "device_name": str,
    "threads": int,
    "python": str,
    "driver": str | None,
    "cuda": str | None,
    "libraries": dict[str, str | None],
    "engine": dict[str, str | None],
    "kernels": {"cudnn": str | None, "cublas": str | None, "switches": dict[str, str]},
    "settings": dict[str, Any],
    "git": GIT,
    "worker": {"harness": str | None},
}
STUDY: Form = {"name": str, "title": str, "workload": {"model": str}, "protocol": {"mixed": bool}}
"""What is asked of a study before it is read as one, or of one that a newer version has written."""
SIDE: Form = {
    "label": str,
    "worker": str,
    "facts": {"packages": dict[str, str], "python": str, "cuda": str | None, "git": GIT},
}
TOKENS: Form = {
    "hash": str,
    "data": str,
    "real_tokens": int,
    "padded_tokens": int,
    "loss_tokens": int,
    "without_loss": int,
    "synthetic": bool,
    "tokenizer_substituted": bool,
    "examples": tuple[dict[str, str], ...],
}
CHECK: Form = {"path": str, "status": str}
LARGEST = 1e15
"""No time in seconds, no size in bytes and no loss comes near it, and what is far beyond it adds up to no number."""
LARGEST_TOKEN = 2**31
ALIKE = (("open_ended_tokens", "open_ended_request_time_s"),)
"""Samples of which the second has one for each of the first."""
_ANSWER, _NUMBERED = re.compile("answer_|base_answer_"), re.compile(r"(answer|base_answer)_[0-9]{1,6}")
_REMEDY = "Restore the file, or measure again."


def check_manifest(manifest: Manifest, where: str) -> None:
    """Raises `UsageError` for a manifest whose tables have not the form that readers rest on."""
    validate_table(manifest.provenance, PROVENANCE, f"{where}, provenance")
    validate_table(manifest.study, STUDY, f"{where}, study")
    variants = codec.from_json(tuple[dict[str, Any], ...], manifest.study.get("variants", ()), f"{where}, variants")
    for variant in variants:
        validate_table(variant, {"name": str}, f"{where}, study, variants")
        _check_lines(f"{where}, study, variants", {"name": variant.get("name", "")})
    _check_lines(f"{where}, study", {key: manifest.study.get(key, "") for key in ("name", "title")})
    _check_lines(where, {"run": manifest.run, **{f"order[{n}]": trial for n, trial in enumerate(manifest.order)}})
    own = codec.from_json(dict[str, dict[str, Any]], manifest.tokens.get("own", {}), f"{where}, tokens, own")
    for place, tokens in (("tokens", manifest.tokens), *((f"tokens, own, {name}", one) for name, one in own.items())):
        validate_table(tokens, TOKENS, f"{where}, {place}")
        for example in tokens.get("examples", ()):
            _require(example, ("prompt", "reference"), f"{where}, {place}, examples")
    if manifest.sides:
        _require(manifest.sides, ("base", "candidate"), f"{where}, sides")
    for name, side in manifest.sides.items():
        place = f"{where}, sides, {name}"
        side = codec.from_json(dict[str, Any], side, place)
        validate_table({**side, "facts": side.get("facts") or {}}, SIDE, place)
        _require(side, ("label", "worker"), place)
        if side.get("facts"):
            _require(side["facts"], ("packages",), f"{place}, facts")
    _check_finite(where, {"created_unix_s": manifest.created_unix_s})
    if manifest.spending is not None:
        spent = {"wall_s": manifest.spending.wall_s, **manifest.spending.measured_s}
        _check_finite(f"{where}, spending", spent)
    _check_finite(where, {f"resumed[{n}].unix_s": one.unix_s for n, one in enumerate(manifest.resumed)})


def check_record(record: TrialRecord, where: str, held: bool = False) -> None:
    """Raises `UsageError` for a record whose numbers or tables no trial could have left.

    Args:
        record: of a trial.
        where: names its source.
        held: whether its numbers are within `LARGEST` and its tokens were checked when they were read.
    """
    _check_lines(where, {"trial": record.trial, "name": record.name, "site": record.site})
    if not held:
        place = _place_of(record, where)
        _check_finite(place, {"started_unix_s": record.started_unix_s, "wall_time_s": record.wall_time_s})
        check_tokens(record.tokens, place)
    if record.status != "ok":
        return
    for key, other in ALIKE:
        if key in record.samples and len(record.samples[key]) != len(record.samples.get(other, ())):
            place = shorten(_place_of(record, where))
            raise UsageError(f"{place}: samples.{key} and samples.{other}: as many are expected. {_REMEDY}")
    if held:
        return
    for key, samples in record.samples.items():
        if not all(-LARGEST <= sample <= LARGEST for sample in samples):
            _refuse(place, f"samples.{key}", samples)
    if not all(-LARGEST <= value <= LARGEST for value in record.values.values()):
        _refuse(place, "values", record.values)


def _place_of(record: TrialRecord, where: str) -> str:
    return f"{where}, trial {shorten(record.trial, 60)}"


def check_tokens(tokens: Mapping[str, Any], where: str) -> None:
    """Raises `UsageError` for what is said of the tokens of a trial and is neither a number, a text nor tokens."""
    for key, value in tokens.items():
        fits = type(value) in (int, float, str, bool, type(None)) or (
            isinstance(value, list) and all(type(item) is int and 0 <= item < LARGEST_TOKEN for item in value)
        )
        if not fits or (_ANSWER.match(key) and not (isinstance(value, list) and _NUMBERED.fullmatch(key))):
            raise UsageError(f"{where}: tokens.{shorten(key, 60)}: a number, a text or a list of tokens is expected. "
                             f"{_REMEDY}")  # fmt: skip
    validate_table(tokens, {key: TOKENS[key] for key in ("hash", "real_tokens", "padded_tokens")}, where)


def validation_error(record: TrialRecord) -> str | None:
    """Why a record that was just measured could not be read again; None where nothing is wrong with it."""
    try:
        check_record(record, "record")
        check_evidence(record.checks, f"record, trial {shorten(record.trial, 60)}")
    except UsageError as error:
        return str(error).removesuffix(f" {_REMEDY}")
    return None


def check_evidence(checks: Iterable[Mapping[str, Any]], where: str) -> None:
    """Raises `UsageError` for the finding of a check that does not say what was looked at and what was found."""
    for check in checks:
        check_finding(check, where)


def check_finding(check: Mapping[str, Any], where: str) -> None:
    """The same of one check."""
    _require(check, ("path", "status", "required"), where)
    validate_table(check, CHECK, where)


def validate_table(table: Mapping[str, Any], form: Form, where: str) -> None:
    """Raises `UsageError` for a key of the form whose value is of another type."""
    for key, kind in form.items():
        if key not in table or (kind is str and type(table[key]) is str):  # nothing more is asked of a text
            continue
        if isinstance(kind, Mapping):
            below = codec.from_json(dict[str, Any], table[key], f"{where}, {key}")
            validate_table(below, kind, f"{where}, {key}")
        else:
            codec.from_json(kind, table[key], f"{where}, {key}")


def _require(table: Mapping[str, Any], keys: Iterable[str], where: str) -> None:
    for key in keys:
        if key not in table:
            raise UsageError(f"{shorten(where)}: {key} is missing. {_REMEDY}")


def _check_lines(where: str, names: Mapping[str, str]) -> None:
    """Raises `UsageError` for a name of several lines: what reads an output line by line, as the runners of CI do,
    would take the second for one of the program's own."""
    for key, name in names.items():
        if not name.isprintable() and len(f"{name}.".splitlines()) > 1:
            raise UsageError(f"{shorten(where)}: {shorten(key, 60)} = {shorten(repr(name), 80)}: one line is expected. "
                             f"{_REMEDY}")  # fmt: skip


def _check_finite(where: str, numbers: Mapping[str, float]) -> None:
    for key, value in numbers.items():
        if not -LARGEST <= value <= LARGEST:
            _refuse(where, key, value)


def _refuse(where: str, key: str, value: object) -> NoReturn:
    said = value if isinstance(value, float) else "what adds up to no number"
    raise UsageError(f"{shorten(where)}: {shorten(key, 60)} = {said}: a number is expected. {_REMEDY}")
