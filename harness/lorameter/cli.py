"""The command `lorameter`. Heavy imports happen only when a command needs them, so `--help` is fast."""

from __future__ import annotations

import argparse
import importlib
import sys
import traceback
from collections.abc import Callable, Sequence

from lorameter.commands.parser import build_parser
from lorameter.errors import EXIT_INVALID, EXIT_UNEXPECTED, LorameterError, redact
from lorameter.pipes import with_streams
from lorameter.run.interrupts import handle_interrupts
from lorameter.terminal import print_stderr


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command; returns its documented exit code (0, 1, 2, 3, 4, 5, 70), or 141 if the reader of the output has
    gone away."""
    return with_streams("lorameter", lambda: _run(arguments))


def _run(arguments: Sequence[str] | None) -> int:
    try:
        with handle_interrupts() as stops, stops.interruptible():
            options = build_parser().parse_args(arguments)
            module, _, name = options.calls.partition(":")
            command: Callable[[argparse.Namespace], int]
            command = getattr(importlib.import_module(f"lorameter.commands.{module}"), name)
            importlib.import_module("lorameter.commands.output").check_output(options)
            return command(options)
    except LorameterError as error:
        print_stderr(f"lorameter: {error}")
        return error.exit_code
    except KeyboardInterrupt:
        print("lorameter: stopped", file=sys.stderr)
        return EXIT_INVALID
    except Exception as error:
        from lorameter.records.os_errors import REMEDIES, format_os_error

        if isinstance(error, OSError) and error.errno in REMEDIES:
            print_stderr(f"lorameter: {format_os_error(error)}.")
            return EXIT_INVALID
        print_stderr(redact(traceback.format_exc().rstrip("\n")))
        print("lorameter: unexpected error; this is a defect of lorameter, please report it.", file=sys.stderr)
        return EXIT_UNEXPECTED


if __name__ == "__main__":
    sys.exit(main())
