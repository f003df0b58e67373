"""The command `lorameter`. Imports nothing heavy until a command needs it: `--help` answers at once."""

from __future__ import annotations

import argparse
import sys
import traceback
from collections.abc import Callable, Sequence

from harness.commands import (
    ab,
    bisect,
    catalogue,
    claims,
    compare,
    doctor,
    estimate,
    export,
    history,
    housekeeping,
    profile,
    run,
    sample,
    wrap,
)
from harness.errors import EXIT_INVALID, EXIT_UNEXPECTED, LorameterError, redact
from harness.run.stops import Stops
from kernels_check.streams import with_streams
from kernels_check.visible import Parser, tell


def main(arguments: Sequence[str] | None = None) -> int:
    """Entry point; returns the exit code of the contract (0, 1, 2, 3, 4, 5, 70), or 141 where the reader has left."""
    return with_streams("lorameter", lambda: _run(arguments))


def _run(arguments: Sequence[str] | None) -> int:
    options = parser().parse_args(arguments)
    command: Callable[[argparse.Namespace], int] = options.command
    try:
        with Stops() as stops, stops.interruptible():
            return command(options)
    except LorameterError as error:
        tell(f"lorameter: {error}")
        return error.exit_code
    except KeyboardInterrupt:
        print("lorameter: stopped", file=sys.stderr)
        return EXIT_INVALID
    except Exception as error:
        from harness.records.refusals import REMEDIES, words_of

        if isinstance(error, OSError) and error.errno in REMEDIES:
            tell(f"lorameter: {words_of(error)}.")
            return EXIT_INVALID
        if isinstance(error, MemoryError):
            tell("lorameter: out of memory. Free memory, or raise the limit that this process has.")
            return EXIT_INVALID
        tell(redact(traceback.format_exc().rstrip("\n")))
        print("lorameter: unexpected error; this is a defect of lorameter, please report it.", file=sys.stderr)
        return EXIT_UNEXPECTED


def parser() -> argparse.ArgumentParser:
    """All commands and options."""
    top = Parser(
        prog="lorameter", description="Measure what a LoRA fine-tuning configuration costs, and how sure that is."
    )
    subparsers = top.add_subparsers(required=True, metavar="COMMAND")

    measuring = (run, ab, bisect, wrap, doctor, estimate, profile)
    for command in (*measuring, catalogue, compare, sample, claims, export, history, housekeeping):
        command.add_commands(subparsers, _common)
    return top


def _common(command: argparse.ArgumentParser) -> None:
    command.add_argument("--json", action="store_true", help="print one JSON document on stdout and nothing else")
    command.add_argument("--runs-dir", metavar="DIR", help="default: $LORAMETER_RUNS or ./.lorameter/runs")


if __name__ == "__main__":
    sys.exit(main())
