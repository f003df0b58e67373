"""What there is to choose from, `list` and `model fetch`: studies, variants and their sizes, models, runs."""

from __future__ import annotations

import argparse
import dataclasses
import sys
from collections.abc import Collection
from pathlib import Path
from typing import Any

from kernels_check.terminal import escape_control_chars, print_stderr
from lorameter.commands.json_schema import json_schema
from lorameter.commands.output import print_json
from lorameter.commands.reference import write_documents, write_reference
from lorameter.errors import EXIT_PASS, LorameterError, UsageError
from lorameter.models import catalogue, fetch, shapes
from lorameter.records import codec, store
from lorameter.report.estimate import describe_sizes
from lorameter.report.runs import describe_runs
from lorameter.report.terminal import console_for, show
from lorameter.results.folder import Summary, read_each, summary_of
from lorameter.results.prune import size_of
from lorameter.studies.study_file import builtin_studies, load_study
from lorameter.studies.variant import LoraVariant
from lorameter.studies.workload import identify
from lorameter.verdicts.baselines import read_baselines


def run_list(options: argparse.Namespace) -> int:
    """Print what there is of a kind."""
    if options.what == "sizes":
        return _list_sizes(options)
    if options.what in ("keys", "documents"):
        return _list_reference(options)
    rows = _listed(options)
    if options.json:
        print_json({options.what: rows})
        return EXIT_PASS
    if not rows:
        print(f"no {options.what}", file=sys.stderr)
    elif options.what == "runs":
        show(describe_runs(rows), console_for())
    else:
        for row in rows:
            print(escape_control_chars("  ".join(str(value) for value in row.values())))
    return EXIT_PASS


def _list_reference(options: argparse.Namespace) -> int:
    """Every key of studies and policies, or of the documents of `--json`, as Markdown; of documents as JSON Schema."""
    if options.json and options.what == "keys":
        raise _usage("list keys: a page of Markdown, which has no --json. Leave it out.")
    if options.json:
        print_json({"json_schema": json_schema()})
    else:
        sys.stdout.write(write_reference() if options.what == "keys" else write_documents())
    return EXIT_PASS


def _listed(options: argparse.Namespace) -> list[dict[str, Any]]:
    if options.what == "studies":
        return [{"name": name, "title": load_study(name).title} for name in builtin_studies()]
    if options.what == "models":
        return [{"name": entry.name, "description": entry.description} for entry in catalogue.CATALOGUE.values()]
    if options.what == "runs":
        return _run_rows(store.runs_dir(options.runs_dir))
    study = load_study(_study_named(options))
    rows, defaults = [], LoraVariant().settings | {"cwd": "", "env": {}, "python": ""}
    for variant in study.variants:
        changed = {key: codec.to_json(value) for key, value in variant.settings.items() if value != defaults.get(key)}
        own = {f"workload.{key}": value for key, value in study.workloads.get(variant.name, {}).items()}
        words = " ".join(f"{key}={value}" for key, value in (changed | own).items())
        identity = identify(variant.id, study.own_workloads.get(variant.name))
        rows.append({"name": variant.name, "id": identity, "differs from the defaults in": words})
    return rows


def _list_sizes(options: argparse.Namespace) -> int:
    study = load_study(_study_named(options)).with_overrides(model=options.model)
    if study.of_scripts:
        raise _usage(f"list sizes: the variants of {study.name} are commands, whose models are their scripts'.")
    from lorameter.trial.building.sizes import sizes_of_study  # loads torch, so only for a study that can be read

    model, sizes = study.workload.model, sizes_of_study(study)
    source = catalogue.resolve(f"{catalogue.RANDOM_PREFIX}{model.removeprefix(catalogue.RANDOM_PREFIX)}")
    unknown = shapes.unknown_layers(shapes.shape(source))
    if options.json:
        rows = [dataclasses.asdict(one) | {"share": one.share} for one in sizes]
        print_json({"model": model, "sizes": rows, **({"unknown": unknown} if unknown else {})})
    else:
        show(describe_sizes(model, sizes, unknown=unknown), console_for())
    return EXIT_PASS


def _study_named(options: argparse.Namespace) -> str:
    what = options.what
    if not options.study:
        raise _usage(f"list {what}: no study named. Give one, as in `lorameter list {what} lora-or-qlora`.")
    return str(options.study)


def _run_rows(folder: Path) -> list[dict[str, Any]]:
    """A table a run; one that is damaged must not hide the others."""
    accepted: set[str] = set()
    try:
        accepted = {baseline.run for baseline in read_baselines(folder).baselines}
    except LorameterError as error:  # which of them are baselines is then unknown; what there is, is not
        print_stderr(f"lorameter: {error}")
    found = sorted(read_each(folder, summary_of), key=lambda one: one.path.name)
    return [_run_row(one.path, one.content, one.error, accepted) for one in found]


def _run_row(path: Path, run: Summary | None, error: str | None, accepted: Collection[str]) -> dict[str, Any]:
    if run is None:
        return {"run": path.name, "status": "damaged", "size_bytes": size_of(path), "title": error}
    left = run.planned - sum(run.trials.values())
    return {
        "run": run.run,
        "status": run.state,
        "study": run.study,
        "verdict": run.verdict,
        "baseline": run.run in accepted or path.name in accepted,
        "size_bytes": size_of(path),
        "created_unix_s": run.created_unix_s,
        "trials": {**run.trials, **({"no record": left} if left > 0 else {})},
        "title": run.title,
    }


def run_fetch(options: argparse.Namespace) -> int:
    """Get a catalogue model and say where it lies."""
    path = fetch.fetch(options.name, report=print_stderr)
    if options.json:
        print_json({"model": options.name, "path": str(path)})
    else:
        print(escape_control_chars(str(path)))
    return EXIT_PASS


def _usage(message: str) -> LorameterError:
    return UsageError(message)
