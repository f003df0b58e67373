"""Reads studies from TOML: unknown keys and impossible values are refused with file, key, value and remedy.

title = "..."
extends = "..."                 # a built-in study; values of this file replace those of that study and its profiles,
                                # and its time limit does not apply
reference = "lora-r16"          # the variant that is the denominator of ratios; default: the first
allow_fallback = false          # true: a required path that did not run gives a notice, and the trial is valid
notes = ["..."]                 # facts for readers of the results that no field contains

[workload]                      # fields of Workload
[protocol]                      # fields of Protocol
[controls]                      # fields of Variant, equal for all
[axes]                          # field = [values]: every combination is a variant
[sweeps]                        # field = [values]: one field varies at a time, the others are as in the controls
[[variant]]                     # or single variants: a name, and the fields that differ from the controls or a command
workload.batch_size = 8         # a field of the workload for this variant only; also allowed in [axes] and [sweeps]
[requirements]                  # kernels_check paths with required values, in addition to those that variants imply
[[claim]]                       # see lorameter.studies.claim
[engine]                        # the feature that the claims are about, see lorameter.studies.claim
[profile.NAME]                  # all of the above except variants, for one kind of machine
devices = ["A100"]              # parts of the names of devices that use this profile; "cpu" is any CPU
needs = "cuda"                  # it is refused on a machine without a GPU
workload.model = "random:"      # the model of the study with random weights
"""

from __future__ import annotations

import dataclasses
import difflib
import functools
import itertools
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

import msgspec

from lorameter.errors import UsageError, redact, refused_value, require
from lorameter.measurements.metrics import common_measures, phases_of
from lorameter.records import codec, fileio
from lorameter.records.codec import NotReadableError
from lorameter.records.store import Run
from lorameter.studies import protocol
from lorameter.studies.claim import Claim, Engine, check_limits
from lorameter.studies.form import AnyVariant, all_forms, all_keys, form_keys
from lorameter.studies.peft_experiments import read_config
from lorameter.studies.protocol import Protocol
from lorameter.studies.script import OWN
from lorameter.studies.study import WORKLOAD_PREFIX, Study, Target, unknown_word_message
from lorameter.studies.variant import PeftVariant, Variant
from lorameter.studies.workload import OF_VARIANTS, Workload

_CALLED = {"workload": "[workload]", "protocol": "[protocol]", "controls": "[controls] and [[variant]]"}


def list_keys() -> dict[str, tuple[str, ...]]:
    """Keys of each table; the controls have those of a variant of any form."""
    names = {name: tuple(field.name for field in dataclasses.fields(cls)) for name, cls in _CLASSES.items()}
    return {**names, "controls": all_keys()}


_CLASSES: Mapping[str, Any] = {"workload": Workload, "protocol": Protocol}
FILE_DEFAULTS: dict[str, Any] = {"dtype": "auto", "compute_dtype": "auto"}
"""Fields that a file leaves to the machine, and a variant in code to their own defaults."""
OTHER_NAMES: Mapping[str, str] = {
    "lr": "learning_rate",
    "lora_r": "r",
    "rank": "r",
    "lora_rank": "r",
    "load_in_4bit": "quantization",
    "load_in_8bit": "quantization",
    "bnb_4bit_quant_type": "quantization",
    "bnb_4bit_use_double_quant": "double_quant",
    "bnb_4bit_compute_dtype": "compute_dtype",
    "torch_dtype": "dtype",
    "bf16": "autocast",
    "fp16": "autocast",
    "attn_implementation": "attention",
    "optim": "optimizer",
    "lr_scheduler_type": "schedule",
    "torch_compile": "compile",
    "per_device_train_batch_size": "batch_size",
    "max_length": "sequence_length",
    "max_seq_length": "sequence_length",
    "packing": "layout",
    "model_name_or_path": "model",
    "dataset_name": "data",
    "max_new_tokens": "new_tokens",
    "num_train_epochs": "epochs",
    "max_steps": "turns",
    "steps": "turns",
    **dict.fromkeys(
        ("peft_type", "peft_method", "use_vera", "use_adalora", "use_loha", "use_lokr", "use_ia3", "use_oft"), "peft"
    ),
}
"""Keys of a study by other names in PEFT, transformers and TRL."""
_SECTIONS = ("workload", "protocol", "controls", "requirements")
_LISTS = ("axes", "sweeps", "variant")
_KEYS_ABOUT_VARIANTS = (*_LISTS, "claim", "engine", "reference")
"""Keys about variants, which are dropped when an extending study replaces the variants."""
_PLACE_KEYS = ("on", "sites", "mixed")
_OWN_RANDOM = "random:"
Table = dict[str, Any]


