"""The command `lorameter`. Imports nothing heavy until a command needs it: `--help` answers at once."""

from __future__ import annotations

import argparse
import dataclasses
import sys
import traceback
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from harness import commands, commands_ab, commands_sample, commands_study
from harness.commands import print_json
from harness.errors import EXIT_INVALID, EXIT_PASS, EXIT_UNEXPECTED, LorameterError

if TYPE_CHECKING:
    from harness.store import Run


def main(arguments: Sequence[str] | None = None) -> int:
    """Entry point; returns the exit code of the contract (0, 1, 2, 3, 4, 5, 70)."""
    options = parser().parse_args(arguments)
    command: Callable[[argparse.Namespace], int] = options.command
    try:
        return command(options)
    except LorameterError as error:
        print(f"lorameter: {error}", file=sys.stderr)
        return error.exit_code
    except KeyboardInterrupt:
        print("lorameter: stopped", file=sys.stderr)
        return EXIT_INVALID
    except Exception:
        traceback.print_exc()
        print("lorameter: unexpected error; this is a defect of lorameter, please report it.", file=sys.stderr)
        return EXIT_UNEXPECTED


def parser() -> argparse.ArgumentParser:
    """All commands and options."""
    top = argparse.ArgumentParser(
        prog="lorameter", description="Measure what a LoRA fine-tuning configuration costs, and how sure that is."
    )
    subparsers = top.add_subparsers(required=True, metavar="COMMAND")

    run = subparsers.add_parser("run", help="measure a study", description="Measure a study and print its report.")
    run.add_argument("study", metavar="STUDY", help="name of a built-in study, or a TOML file")
    run.add_argument("--effort", choices=("quick", "standard", "rigorous"), help="3, 8 or 12 replicates")
    run.add_argument("--replicates", type=int, metavar="N", help="number of replicates, instead of --effort")
    run.add_argument("--profile", metavar="P", help="a profile of the study; default: the one of this machine")
    run.add_argument("--model", metavar="M", help="catalogue name, hub id, directory, GGUF file, or random:M")
    run.add_argument("--data", metavar="FILE|ID", help="a .jsonl(.gz) file, a hub id, or synthetic")
    run.add_argument("--variant", metavar="V", action="append", default=[], help="only this variant; repeatable")
    run.add_argument(
        "--phase", choices=("train", "generate", "cold"), action="append", default=[], help="only this; repeatable"
    )
    run.add_argument(
        "--interleave", metavar="L", help="shared-base, lockstep or replicates; default: the finest possible"
    )
    run.add_argument("--precision", type=float, metavar="F", help="stop when every interval is within ±F of its ratio")
    run.add_argument("--max-minutes", type=float, metavar="M", help="drop rounds, of all alike, to end by then")
    run.add_argument("--dry-run", action="store_true", help="show the plan and what it will take, and measure nothing")
    _common(run)
    run.set_defaults(command=_run)

    report = subparsers.add_parser("report", help="print the report of a run")
    report.add_argument("run", metavar="RUN", help="a run id or a run directory")
    _common(report)
    report.set_defaults(command=_report)

    listing = subparsers.add_parser("list", help="list studies, variants and what they train, models or runs")
    listing.add_argument("what", choices=("studies", "variants", "sizes", "models", "runs"))
    listing.add_argument("study", nargs="?", metavar="STUDY", help="the study whose variants or sizes to list")
    listing.add_argument("--model", metavar="M", help="sizes on another model; its shape is enough")
    _common(listing)
    listing.set_defaults(command=_list)

    model = subparsers.add_parser("model", help="get a model")
    actions = model.add_subparsers(required=True, metavar="ACTION")
    fetch = actions.add_parser("fetch", help="download a catalogue model, convert it once, verify it")
    fetch.add_argument("name", metavar="NAME")
    _common(fetch)
    fetch.set_defaults(command=_fetch)
    commands.add_commands(subparsers, _common)
    commands_ab.add_commands(subparsers, _common)
    commands_sample.add_commands(subparsers, _common)
    commands_study.add_commands(subparsers, _common)
    return top


def _common(command: argparse.ArgumentParser) -> None:
    command.add_argument("--json", action="store_true", help="print one JSON document on stdout and nothing else")
    command.add_argument("--runs-dir", metavar="DIR", help="default: $LORAMETER_RUNS or ./.lorameter/runs")


def _run(options: argparse.Namespace) -> int:
    from harness import store
    from harness.measure import measure, plan_study
    from harness.provenance import probe_machine
    from harness.report.live import LiveDisplay
    from harness.report.terminal import console_for, print_notices, print_run
    from harness.report.view import view_of
    from harness.study_file import load_study

    if options.effort and options.replicates is not None:
        raise _usage("--effort and --replicates both set the replicates. Give one of them.")
    machine, runs = probe_machine(), store.runs_dir(options.runs_dir)
    study = load_study(options.study, profile=options.profile, device=machine.kind).with_overrides(
        model=options.model,
        data=options.data,
        effort=options.effort,
        replicates=options.replicates,
        precision=options.precision,
        max_minutes=options.max_minutes,
    )
    plan, notices = plan_study(
        study,
        machine,
        select=options.variant,
        phases=options.phase or study.protocol.phases,
        interleaving=options.interleave,
        runs=runs,
    )
    if options.dry_run:
        return _dry_run(plan, machine, notices, runs, as_json=options.json)
    errors = console_for(stderr=True)
    print_notices(notices, errors)
    with LiveDisplay(errors) as display:
        run = measure(plan, machine, runs=runs, display=display, notices=notices)
    view = view_of(run)
    if options.json:
        print_notices(view.notices, errors)
        print_json(
            {
                "run": view.run,
                "path": view.path,
                "status": "ok" if view.valid else "invalid",
                "control": _controls(view),
                "trials": view.counts,
            }
        )
    else:
        print_run(view, console_for())
        _show_claims(run)
    return EXIT_PASS if view.valid else EXIT_INVALID


