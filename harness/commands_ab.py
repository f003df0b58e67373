"""What the commands that measure two sides in one job do: `ab` and `calibrate`."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import TYPE_CHECKING, Any

from harness.commands import FORMATS, print_json, show_gate
from harness.errors import UsageError

if TYPE_CHECKING:
    from harness.store import Run

SIDE_HELP = "a git revision, a Python executable, or requirements such as 'peft==0.20.0'"


def add_commands(commands: Any, common: Any) -> None:
    """The parsers of these commands; `common` adds the options that every command has."""
    ab = commands.add_parser(
        "ab",
        help="measure base and candidate in one job, taking turns",
        description="Measure base and candidate in one job, their processes taking turns, and judge the candidate.",
    )
    ab.add_argument("study", metavar="STUDY", help="name of a built-in study, or a TOML file")
    ab.add_argument("--base", metavar="SIDE", required=True, help=SIDE_HELP)
    ab.add_argument("--candidate", metavar="SIDE", required=True, help=SIDE_HELP)
    _measuring(ab)
    ab.add_argument("--policy", metavar="FILE", help="TOML: limits, gated metrics, what inconclusive means")
    ab.add_argument("--format", choices=FORMATS, help="default: text")
    ab.add_argument(
        "--inject-rows",
        type=int,
        default=0,
        metavar="N",
        help="a test of the gate itself: the candidate multiplies N extra rows in every adapted layer",
    )
    common(ab)
    ab.set_defaults(command=run_ab)


def _measuring(command: argparse.ArgumentParser) -> None:
    command.add_argument("--effort", choices=("quick", "standard", "rigorous"), help="3, 8 or 12 replicates; default 8")
    command.add_argument("--replicates", type=int, metavar="N", help="number of replicates, instead of --effort")
    command.add_argument("--precision", type=float, metavar="F", help="stop when every interval is within ±F")
    command.add_argument("--max-minutes", type=float, metavar="M", help="begin no replicate that would end later")
    command.add_argument("--model", metavar="M", help="catalogue name, hub id, directory, GGUF file, or random:M")
    command.add_argument("--data", metavar="FILE|ID", help="a .jsonl(.gz) file, a hub id, or synthetic")
    command.add_argument("--variant", metavar="V", action="append", default=[], help="only this variant; repeatable")
    command.add_argument(
        "--phase", choices=("train", "generate", "cold"), action="append", default=[],
        help="what to measure, repeatable; default: train and generate",
    )  # fmt: skip


def run_ab(options: argparse.Namespace) -> int:
    """Measure, print, and end with the exit code of the verdicts under the policy."""
    from harness import catalogue, store
    from harness.ab import DEFAULT_PHASES, measure_ab, plan_ab
    from harness.gate import load_policy
    from harness.provenance import probe_machine
    from harness.report.live import LiveDisplay
    from harness.report.terminal import console_for, print_notices

    if options.json and options.format not in (None, "json"):
        raise UsageError(f"--json and --format {options.format} both choose the format. Give one of them.")
    if options.inject_rows < 0:
        raise UsageError(f"--inject-rows = {options.inject_rows}: no amount of work. Use 0 or more.")
    load_policy(options.policy)  # before anything is measured
    study, machine, runs = study_of(options), probe_machine(), store.runs_dir(options.runs_dir)
    plan, notices = plan_ab(
        study,
        machine,
        select=options.variant,
        phases=options.phase or DEFAULT_PHASES,
        injected_rows=options.inject_rows,
        runs=runs,
    )
    errors = console_for(stderr=True)
    print_notices(notices, errors)
    with LiveDisplay(errors) as display:
        run = measure_ab(
            plan,
            machine,
            base=options.base,
            candidate=options.candidate,
            repository=Path.cwd(),
            cache=catalogue.cache_dir(),
            runs=runs,
            display=display,
            notices=notices,
        )
    return show_ab(run, options)


def study_of(options: argparse.Namespace) -> Any:
    """The study with the options' changes; 8 replicates unless something else is asked for."""
    from harness.study import load_study

    if options.effort and options.replicates is not None:
        raise UsageError("--effort and --replicates both set the replicates. Give one of them.")
    decided = options.replicates is not None or options.precision is not None
    return load_study(options.study).with_overrides(
        model=options.model,
        data=options.data,
        effort=options.effort or (None if decided else "standard"),
        replicates=options.replicates,
        precision=options.precision,
        max_minutes=options.max_minutes,
    )


def show_ab(run: Run, options: argparse.Namespace) -> int:
    """Print an A/B run in the format asked for; the exit code is that of its verdicts under the policy."""
    from harness.ab_report import attribution_document, attribution_of, report_of
    from harness.gate import gate_document, judge, load_policy

    policy = load_policy(getattr(options, "policy", None))
    result = judge(report_of(run, metrics=policy.metrics, limits_of=policy.limits_of), policy)
    form = "json" if options.json else getattr(options, "format", None) or "text"
    if form == "json":
        about = {"run": run.manifest.run, "path": str(run.path), "interleaving": run.manifest.interleaving}
        print_json({**gate_document(result), **about, "attribution": attribution_document(run)})
        return result.exit_code
    if form == "text":
        from harness.report.attribution import print_attribution
        from harness.report.terminal import console_for

        console = console_for()
        print_attribution(attribution_of(run), run, console)
    show_gate(result, form)
    return result.exit_code
