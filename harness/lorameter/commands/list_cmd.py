"""The commands `list` (studies, variants and their sizes, models, runs) and `model fetch`."""

from __future__ import annotations

import argparse
import dataclasses
import sys
from typing import Any

from kernels_check.terminal import print_stderr
from lorameter.commands.output import print_result, show_result
from lorameter.commands.reference import write_reference
from lorameter.errors import EXIT_PASS, UsageError
from lorameter.models import catalogue, fetch, shapes
from lorameter.records import codec, store
from lorameter.report.estimate import describe_sizes
from lorameter.report.runs import describe_runs
from lorameter.results.folder import list_runs
from lorameter.studies.study import Study
from lorameter.studies.study_file import builtin_studies, load_study
from lorameter.studies.variant import LoraVariant
from lorameter.studies.workload import identify


def run_list(options: argparse.Namespace) -> int:
    """Print the list of a kind."""
    what = options.what
    if what == "keys":
        if options.json:
            raise UsageError("list keys: a page of Markdown, which has no --json. Leave it out.")
        sys.stdout.write(write_reference())
        return EXIT_PASS
    if what == "sizes":
        return _list_sizes(options)
    rows = _rows_of(options)
    if not rows and not options.json:
        print(f"no {what}", file=sys.stderr)
    elif what == "runs":
        show_result(options, describe_runs(rows), lambda: {"runs": rows})
    else:
        print_result(options, "\n".join("  ".join(map(str, row.values())) for row in rows), {what: rows})
    return EXIT_PASS


def _rows_of(options: argparse.Namespace) -> list[dict[str, Any]]:
    if options.what == "studies":
        return [{"name": name, "title": load_study(name).title} for name in builtin_studies()]
    if options.what == "models":
        return [{"name": entry.name, "description": entry.description} for entry in catalogue.CATALOGUE.values()]
    if options.what == "runs":
        return list_runs(store.runs_dir(options.runs_dir))
    study, rows = _load_named(options), []
    defaults = LoraVariant().settings | {"cwd": "", "env": {}, "python": ""}
    for variant in study.variants:
        changed = {key: codec.to_json(value) for key, value in variant.settings.items() if value != defaults.get(key)}
        own = {f"workload.{key}": value for key, value in study.workloads.get(variant.name, {}).items()}
        words = " ".join(f"{key}={value}" for key, value in (changed | own).items())
        identity = identify(variant.id, study.own_workloads.get(variant.name))
        rows.append({"name": variant.name, "id": identity, "differs from the defaults in": words})
    return rows


def _list_sizes(options: argparse.Namespace) -> int:
    study = _load_named(options).with_overrides(model=options.model)
    if study.of_scripts:
        raise UsageError(f"list sizes: the variants of {study.name} are commands, whose models are their scripts'.")
    from lorameter.trial.building.sizes import sizes_of_study  # loads torch, so only for a readable study

    model, sizes = study.workload.model, sizes_of_study(study)
    source = catalogue.resolve(f"{catalogue.RANDOM_PREFIX}{model.removeprefix(catalogue.RANDOM_PREFIX)}")
    unknown = shapes.unknown_layers(shapes.shape(source))
    rows = [dataclasses.asdict(one) | {"share": one.share} for one in sizes]
    data = {"model": model, "sizes": rows, **({"unknown": unknown} if unknown else {})}
    show_result(options, describe_sizes(model, sizes, unknown=unknown), lambda: data)
    return EXIT_PASS


def _load_named(options: argparse.Namespace) -> Study:
    what = options.what
    if not options.study:
        raise UsageError(f"list {what}: no study named. Give one, as in `lorameter list {what} lora-or-qlora`.")
    return load_study(options.study)


def run_fetch(options: argparse.Namespace) -> int:
    """Download a catalogue model and print its path."""
    path = fetch.fetch(options.name, report=print_stderr)
    print_result(options, str(path), {"model": options.name, "path": str(path)})
    return EXIT_PASS
