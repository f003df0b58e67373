"""What a shell is told, so that it completes commands, options and the names of files: `completion`."""

from __future__ import annotations

import argparse
from typing import Any

from lorameter.errors import EXIT_PASS

SHELLS = ("bash", "zsh", "tcsh")


def add_commands(commands: Any, common: Any) -> None:
    """The parser of this command; `common` adds the options that every command has."""
    completion = commands.add_parser(
        "completion",
        help="print a shell completion script",
        description="Print a shell completion script for commands and options.",
    )
    completion.add_argument("shell", choices=SHELLS)
    common(completion)
    completion.set_defaults(command=run_completion)


def run_completion(options: argparse.Namespace) -> int:
    """Print the script for a shell; `options.top` is the parser of all commands."""
    import shtab

    from lorameter.commands.output import print_json

    script = shtab.complete(options.top, shell=options.shell)
    if options.json:
        print_json({"shell": options.shell, "script": script})
    else:
        print(script)
    return EXIT_PASS
