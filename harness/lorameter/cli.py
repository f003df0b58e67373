"""The command `lorameter`. Imports nothing heavy until a command needs it: `--help` answers at once."""

from __future__ import annotations

import argparse
import difflib
import importlib
import sys
import traceback
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NoReturn

from kernels_check import terminal
from kernels_check.pipes import with_streams
from kernels_check.terminal import print_stderr
from lorameter.commands.parser import add_commands
from lorameter.errors import EXIT_INVALID, EXIT_UNEXPECTED, LorameterError, redact
from lorameter.run.interrupts import InterruptHandler

EXAMPLES = {
    "run": "lorameter run lora-or-qlora --effort quick",
    "report": "lorameter report 20261120-101500-mine-3f2a --html report.html",
    "list": "lorameter list runs",
    "model": "lorameter model fetch smollm2-135m",
    "model fetch": "lorameter model fetch smollm2-135m",
    "compare": "lorameter compare baseline 20261120-101500-mine-3f2a",
    "gate": "lorameter gate baseline 20261120-101500-mine-3f2a --format github",
    "accept": "lorameter accept 20261120-101500-mine-3f2a",
    "ab": "lorameter ab training-step --base main --candidate HEAD",
    "calibrate": "lorameter calibrate --effort standard",
    "wrap": "lorameter wrap -- python train.py --r 64",
    "doctor": "lorameter doctor",
    "estimate": "lorameter estimate lora-or-qlora:lora-r16 --model llama2-7b --gpu L4",
    "profile": "lorameter profile lora-or-qlora:qlora-nf4-r16 --phase generate --try",
    "parity": "lorameter parity lora-or-qlora:qlora-nf4-r16 --prompts 32",
    "sample": "lorameter sample 20261120-101500-mine-3f2a qlora-nf4-r16",
    "claims": "lorameter claims 20261120-101500-mine-3f2a",
    "export": "lorameter export 20261120-101500-mine-3f2a --format parquet",
    "history": "lorameter history step_time_s --study training-step",
    "bisect": "lorameter bisect training-step --good v0.1.0 --bad HEAD",
    "prune": "lorameter prune --keep 20 --dry-run",
    "pack": "lorameter pack 20261120-101500-mine-3f2a",
    "init": "lorameter init benchmarks",
    "completion": "lorameter completion bash > lorameter.bash",
}
"""What stands at the end of each command's help; runs are named as they are listed."""


def main(arguments: Sequence[str] | None = None) -> int:
    """Entry point; returns the exit code of the contract (0, 1, 2, 3, 4, 5, 70), or 141 where the reader has left."""
    return with_streams("lorameter", lambda: _run(arguments))


def _run(arguments: Sequence[str] | None) -> int:
    try:
        with InterruptHandler() as stops, stops.interruptible():
            options = parser().parse_args(arguments)
            module, _, name = options.command.partition(":")
            command: Callable[[argparse.Namespace], int]
            command = getattr(importlib.import_module(f"lorameter.commands.{module}"), name)
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
        if isinstance(error, MemoryError):
            print_stderr("lorameter: out of memory. Free memory, or raise the limit that this process has.")
            return EXIT_INVALID
        print_stderr(redact(traceback.format_exc().rstrip("\n")))
        print("lorameter: unexpected error; this is a defect of lorameter, please report it.", file=sys.stderr)
        return EXIT_UNEXPECTED


def parser() -> argparse.ArgumentParser:
    """All commands and options."""
    top = RedactingParser(
        prog="lorameter", description="Measure what a LoRA fine-tuning configuration costs, with confidence intervals."
    )
    subparsers = top.add_subparsers(required=True, metavar="COMMAND")

    top.add_argument("--version", action=_Version, nargs=0, help="print the version and end")
    add_commands(subparsers, _common)
    subparsers.choices["completion"].set_defaults(top=top)
    for name, command in commands_of(top):
        command.epilog = f"example: {EXAMPLES[name]}"
    return top


def commands_of(parser: argparse.ArgumentParser) -> Iterator[tuple[str, argparse.ArgumentParser]]:
    """The commands below a parser, each by the words that name it, and those below these."""
    below = (action for action in parser._actions if isinstance(action, argparse._SubParsersAction))
    for command in (command for action in below for command in action.choices.values()):
        yield command.prog.partition(" ")[2], command
        yield from commands_of(command)


class RedactingParser(terminal.SafeParser):
    """A parser whose refusals name the nearest command, option or choice, and repeat no credential of what was typed.

    argparse itself suggests names from Python 3.14 on.
    """

    def parse_known_args(self, args: Any = None, namespace: Any = None) -> Any:
        """As argparse's, but an option that this command does not have is refused at once."""
        found, rest = super().parse_known_args(args, namespace)
        for word in rest:
            option = word.partition("=")[0]
            if option.startswith("--"):
                options = [name.removeprefix("--") for name in self._option_string_actions]
                self.error(f"unknown option {option}. {self._nearest(option.removeprefix('--'), options, '--')}")
        return found, rest

    def _check_value(self, action: argparse.Action, value: Any) -> None:
        if action.choices is None or value in action.choices:
            return
        names = [str(choice) for choice in action.choices]
        if isinstance(action, argparse._SubParsersAction):
            self.error(f"unknown command {value!r}. {self._nearest(value, names)}")
        if not difflib.get_close_matches(value, names):
            super()._check_value(action, value)
        raise argparse.ArgumentError(action, f"invalid choice: {value!r}. {self._nearest(value, names)}")

    def _nearest(self, word: str, names: Sequence[str], prefix: str = "") -> str:
        near = difflib.get_close_matches(word, names, n=1)
        return f"Did you mean {prefix}{near[0]}?" if near else f"`{self.prog} --help` lists them."

    def error(self, message: str) -> NoReturn:
        """Print the usage and the message, and end with exit code 2."""
        super().error(redact(message))


class _Version(argparse.Action):
    """Prints the version of the distribution, which is looked up only where it is asked for."""

    def __call__(self, parser: argparse.ArgumentParser, *_: object) -> None:
        from importlib.metadata import PackageNotFoundError, version

        try:
            print(f"lorameter {version('lorameter')}")
        except PackageNotFoundError:
            print("lorameter, version unknown: it is not installed as a distribution")
        parser.exit()


def _common(command: argparse.ArgumentParser) -> None:
    command.add_argument("--json", action="store_true", help="print only one JSON document, on stdout")
    command.add_argument("--runs-dir", metavar="DIR", help="default: $LORAMETER_RUNS or ./.lorameter/runs")


if __name__ == "__main__":
    sys.exit(main())
