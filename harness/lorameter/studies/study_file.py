"""Studies read from TOML, strictly: unknown keys and impossible values are refused with file, key, value and remedy.

title = "..."
extends = "..."                 # a built-in study; what this file says replaces what that one and its profiles say
reference = "lora-r16"          # the variant that ratios are taken against; the first one if left out
allow_fallback = false          # true: a required path that did not run is a notice, and the trial counts
notes = ["..."]                 # what a reader of the results must know and no field says

[workload]                      # fields of Workload
request_batch = [1, 8]          # several values, also of prompt_tokens and adapters: every variant is measured at each
[protocol]                      # fields of Protocol
[controls]                      # fields of Variant, equal for all
[axes]                          # field = [values]: every combination is a variant
[sweeps]                        # field = [values]: one field at a time, all else as in the controls
[[variant]]                     # or variants one by one: name and what differs from the controls; or name and command
workload.batch_size = 8         # a field of the workload, also of [axes] and [sweeps]: what this variant is measured on
[requirements]                  # paths of kernels_check that the study demands in addition to what the variants imply
[[claim]]                       # see lorameter.studies.claim
[engine]                        # whose promises the claims are, see lorameter.studies.engine
[profile.NAME]                  # any of the above but the variants, for one kind of machine
devices = ["A100"]              # a device whose name holds one of these takes this profile; "cpu" is any CPU
workload.model = "random:"      # the study's own model, whichever that is, with random weights
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from importlib import resources
from pathlib import Path
from typing import Any

from lorameter.errors import UsageError, impossible, redact
from lorameter.records import codec, fileio
from lorameter.studies.claim import Claim, check_limits
from lorameter.studies.engine import Engine
from lorameter.studies.expand_variants import rows_of, split_lists, spread, variants_of, workloads_of
from lorameter.studies.keys import KEYS, check_keys, unknown_key
from lorameter.studies.protocol import Protocol
from lorameter.studies.script import OWN
from lorameter.studies.study import Study, unknown
from lorameter.studies.variant import AnyVariant, LoraVariant, ScriptVariant, Variant
from lorameter.studies.workload import Workload

_LISTS = ("axes", "sweeps", "variant")
_SECTIONS = ("workload", "protocol", "controls", "requirements")
_KEYS = ("title", "extends", "reference", "allow_fallback", "notes", *_SECTIONS, *_LISTS, "claim", "engine", "profile")
_OF_VARIANTS = (*_LISTS, "claim", "engine", "reference")
"""What speaks of variants, and does not outlive those that a study puts in their place."""
_PROFILE_KEYS = ("devices", "allow_fallback", "notes", *_SECTIONS)
_OF_PLACE = ("on", "sites", "mixed")
_OWN_RANDOM = "random:"


def builtin_studies() -> dict[str, Path]:
    """Names and files of the studies that ship with the package."""
    folder = Path(str(resources.files("lorameter") / "studies"))
    return {path.stem: path for path in sorted(folder.glob("*.toml"))}


def load_study(name_or_path: str, *, profile: str | None = None, device: str = "") -> Study:
    """A built-in study by name, or any TOML file.

    Args:
        name_or_path: of the study.
        profile: the profile to take; None for that of the device, or for the study as written where none fits.
        device: "cpu", or the name of the GPU, to choose the profile by; "" for the study as written.

    Raises:
        UsageError: no such study or profile, not TOML, or anything in it that cannot be: file, key, value and remedy
            are named.
    """
    path, data = _read(name_or_path, ())
    written = _parse(path, data)
    chosen = _choose_profile(path.name, data.get("profile", {}), profile, device)
    if chosen is None:
        return written
    fitted = _parse(path, _fitted(data, data["profile"][chosen]))
    return dataclasses.replace(fitted, profile=chosen, replaced=_replaced(written, fitted))


def load_variant(spec: str, *, profile: str | None = None, device: str = "") -> tuple[Study, Variant]:
    """One variant, and the study that says on which workload: "STUDY:NAME", or a study of one variant alone.

    STUDY is a built-in name or a TOML file; `profile` and `device` choose its profile, as in `load_study`.

    Raises:
        UsageError: no such study or variant, a study of several and none named, or one of commands.
    """
    named = ":" in spec and not fileio.is_file(spec)  # a file may have a colon in its name
    study_name, _, name = spec.rpartition(":") if named else (spec, "", "")
    study = load_study(study_name, profile=profile, device=device)
    variant = study.variant(name) if named else study.variants[0]
    if not isinstance(variant, Variant):
        raise UsageError(
            f"variant {spec!r}: it is a command whose script chooses the model: nothing can be estimated or profiled "
            f"without starting it. Measure it with `lorameter run` or `lorameter ab`."
        )
    if not named and len(study.variants) > 1:
        names = ", ".join(variant.name for variant in study.variants)
        raise UsageError(f"variant {spec!r}: the study has several: {names}. Name one, as in {spec}:{study.reference}.")
    own = study.own_workloads.get(variant.name)
    return (study if own is None else dataclasses.replace(study, workload=own)), variant


def _read(name_or_path: str, seen: tuple[str, ...]) -> tuple[Path, dict[str, Any]]:
    """The file and its content, with what it extends filled in."""
    known = builtin_studies()
    path = known.get(name_or_path, Path(name_or_path))
    if not fileio.is_file(path) and (path.suffix == ".toml" or path.name != name_or_path):
        raise UsageError(
            f"study {name_or_path!r}: file not found. Check the path; `lorameter list studies` prints those built in."
        )
    if not fileio.is_file(path):
        raise UsageError(
            f"study {name_or_path!r}: {unknown(name_or_path, list(known))} A path to a .toml file works too."
        )
    try:
        data = fileio.read_toml(path)
    except fileio.NotReadableError as error:
        raise UsageError(f"{path.name}: {error}") from None
    for key in data:
        if key not in _KEYS:
            raise unknown_key(path.name, key, data[key], _KEYS)
    base = data.pop("extends", None)
    if base is None:
        return path, data
    if not isinstance(base, str) or base not in known or base in seen:
        why = "it extends itself" if base in seen else unknown(str(base), list(known))
        raise impossible(path.name, "extends", base, why, "Name a built-in study.")
    merged = _read(base, (*seen, base))[1]
    if any(key in data for key in _LISTS):
        merged = {key: value for key, value in merged.items() if key not in _OF_VARIANTS}
    return path, _merged(_yielding(merged, data), data)


def _yielding(base: Mapping[str, Any], over: Mapping[str, Any]) -> dict[str, Any]:
    """`base` without what its profiles say of anything that `over` says itself.

    A study that extends another with one line is about that line. A profile that were to put its own value in its
    place, on some machines and without a word, would measure another study.
    """
    profiles = {name: _without(table, over) for name, table in base.get("profile", {}).items()}
    return {**base, "profile": profiles}


def _without(table: Mapping[str, Any], over: Mapping[str, Any]) -> dict[str, Any]:
    kept = {key: value for key, value in table.items() if key != "allow_fallback" or key not in over}
    for section in _SECTIONS:
        said = over.get(section)
        if isinstance(kept.get(section), Mapping) and isinstance(said, Mapping):
            kept[section] = {
                key: value for key, value in kept[section].items() if key not in said or value == _OWN_RANDOM
            }
    return kept


def _merged(base: Mapping[str, Any], over: Mapping[str, Any]) -> dict[str, Any]:
    """`base` with what `over` says in its place, table by table."""
    result = dict(base)
    for key, value in over.items():
        both = isinstance(value, Mapping) and isinstance(result.get(key), Mapping)
        result[key] = _merged(result[key], value) if both else value
    return result


def _choose_profile(where: str, profiles: Any, asked: str | None, device: str) -> str | None:
    if not isinstance(profiles, Mapping) or not all(isinstance(one, Mapping) for one in profiles.values()):
        raise impossible(where, "profile", profiles, "tables are expected", "Write [profile.NAME].")
    for name, table in profiles.items():
        for key in table:
            if key not in _PROFILE_KEYS:
                raise unknown_key(f"{where}, [profile.{name}]", key, table[key], _PROFILE_KEYS)
        for key in ("devices", "notes"):
            codec.from_json(tuple[str, ...], table.get(key, []), f"{where}, [profile.{name}], {key}", strict=True)
        for section in _SECTIONS:
            if not isinstance(table.get(section, {}), Mapping):
                remedy = f"Write {section}.KEY = VALUE."
                raise impossible(f"{where}, [profile.{name}]", section, table[section], "a table is expected", remedy)
        for section in KEYS:
            check_keys(f"{where}, [profile.{name}.{section}]", section, table.get(section, {}))
        for key in _OF_PLACE:
            if key in table.get("protocol", {}):
                why = "a profile is chosen by the device, and which device there is hangs on it"
                raise impossible(
                    f"{where}, [profile.{name}]", f"protocol.{key}", table["protocol"][key], why,
                    "Write it in [protocol].",
                )  # fmt: skip
    if asked is not None:
        if asked not in profiles:
            known = unknown(asked, list(profiles)) if profiles else "this study has none."
            raise UsageError(f"{where}: profile = {asked!r}: {known}")
        return asked
    fitting = (name for name, table in profiles.items() if device and _fits(table.get("devices", []), device))
    return next(fitting, None)


def _fits(devices: list[str], device: str) -> bool:
    return device in devices if device == "cpu" else any(word in device for word in devices if word != "cpu")


def _fitted(data: Mapping[str, Any], profile: Mapping[str, Any]) -> dict[str, Any]:
    changes = {key: value for key, value in profile.items() if key != "devices"}
    changes["notes"] = [*data.get("notes", []), *profile.get("notes", [])]
    fitted = _merged(data, changes)
    workload = fitted.get("workload")
    if isinstance(workload, Mapping) and workload.get("model") == _OWN_RANDOM:
        own = str(data.get("workload", {}).get("model", Workload().model))
        fitted["workload"] = {**workload, "model": f"{_OWN_RANDOM}{own.removeprefix(_OWN_RANDOM)}"}
    return fitted


def _replaced(written: Study, fitted: Study) -> dict[str, Any]:
    """Fields that the profile changes, with their values as written."""
    pairs = (
        ("workload", written.workload, fitted.workload),
        ("controls", written.variant(written.reference), fitted.variant(fitted.reference)),
    )
    found = {
        f"{section}.{field.name}": codec.to_json(getattr(ours, field.name))
        for section, ours, theirs in pairs
        for field in dataclasses.fields(ours)  # type: ignore[arg-type]
        if getattr(ours, field.name) != getattr(theirs, field.name)
    }
    if written.protocol.epochs != fitted.protocol.epochs:
        found["protocol.epochs"] = written.protocol.epochs
    return found


def _parse(path: Path, data: Mapping[str, Any]) -> Study:
    where = path.name
    data, lists = split_lists(where, data)
    rows = spread(where, rows_of(where, data), lists)
    variants = variants_of(where, data, rows)
    data = _of_scripts(data) if variants and isinstance(variants[0], ScriptVariant) else _trained_only(data, variants)
    reference = data.get("reference", variants[0].name if variants else "")
    fields: dict[str, Any] = {"title": path.stem, "reference": reference}
    for key, kind in (("title", str), ("reference", str), ("allow_fallback", bool), ("requirements", dict)):
        if key in data:
            if not isinstance(data[key], kind):
                raise impossible(where, key, data[key], f"{kind.__name__} is expected", "Correct the value.")
            fields[key] = data[key]
    fields["title"] = redact(" ".join(fields["title"].split()))  # one line, as it heads every report
    for section in ("workload", "protocol"):
        check_keys(f"{where}, [{section}]", section, data.get(section, {}))
    try:
        workload = codec.from_json(Workload, data.get("workload", {}), f"{where}, [workload]", strict=True)
        study = Study(
            name=path.stem,
            workload=workload,
            workloads=workloads_of(rows, workload),
            protocol=codec.from_json(Protocol, data.get("protocol", {}), f"{where}, [protocol]", strict=True),
            variants=variants,
            claims=tuple(_claims(where, data.get("claim", []))),
            notes=tuple(
                map(redact, codec.from_json(tuple[str, ...], data.get("notes", []), f"{where}, notes", strict=True))
            ),
            engine=codec.from_json(Engine, data["engine"], f"{where}, [engine]", strict=True)
            if "engine" in data
            else None,
            **fields,
        )
        study.check_distinct()
    except UsageError as error:
        raise error if str(error).startswith(where) else UsageError(f"{where}: {error}") from None
    return study


def _of_scripts(data: Mapping[str, Any]) -> dict[str, Any]:
    """What a study of commands need not say: that model and data are the scripts', and that training is measured."""
    said = {"workload": {"model": OWN, "data": OWN}, "protocol": {"phases": ["train"]}}
    return _merged(said, data)


def _trained_only(data: Mapping[str, Any], variants: Sequence[AnyVariant]) -> dict[str, Any]:
    """What a study of several ranks, or of other methods than LoRA in its short form, need not say: that training is
    measured."""
    workload = data.get("workload")
    several = isinstance(workload, Mapping) and workload.get("ranks", 1) != 1
    several = several or not all(isinstance(variant, LoraVariant) for variant in variants)
    return _merged({"protocol": {"phases": ["train"]}}, data) if several else dict(data)


def _claims(where: str, listed: Any) -> list[Claim]:
    if not isinstance(listed, list):
        raise impossible(where, "claim", listed, "a list of tables is expected", "Write [[claim]].")
    return [_claim(f"{where}, claim number {index + 1}", one) for index, one in enumerate(listed)]


def _claim(where: str, written: Any) -> Claim:
    parts = written.get("parts") if isinstance(written, Mapping) else None
    for part in parts if isinstance(parts, list) else ():
        if isinstance(part, Mapping):
            check_limits(part, where)
    claim = codec.from_json(Claim, written, where, strict=True)
    return dataclasses.replace(claim, says=redact(claim.says), original=redact(claim.original))