def _dry_run(plan: Any, machine: Any, notices: Any, runs: Path, *, as_json: bool) -> int:
    from harness.forecast import forecast
    from harness.report.terminal import console_for, print_notices
    from harness.units import format_bytes, format_duration

    expected = forecast(plan, machine, runs)
    if as_json:
        print_json(
            {
                "order": [slot.trial for slot in plan.slots],
                "interleaving": plan.interleaving,
                "why": plan.why,
                "seed": plan.study.protocol.seed,
                "time_s": expected.time_s,
                "time_basis": expected.basis,
                "memory_bytes": expected.memory_bytes,
                "disk_bytes": expected.disk_bytes,
            }
        )
        return EXIT_PASS
    console = console_for()
    console.print(f"[bold]{plan.study.title}[/bold]: {len(plan.slots)} trials on {machine.device_name}")
    for replicate in range(plan.study.protocol.replicates):
        groups = [group for group in plan.groups if group.replicate == replicate]
        names = "; ".join(", ".join(slot.trial.partition("-")[2] for slot in group.slots) for group in groups)
        console.print(f"  replicate {replicate + 1}: {names}", markup=False)
    console.print(f"  level   {plan.interleaving}: {plan.why}", markup=False)
    took = "unknown" if expected.time_s is None else f"about {format_duration(expected.time_s)}"
    console.print(f"  time    {took} ({expected.basis})", markup=False)
    console.print(f"  memory  about {format_bytes(expected.memory_bytes)} for the largest trial, its process included")
    console.print(f"  disk    about {format_bytes(expected.disk_bytes)}")
    print_notices(notices, console)
    return EXIT_PASS


def _report(options: argparse.Namespace) -> int:
    from harness import codec, store
    from harness.report.terminal import console_for, print_run
    from harness.report.view import view_of

    run = store.read_run(options.run, store.runs_dir(options.runs_dir))
    if run.manifest.sides:
        from harness.commands_ab import show_ab

        return show_ab(run, options)
    view = view_of(run)
    if options.json:
        print_json(codec.to_json(view))
    else:
        print_run(view, console_for())
        _show_claims(run)
    return EXIT_PASS if view.valid else EXIT_INVALID


def _show_claims(run: Run) -> None:
    """The verdicts on what the study claims, where it claims anything."""
    if run.manifest.study.get("claims"):
        from harness.claims import judge_claims
        from harness.report.claims import print_verdicts
        from harness.report.terminal import console_for

        print_verdicts(judge_claims(run), console_for())


def _list(options: argparse.Namespace) -> int:
    if options.what == "sizes":
        return _list_sizes(options)
    rows = _listed(options)
    if options.json:
        print_json({options.what: rows})
        return EXIT_PASS
    for row in rows:
        print("  ".join(str(value) for value in row.values()))
    if not rows:
        print(f"no {options.what}", file=sys.stderr)
    return EXIT_PASS


def _listed(options: argparse.Namespace) -> list[dict[str, Any]]:
    from harness import catalogue, codec, store
    from harness.study_file import builtin_studies, load_study

    if options.what == "studies":
        return [{"name": name, "title": load_study(name).title} for name in builtin_studies()]
    if options.what == "models":
        return [{"name": entry.name, "description": entry.description} for entry in catalogue.CATALOGUE.values()]
    if options.what == "runs":
        folder = store.runs_dir(options.runs_dir)
        return [_run_row(path) for path in store.list_runs(folder)]
    study = load_study(_study_named(options))
    rows = []
    for variant in study.variants:
        changed = {key: codec.to_json(getattr(variant, key)) for key in variant.differences(type(variant)())}
        words = " ".join(f"{key}={value}" for key, value in changed.items())
        rows.append({"name": variant.name, "id": variant.id, "differs from the defaults in": words})
    return rows


def _list_sizes(options: argparse.Namespace) -> int:
    from harness.study_file import load_study

    study = load_study(_study_named(options)).with_overrides(model=options.model)
    from harness.training.sizes import sizes_of_study  # loads torch, so only for a study that can be read

    model, sizes = study.workload.model, sizes_of_study(study)
    if options.json:
        print_json({"model": model, "sizes": [dataclasses.asdict(one) | {"share": one.share} for one in sizes]})
    else:
        from harness.report.sizes import print_sizes
        from harness.report.terminal import console_for

        print_sizes(model, sizes, console_for())
    return EXIT_PASS


def _study_named(options: argparse.Namespace) -> str:
    what = options.what
    if not options.study:
        raise _usage(f"list {what}: no study named. Give one, as in `lorameter list {what} lora-or-qlora`.")
    return str(options.study)


def _run_row(path: Path) -> dict[str, Any]:
    from harness import store
    from harness.errors import UsageError

    try:
        manifest = store.read_manifest(path)
    except UsageError as error:  # one damaged run must not hide the others
        return {"run": path.name, "status": "damaged", "title": str(error)}
    return {"run": manifest.run, "status": manifest.status, "title": manifest.study["title"]}


def _fetch(options: argparse.Namespace) -> int:
    from harness import fetch

    path = fetch.fetch(options.name, report=lambda text: print(text, file=sys.stderr))
    if options.json:
        print_json({"model": options.name, "path": str(path)})
    else:
        print(path)
    return EXIT_PASS


def _controls(view: Any) -> dict[str, Any]:
    from harness import codec

    return {table.phase: codec.to_json(table.control) for table in view.tables}


def _usage(message: str) -> LorameterError:
    from harness.errors import UsageError

    return UsageError(message)


if __name__ == "__main__":
    sys.exit(main())
