"""``python -m kernels_check``: each subcommand is one function in a module of its own, imported only when it runs.

Exit codes are those of the lorameter commands: 0 done, 2 usage or bad input, 4 a check that failed, 70 unexpected, 141
where the reader of the result has gone away.
Standard output carries the result (with ``--json`` exactly one document), standard error everything else.
"""

from __future__ import annotations

import argparse
import sys
import traceback
from collections.abc import Sequence
from importlib import import_module
from pathlib import Path

from kernels_check.memory_limit import memory_limit_problem
from kernels_check.pipes import with_streams
from kernels_check.terminal import SafeParser, print_stderr

EXIT_CHECK_FAILED = 4
EXIT_UNEXPECTED = 70


def main(argv: Sequence[str] | None = None) -> int:
    """Run one subcommand and return its exit code."""
    return with_streams("kernels_check", lambda: _run(argv))


def _run(argv: Sequence[str] | None) -> int:
    words = list(sys.argv[1:] if argv is None else argv)
    if words in ([], ["--json"]):
        words.insert(0, "probe")
    arguments = _parser().parse_args(words)
    if said := memory_limit_problem():
        print_stderr(f"kernels_check: {said}")
        return EXIT_CHECK_FAILED
    module, _, function = arguments.run.partition(":")
    try:
        code: int = getattr(import_module(f"kernels_check.{module}"), function)(arguments)
    except Exception:
        print_stderr(
            f"{traceback.format_exc()}kernels_check: unexpected error, see above; please report it with the command"
        )
        return EXIT_UNEXPECTED
    return code


def _parser() -> argparse.ArgumentParser:
    parser = SafeParser(prog="python -m kernels_check", description="What really ran, not what was asked for.")
    commands = parser.add_subparsers(metavar="COMMAND", required=True)
    _add_trace(commands)
    _add_rules(commands)
    _add_probe(commands)
    _add_selftest(commands)
    return parser


def _add_trace(commands: argparse._SubParsersAction[SafeParser]) -> None:
    trace = commands.add_parser(
        "trace", help="judge a recording: a Kineto/Chrome trace or an nsys cuda_gpu_kern_sum CSV"
    )
    trace.add_argument("file", type=Path, metavar="FILE", help="trace .json or .json.gz, or nsys .csv (also .gz)")
    trace.add_argument("--json", action="store_true", help="print one JSON document")
    trace.set_defaults(run="trace.report:run")


def _add_rules(commands: argparse._SubParsersAction[SafeParser]) -> None:
    rules = commands.add_parser("rules", help="the ordered rules by which kernel names are classified")
    rules.add_argument("--json", action="store_true", help="print one JSON document")
    rules.add_argument("--check", action="store_true", help="say whether the installed versions are the validated ones")
    rules.set_defaults(run="rules_report:run")


def _add_probe(commands: argparse._SubParsersAction[SafeParser]) -> None:
    probe = commands.add_parser("probe", help="which fast paths run on this machine, how exact and how fast (default)")
    probe.add_argument("--json", action="store_true", help="print one JSON document")
    probe.set_defaults(run="probe.probe:run")


def _add_selftest(commands: argparse._SubParsersAction[SafeParser]) -> None:
    selftest = commands.add_parser("selftest", help="are twelve faults found on this machine, and do healthy runs pass")
    selftest.add_argument("--json", action="store_true", help="print one JSON document")
    selftest.set_defaults(run="selftest:run")


if __name__ == "__main__":
    sys.exit(main())
