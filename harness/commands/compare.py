"""What the commands that judge one side by another do: `compare`, `gate` and `accept`."""

from __future__ import annotations

import argparse
from typing import TYPE_CHECKING, Any

from harness.commands.output import FORMATS, print_json, show_gate
from harness.errors import EXIT_PASS, UsageError
from kernels_check.visible import make_visible

if TYPE_CHECKING:
    from harness.verdicts.comparand import Comparand


def add_commands(commands: Any, common: Any) -> None:
    """The parsers of these commands; `common` adds the options that every command has."""
    compare = commands.add_parser(
        "compare", help="compare two runs", description="Compare two runs metric by metric; the exit code says how."
    )
    _sides(compare)
    compare.add_argument(
        "--metric", metavar="M", action="append", default=[], help="only this metric or pattern of metrics; repeatable"
    )
    compare.add_argument("--all-metrics", action="store_true", help="everything that was measured")
    compare.add_argument("--force", action="store_true", help="show ratios of sides that are not comparable")
    common(compare)
    compare.set_defaults(command=run_compare)

    gate = commands.add_parser(
        "gate", help="pass or fail a comparison by a policy", description="Pass or fail a comparison by a policy file."
    )
    _sides(gate)
    gate.add_argument("--policy", metavar="FILE", help="TOML: limits, gated metrics, what inconclusive means")
    gate.add_argument("--format", choices=FORMATS, help="default: text")
    common(gate)
    gate.set_defaults(command=run_gate)

    accept = commands.add_parser(
        "accept", help="make a run the baseline of its fingerprint", description="Make a valid run the baseline."
    )
    accept.add_argument("run", metavar="RUN", help="a run id, or a directory in the runs directory")
    common(accept)
    accept.set_defaults(command=run_accept)


def _sides(command: argparse.ArgumentParser) -> None:
    command.add_argument(
        "base", metavar="BASE", help="a run id, a run directory, a pytest-benchmark .json, or the word baseline"
    )
    command.add_argument(
        "candidate", metavar="CANDIDATE", help="a run id, a run directory, or a pytest-benchmark .json"
    )


def run_compare(options: argparse.Namespace) -> int:
    """Print the comparison; the exit code is that of its verdicts."""
    from harness.verdicts.compare import compare
    from harness.verdicts.outcome import document, exit_code

    if options.metric and options.all_metrics:
        raise UsageError("--metric and --all-metrics both choose the metrics. Give one of them.")
    base, candidate = _read(options)
    report = compare(base, candidate, metrics=options.metric, all_metrics=options.all_metrics, force=options.force)
    if options.json:
        print_json(document(report))
    else:
        from harness.report.comparison import describe_comparison
        from harness.report.terminal import console_for, show

        show(describe_comparison(report), console_for())
    return exit_code(report.comparisons)


def run_gate(options: argparse.Namespace) -> int:
    """Print what the gate made of the comparison, in one of four formats."""
    from harness.verdicts.compare import compare
    from harness.verdicts.gate import gate_document, judge, load_policy

    if options.json and options.format not in (None, "json"):
        raise UsageError(f"--json and --format {options.format} both choose the format. Give one of them.")
    policy = load_policy(options.policy)
    base, candidate = _read(options)
    report = compare(base, candidate, metrics=policy.metrics, limits_of=policy.limits_of)
    result = judge(report, policy)
    form = "json" if options.json else options.format or "text"
    if form == "json":
        print_json(gate_document(result))
    else:
        show_gate(result, form)
    return result.exit_code


def run_accept(options: argparse.Namespace) -> int:
    """Accept a run and say what it replaces."""
    from harness.records import codec, store
    from harness.verdicts.baselines import accept

    accepted, replaced = accept(options.run, store.runs_dir(options.runs_dir))
    if options.json:
        print_json({"accepted": codec.to_json(accepted), "replaced": codec.to_json(replaced)})
    else:
        instead = f" in place of {replaced.run}" if replaced else ""
        said = f"{accepted.run} is the baseline of {accepted.study}, fingerprint {accepted.fingerprint}{instead}"
        print(make_visible(said))
    return EXIT_PASS


def _read(options: argparse.Namespace) -> tuple[Comparand, Comparand]:
    from harness.records import store
    from harness.verdicts.baselines import read_base, read_comparand

    runs = store.runs_dir(options.runs_dir)
    candidate = read_comparand(options.candidate, runs)
    base = read_base(options.base, runs, fingerprint=candidate.fingerprint, study=candidate.study)
    return base, candidate
