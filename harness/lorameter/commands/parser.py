"""Builds the parser of the command line. A command's module is imported when it is chosen, so `--help` is fast."""

from __future__ import annotations

import argparse
import difflib
from typing import Any, NoReturn

from lorameter.commands.options import add_arguments, shared_options
from lorameter.commands.table import COMMANDS
from lorameter.errors import redact
from lorameter.terminal import SafeParser


def build_parser() -> argparse.ArgumentParser:
    """The parser of all commands; it sets `calls` of the chosen command."""
    top = RedactingParser(
        prog="lorameter", description="Measure what a LoRA fine-tuning configuration costs, with confidence intervals."
    )
    parents = {"": top.add_subparsers(required=True, metavar="COMMAND")}
    top.add_argument("--version", action=_Version, nargs=0, help="print the version and end")
    for command in COMMANDS:
        parent, _, name = command.name.rpartition(" ")
        parser = parents[parent].add_parser(
            name, help=command.help, description=command.description, epilog=f"example: {command.example}"
        )
        if not command.calls:
            parents[command.name] = parser.add_subparsers(required=True, metavar="ACTION")
            continue
        add_arguments(parser.add_argument, command.arguments)
        if command.has_json:
            parser.add_argument("--json", action="store_true", help="print only one JSON document, on stdout")
        add_arguments(parser.add_argument, shared_options("runs-dir"))
        parser.set_defaults(calls=command.calls)
    return top


class RedactingParser(SafeParser):
    """A parser whose errors suggest the nearest option, and never print a credential."""

    def parse_known_args(self, args: Any = None, namespace: Any = None) -> Any:
        """Parse as argparse does, but refuse an unknown option of the command at once."""
        found, rest = super().parse_known_args(args, namespace)
        for word in rest:
            option = word.partition("=")[0]
            if option.startswith("--"):
                near = difflib.get_close_matches(option, self._option_string_actions, n=1)
                hint = f"Did you mean {near[0]}?" if near else f"`{self.prog} --help` lists them."
                homes = [one.name for one in COMMANDS if any(option in names for names, _ in one.arguments)]
                hint = f"It is an option of {', '.join(homes)}." if homes else hint
                self.error(f"unknown option {option}. {hint}")
        return found, rest

    def error(self, message: str) -> NoReturn:
        """Print the usage and the message, and exit with code 2."""
        super().error(redact(message))


class _Version(argparse.Action):
    """Prints the version of the distribution, which is looked up only for --version."""

    def __call__(self, parser: argparse.ArgumentParser, *_: object) -> None:
        from lorameter.machine.provenance import library_version

        print(f"lorameter {library_version('lorameter') or '(unknown version: it is not installed as a distribution)'}")
        parser.exit()