class Settings(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """The keys that a study file and its profiles have in common."""

    allow_fallback: bool = False
    notes: tuple[str, ...] = ()
    workload: Table = {}
    protocol: Table = {}
    controls: Table = {}
    requirements: Table = {}


class Profile(Settings, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """A table `[profile.NAME]`: the fields of the study that have other values on one kind of machine."""

    devices: tuple[str, ...] = ()
    needs: Literal["", "cuda"] = ""


class StudyFile(Settings, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """A study file, merged with the study that it extends."""

    title: str = ""
    reference: str = ""
    axes: Table = {}
    sweeps: Table = {}
    variant: tuple[Table, ...] = ()
    claim: tuple[Table, ...] = ()
    engine: Table | None = None
    profile: dict[str, Profile] = {}


def builtin_studies() -> dict[str, Path]:
    """Names and files of the studies in the package."""
    return {path.stem: path for path in sorted(Path(__file__).parent.glob("*.toml"))}


StudyFor = Callable[[Target | None], Study]
"""A study that has been read, for a machine, which selects the profile and the dtype; for None as it is written."""


def load_study(name_or_path: str, *, profile: str | None = None, target: Target | None = None) -> Study:
    """Load a study for one machine; the arguments and errors are those of `read_study_file` and of its result."""
    return read_study_file(name_or_path, profile=profile)(target)


def read_study_file(name_or_path: str, *, profile: str | None = None) -> StudyFor:
    """Read a built-in study by name, or any TOML file.

    Args:
        name_or_path: name or path of the study.
        profile: the profile to use; None for that of the machine, or for the study without a profile if none fits.

    Raises:
        UsageError: the study or profile does not exist, is not TOML, or has an invalid value; the message names file,
            key, value and remedy.
    """
    path, data = _read(name_or_path)
    where, file = path.name, codec.from_json(StudyFile, data, path.name, strict=True)
    written = _parse(path, data)
    for name, table in file.profile.items():
        for section in _CALLED:
            check_keys(f"{where}, [profile.{name}.{section}]", section, getattr(table, section))
        for key in _PLACE_KEYS:
            require(
                key not in table.protocol,
                f"{where}, [profile.{name}]: protocol.{key} = {table.protocol.get(key)!r}: a profile is chosen by the "
                "device, which depends on it. Write it in [protocol].",
            )
    return functools.partial(_fit, path, data, file, written, profile)


def _fit(path: Path, data: Table, file: StudyFile, written: Study, profile: str | None, target: Target | None) -> Study:
    """The study with the profile, and with the machine's dtype."""
    where = path.name
    if profile is None:
        fitting = (name for name, table in file.profile.items() if target and _matches(table.devices, target.kind))
        profile = next(fitting, None)
    if profile is None:
        return written if target is None else written.fit(target)
    known = unknown_word_message(profile, list(file.profile)) if file.profile else "this study has none."
    require(profile in file.profile, f"{where}: profile = {profile!r}: {known}")
    changes = {key: value for key, value in data["profile"][profile].items() if key not in ("devices", "needs")}
    fitted = _merge(data, {**changes, "notes": [*file.notes, *file.profile[profile].notes]})
    workload = fitted.get("workload", {})
    if workload.get("model") == _OWN_RANDOM:
        own = written.workload.model.removeprefix(_OWN_RANDOM)
        fitted["workload"] = {**workload, "model": f"{_OWN_RANDOM}{own}"}
    study = _parse(path, fitted)
    study = dataclasses.replace(
        study, profile=profile, needs=file.profile[profile].needs, replaced=_find_replaced(written, study)
    )
    return study if target is None else study.fit(target)


def load_variant(spec: str, *, profile: str | None = None, target: Target | None = None) -> tuple[Study, Variant]:
    """Load one variant, and the study with its workload: "STUDY:NAME", or a study with a single variant.

    STUDY is a built-in name or a TOML file; `profile` and `target` are as in `load_study`.

    Raises:
        UsageError: the study or variant does not exist, the study has several variants and none is named, or its
            variants are commands.
    """
    named = ":" in spec and not fileio.is_file(spec)  # a file name may contain a colon
    study_name, _, name = spec.rpartition(":") if named else (spec, "", "")
    study = load_study(study_name, profile=profile, target=target)
    variant = study.variant(name) if named else study.variants[0]
    if not isinstance(variant, Variant):
        raise UsageError(
            f"variant {spec!r}: it is {variant.form}: nothing can be estimated or profiled without starting it. "
            "Measure it with `lorameter run` or `lorameter ab`."
        )
    if not named and len(study.variants) > 1:
        names = ", ".join(variant.name for variant in study.variants)
        raise UsageError(f"variant {spec!r}: the study has several: {names}. Name one, as in {spec}:{study.reference}.")
    own = study.own_workloads.get(variant.name)
    return (study if own is None else dataclasses.replace(study, workload=own)), variant


def _read(name_or_path: str) -> tuple[Path, Table]:
    """The file and its content, merged with the study that it extends."""
    known = builtin_studies()
    path = known.get(name_or_path, Path(name_or_path))
    if not fileio.is_file(path):
        listed = "file not found. Check the path; `lorameter list studies` prints those built in."
        if path.suffix != ".toml" and path.name == name_or_path:
            listed = f"{unknown_word_message(name_or_path, list(known))} A path to a .toml file works too."
        raise UsageError(f"study {name_or_path!r}: {listed}")
    try:
        data = fileio.read_toml(path)
    except NotReadableError as error:
        raise UsageError(f"{path.name}: {error}") from None
    base = data.pop("extends", None)
    for key, value in data.items():
        if key not in StudyFile.__struct_fields__:
            raise unknown_key(path.name, key, value, ("extends", *StudyFile.__struct_fields__))
    if base is None:
        return path, data
    if not isinstance(base, str) or base not in known:
        why = unknown_word_message(str(base), list(known))
        raise refused_value(path.name, "extends", base, why, "Name a built-in study.")
    merged = _read(base)[1]
    for table in (merged, *merged.get("profile", {}).values()):  # a time limit is for the study as it is
        table.get("protocol", {}).pop("max_minutes", None)
    if any(key in data for key in _LISTS):
        merged = {key: value for key, value in merged.items() if key not in _KEYS_ABOUT_VARIANTS}
    merged["profile"] = {name: _drop_overridden(table, data) for name, table in merged.get("profile", {}).items()}
    return path, _merge(merged, data)


def _drop_overridden(profile: Table, study: Table) -> Table:
    """A profile of an extended study, without the fields that the extending study sets: the profile must not silently
    replace them."""
    result = {key: value for key, value in profile.items() if key != "allow_fallback" or key not in study}
    for section in _SECTIONS:
        fields, overriding = result.get(section, {}), study.get(section)
        if isinstance(overriding, Mapping):
            result[section] = {
                key: value for key, value in fields.items() if key not in overriding or value == _OWN_RANDOM
            }
    return result


def _merge(base: Mapping[str, Any], over: Mapping[str, Any]) -> Table:
    """`base` with the values of `over` in place of its own, table by table."""
    result = dict(base)
    for key, value in over.items():
        both = isinstance(value, Mapping) and isinstance(result.get(key), Mapping)
        result[key] = _merge(result[key], value) if both else value
    return result


def _matches(devices: Sequence[str], device: str) -> bool:
    return device in devices if device == "cpu" else any(word in device for word in devices if word != "cpu")


def _find_replaced(written: Study, fitted: Study) -> Table:
    """Fields that the profile changes, with their original values."""
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


def _parse(path: Path, data: Table) -> Study:
    where = path.name
    file = codec.from_json(StudyFile, data, where, strict=True)
    rows = expand_rows(where, file)
    variants = tuple(_variant(where, index, file.controls, row) for index, row in enumerate(rows))
    # Defaults: some forms define their own model and data, and not all can be measured in every phase.
    own_workload = {} if all("workload" in one.supports for one in variants) else {"model": OWN, "data": OWN}
    measures = common_measures([one.measures for one in variants], ranks=file.workload.get("ranks", 1))
    own_protocol = {"phases": list(phases_of(measures))}
    for section in ("workload", "protocol"):
        check_keys(f"{where}, [{section}]", section, getattr(file, section))
    title = " ".join((file.title or path.stem).split())  # one line, because it is the header of every report
    claims = [_claim(f"{where}, claim number {index + 1}", claim) for index, claim in enumerate(file.claim)]
    engine = None if file.engine is None else codec.from_json(Engine, file.engine, f"{where}, [engine]", strict=True)
    try:
        workload = codec.from_json(Workload, own_workload | file.workload, f"{where}, [workload]", strict=True)
        protocol = codec.from_json(Protocol, own_protocol | file.protocol, f"{where}, [protocol]", strict=True)
        study = Study(
            name=path.stem,
            title=redact(title),
            workload=workload,
            workloads=_own_workloads(rows, workload),
            protocol=protocol,
            variants=variants,
            reference=file.reference or (variants[0].name if variants else ""),
            allow_fallback=file.allow_fallback,
            requirements=file.requirements,
            claims=tuple(claims),
            notes=tuple(map(redact, file.notes)),
            engine=engine,
        )
        study.check_distinct()
    except UsageError as error:
        raise error if str(error).startswith(where) else UsageError(f"{where}: {error}") from None
    return study


def _claim(where: str, written: Table) -> Claim:
    parts = written.get("parts")
    for part in parts if isinstance(parts, list) else ():  # else `from_json` names the type
        if isinstance(part, Mapping):
            check_limits(part, where)
    claim = codec.from_json(Claim, written, where, strict=True)
    return dataclasses.replace(claim, says=redact(claim.says), original=redact(claim.original))


# --- variants ---------------------------------------------------------------------------------------------------------


def expand_rows(where: str, file: StudyFile) -> list[Table]:
    """The differences of each variant from the controls, and its name: as listed, combined by [axes], or one field at a
    time by [sweeps]. A field of the workload is written `workload.FIELD`."""
    axes, sweeps = _flatten(file.axes), _flatten(file.sweeps)
    tables = {"[axes]": axes, "[sweeps]": sweeps, "[[variant]]": file.variant}
    forms = [name for name, value in tables.items() if value]
    require(len(forms) < 2, f"{where}: both {' and '.join(forms)} are given. Keep one.")
    check_keys(f"{where}, [controls]", "controls", file.controls)
    for name, content in (("[axes]", axes), ("[sweeps]", sweeps)):
        check_axes(f"{where}, {name}", content)
        for key, values in content.items():
            if not isinstance(values, list) or not values:
                raise refused_value(
                    f"{where}, {name}", key, values, "a list of values is expected", "Write it as [ ... ]."
                )
    if sweeps:
        common = codec.to_json(Workload()) | file.workload
        controls = {**file.controls, **{f"{WORKLOAD_PREFIX}{key}": value for key, value in common.items()}}
        return list(_sweep(f"{where}, [sweeps]", controls, sweeps, file.reference or "centre"))
    if not axes:
        return [_flatten(row) for row in file.variant]
    count = math.prod(map(len, axes.values()))
    require(
        count <= protocol.MAX_VARIANTS,
        f"{where}, [axes]: {count} combinations. Use {protocol.MAX_VARIANTS} variants or fewer.",
    )
    rows = [dict(zip(axes, values, strict=True)) for values in itertools.product(*axes.values())]
    return [{"name": "-".join(_label(axis, value) for axis, value in row.items()), **row} for row in rows]


def _flatten(table: Table) -> Table:
    """A table in which `workload.batch_size` is a key, like the name of an axis."""
    own = table.get("workload")
    if not isinstance(own, Mapping):
        return table
    others = {key: value for key, value in table.items() if key != "workload"}
    return others | {f"{WORKLOAD_PREFIX}{key}": value for key, value in own.items()}


def _sweep(where: str, controls: Table, sweeps: Table, centre: str) -> Iterator[Table]:
    """The controls under the name `centre`, and each value of each field in turn; values of the controls give no new
    row."""
    yield {"name": centre}
    for key, values in sweeps.items():
        require(
            controls.get(key) in values,
            f"{where}: {key} = {values!r}: the controls' {key} = {controls.get(key)!r} is not among them. Every sweep "
            "goes through the controls: add the value to one of the two.",
        )
        yield from ({"name": _label(key, value), key: value} for value in values if value != controls[key])


def _label(axis: str, value: Any) -> str:
    """A value on an axis as part of a name; the items of a list are joined."""
    text = "+".join(map(str, value)) or "default" if isinstance(value, list) else str(value)
    return f"{axis}={text}"


def _own_workloads(rows: Sequence[Table], workload: Workload) -> dict[str, Table]:
    """The workload fields in which a variant differs from the study, by the variant's name."""
    common, found = codec.to_json(workload), dict[str, Table]()
    for row in rows:
        own = {
            key.removeprefix(WORKLOAD_PREFIX): value
            for key, value in row.items()
            if key.startswith(WORKLOAD_PREFIX) and common.get(key.removeprefix(WORKLOAD_PREFIX)) != value
        }
        if own:
            found[row["name"]] = own
    return found


def _variant(where: str, index: int, controls: Table, row: Table) -> AnyVariant:
    """The variant of a row over the controls; its keys determine its form."""
    where = f"{where}, variant {row.get('name', f'number {index + 1}')!r}"
    require(isinstance(row.get("name"), str) and row["name"], f'{where}: name is missing. Add name = "...".')
    check_axes(where, row)
    own = {key: value for key, value in row.items() if not key.startswith(WORKLOAD_PREFIX)}
    content = {**controls, **own}
    form = AnyVariant.class_for(content)
    known = form_keys(form)
    for key in [key for key in content if key not in known]:
        # Controls are for all variants, so a form ignores those of another one; but one without a workload uses none.
        others = {one for other in all_forms() if "workload" not in other.supports for one in form_keys(other)}
        if key in own or "workload" not in form.supports or key in others:
            raise refused_value(where, key, content[key], f"the variant is {form.form}", "Remove it.")
    if form is PeftVariant and isinstance(path := content["peft"], str):
        content["peft"] = read_config(where, Path(path))
    content = {key: value for key, value in FILE_DEFAULTS.items() if key in known} | content
    return codec.from_json(form, {key: content[key] for key in known if key in content}, where, strict=True)


# --- keys -------------------------------------------------------------------------------------------------------------


def check_keys(where: str, table: str, content: Mapping[str, Any]) -> None:
    """Raise `UsageError` for a key that a table of a study file does not have; `where` names both."""
    for key, value in content.items():
        if key not in (known := list_keys()[table]):
            raise unknown_key(where, key, value, known)


def check_axes(where: str, content: Mapping[str, Any]) -> None:
    """Raise `UsageError` for a key of [axes], [sweeps] or a variant that neither variants nor workloads have."""
    for key, value in content.items():
        name = key.removeprefix(WORKLOAD_PREFIX)
        if name == key:
            check_keys(where, "controls", {key: value})
        elif name not in list_keys()["workload"]:
            raise unknown_key(where, name, value, OF_VARIANTS, shown=key)
        elif name not in OF_VARIANTS:
            raise refused_value(where, key, value, "equal for all variants", "Write one value in [workload].")


def unknown_key(where: str, key: str, value: Any, known: Sequence[str], *, shown: str = "") -> UsageError:
    """The error for an unknown key; `shown` is the key as it was written.

    Other tools use other names for the same settings, and put all of them into one table. So a key is looked up under
    other names and in other tables before the nearest spelling is suggested.
    """
    shown, meant = shown or key, OTHER_NAMES.get(key, key)
    if meant not in known and (home := next((table for table, keys in list_keys().items() if meant in keys), None)):
        return refused_value(where, shown, value, "unknown key here", f"{meant} is a key of {_CALLED[home]}.")
    near = [meant] if meant in known else difflib.get_close_matches(key, known, n=1)
    remedy = f"Did you mean {near[0]}?" if near else "`lorameter list keys` prints all keys."
    return refused_value(where, shown, value, "unknown key", remedy)


def read_study(run: Run) -> Study:
    """The study that a run measured. Raises `UsageError` if the manifest contains no valid study."""
    return codec.from_json(Study, run.manifest.study, f"run {run.manifest.run}")


def read_own_workloads(run: Run) -> dict[str, Workload]:
    """The workloads of variants that do not use the study's, by name. Raises `UsageError` as `read_study` does."""
    return codec.from_json(dict[str, Workload], run.manifest.own_workloads, f"run {run.manifest.run}")
