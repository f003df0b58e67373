"""Commands about what exists: `list`, `model fetch`, and for runs `export`, `history`, `prune` and `pack`."""

from __future__ import annotations

import argparse
import dataclasses
import sys
from pathlib import Path
from typing import Any

from lorameter.commands.output import print_result, show_result
from lorameter.commands.reference import write_reference
from lorameter.errors import EXIT_PASS, require
from lorameter.machine.products import make_target
from lorameter.models import catalogue, shapes
from lorameter.records import codec, store
from lorameter.records.units import format_bytes, format_count
from lorameter.report.estimate import describe_sizes
from lorameter.report.history import describe_history, describe_runs, draw_history_figures, list_curve_names
from lorameter.results.export import DASHBOARDS, TABULAR, export_text, write_tables, write_text
from lorameter.results.history import DEFAULT_METRIC, list_runs, read_history
from lorameter.results.prune import pack, parse_age, prune
from lorameter.run.workers import open_executor
from lorameter.studies.form import AnyVariant
from lorameter.studies.study import Study
from lorameter.studies.study_file import builtin_studies, load_study
from lorameter.studies.variant import LoraVariant
from lorameter.studies.workload import workload_variant_id
from lorameter.terminal import escape_control_chars, print_stderr


def run_export(options: argparse.Namespace) -> int:
    """Write the tables of a run; print the paths of the files, one per line."""
    form = options.format or "json"
    require(
        not options.json or options.output or form == "json",
        f"--json and --format {form} both choose what is printed. Give one of them, or an --output.",
    )
    require(
        not options.table or form in TABULAR,
        f"--table {options.table}: --format {form} does not write tables. Use csv or parquet.",
    )
    require(not options.metric or form in DASHBOARDS, f"--metric: --format {form} has all metrics. Leave it out.")
    run = store.read_run(options.run, store.runs_dir(options.runs_dir))
    if form in TABULAR and options.output:
        written = write_tables(run, form, Path(options.output), options.table)
    else:
        text = export_text(run, form, table=options.table, metrics=options.metric)
        if not options.output:
            sys.stdout.writelines(map(escape_control_chars, text))
            return EXIT_PASS
        written = write_text(text, Path(options.output))
    files = [str(path) for path in written]
    print_result(options, "\n".join(files), {"run": run.manifest.run, "files": files})
    return EXIT_PASS


def run_history(options: argparse.Namespace) -> int:
    """Print the history; a suspicion is not a verdict, so the exit code is that of a pass."""
    runs = store.runs_dir(options.runs_dir)
    history = read_history(runs, options.metric or DEFAULT_METRIC, study=options.study, variant=options.variant)
    show_result(
        options,
        describe_history(history, every_run=options.runs),
        lambda: codec.to_json(history),
        page=lambda: {"title": "History", "names": list_curve_names(history), "figures": draw_history_figures(history)},
    )
    return EXIT_PASS


def run_prune(options: argparse.Namespace) -> int:
    """Remove runs; print the removed runs and those kept for a reason."""
    require(
        options.keep is not None or options.older is not None,
        "prune: no runs were selected. Give --keep N, --older D, or both.",
    )
    require(options.keep is None or options.keep >= 0, f"--keep = {options.keep}: not a number of runs. Use 0 or more.")
    pruned = prune(
        store.runs_dir(options.runs_dir),
        keep=options.keep,
        older_s=None if options.older is None else parse_age(options.older),
        dry_run=options.dry_run,
    )
    word, freed = ("would be removed", "would be freed") if options.dry_run else ("removed", "freed")
    size = format_bytes(sum(run.size_bytes for run in pruned.removed))
    lines = [
        *(f"{word}  {run.run}  {format_bytes(run.size_bytes)}  {run.study}" for run in pruned.removed),
        *(f"kept  {run.run}  {run.why}" for run in pruned.staying),
        f"{format_count(len(pruned.removed), 'run')}, {size} {freed}; {pruned.kept} others kept",
    ]
    print_result(
        options,
        "\n".join(lines),
        {"dry_run": options.dry_run, "removed": pruned.removed, "kept_for_a_reason": pruned.staying},
    )
    return EXIT_PASS


def run_pack(options: argparse.Namespace) -> int:
    """Write the packed file; print its path and what it omits."""
    output = Path(options.output) if options.output else None
    target = pack(options.run, store.runs_dir(options.runs_dir), output, texts=options.texts)
    skipped = ["logs"] if options.texts else ["texts", "logs"]
    size = target.stat().st_size
    print_result(
        options,
        f"{target}  {format_bytes(size)}, without {', '.join(skipped)}",
        {"file": str(target), "size_bytes": size, "skipped": skipped},
    )
    return EXIT_PASS


def run_list(options: argparse.Namespace) -> int:
    """Print the list of a kind."""
    what = options.what
    if what == "keys":
        require(not options.json, "list keys: a page of Markdown, which has no --json. Leave it out.")
        sys.stdout.write(write_reference())
        return EXIT_PASS
    if what == "sizes":
        return _list_sizes(options)
    rows = _list_rows(options)
    if not rows and not options.json:
        print(f"no {what}", file=sys.stderr)
    elif what == "runs":
        show_result(options, describe_runs(rows), lambda: {"runs": rows})
    else:
        print_result(options, "\n".join("  ".join(map(str, row.values())) for row in rows), {what: rows})
    return EXIT_PASS


def _list_rows(options: argparse.Namespace) -> list[dict[str, Any]]:
    if options.what == "studies":
        return [{"name": name, "title": load_study(name).title} for name in builtin_studies()]
    if options.what == "models":
        return [{"name": entry.name, "description": entry.description} for entry in catalogue.CATALOGUE.values()]
    if options.what == "runs":
        return list_runs(store.runs_dir(options.runs_dir))
    study = _load_named(options)
    return [
        {
            "name": variant.name,
            "id": workload_variant_id(variant.id, study.own_workloads.get(variant.name)),
            "differs from the defaults in": _list_changes(study, variant),
        }
        for variant in study.variants
    ]


def _list_changes(study: Study, variant: AnyVariant) -> str:
    """The settings of a variant, and of its own workload, that are not the defaults."""
    defaults = LoraVariant().settings | {"cwd": "", "env": {}, "python": ""}
    changed = {key: codec.to_json(value) for key, value in variant.settings.items() if value != defaults.get(key)}
    own = {f"workload.{key}": value for key, value in study.workloads.get(variant.name, {}).items()}
    return " ".join(f"{key}={value}" for key, value in (changed | own).items())


def _list_sizes(options: argparse.Namespace) -> int:
    study = _load_named(options).with_overrides(model=options.model)
    require(study.supports("built"), f"list sizes: the variants of {study.name} define their models themselves.")
    from lorameter.trial.building.build import sizes_of_study  # loads torch, so only for a readable study

    model, sizes = study.workload.model, sizes_of_study(study)
    source = catalogue.resolve(f"{catalogue.RANDOM_PREFIX}{model.removeprefix(catalogue.RANDOM_PREFIX)}")
    unknown = shapes.unknown_layers(shapes.shape(source))
    rows = [dataclasses.asdict(one) | {"share": one.share} for one in sizes]
    data = {"model": model, "sizes": rows, **({"unknown": unknown} if unknown else {})}
    show_result(options, describe_sizes(model, sizes, unknown=unknown), lambda: data)
    return EXIT_PASS


def _load_named(options: argparse.Namespace) -> Study:
    what = options.what
    require(options.study, f"list {what}: no study named. Give one, as in `lorameter list {what} lora-or-qlora`.")
    return load_study(options.study).fit(make_target(open_executor().machine()))


def run_fetch(options: argparse.Namespace) -> int:
    """Download a catalogue model and print its path."""
    path = catalogue.fetch(options.name, report=print_stderr)
    print_result(options, str(path), {"model": options.name, "path": str(path)})
    return EXIT_PASS
