"""What `lorameter ab` takes in place of a study: two commands, or one command that stands on two sides."""

from __future__ import annotations

import argparse
import dataclasses
from typing import TYPE_CHECKING, Any

from lorameter.errors import UsageError

if TYPE_CHECKING:
    from lorameter.studies.study import Study

COMMAND_HELP = "a training command in quotes: 'python train.py --r 64'"


def add_script_options(parser: Any) -> None:
    """The options of scripts."""
    parser.add_argument("--base-command", metavar="COMMAND", help=f"in place of STUDY and sides: {COMMAND_HELP}")
    parser.add_argument("--candidate-command", metavar="COMMAND", help="the command that is compared with it")
    parser.add_argument(
        "--command",
        dest="script",
        metavar="COMMAND",
        help=f"in place of STUDY, on the sides --base and --candidate: {COMMAND_HELP}",
    )
    parser.add_argument("--cwd", metavar="DIR", help="folder that the commands are run in; default: this one")
    parser.add_argument("--steps", type=int, metavar="N", help="timed steps of each process of a command; default 16")


def study_of_options(options: argparse.Namespace) -> tuple[Study, str] | None:
    """The study of the commands that were given, and the candidate's command where it is another; None without any.

    Raises:
        UsageError: half of what it takes, or two ways of saying it.
    """
    from lorameter.studies.protocol import Protocol
    from lorameter.studies.script import name_of_command, split_command, time_steps
    from lorameter.studies.script_study import study_of_command

    base, candidate, one = options.base_command, options.candidate_command, options.script
    if base is candidate is one is None:
        for name in ("cwd", "steps"):
            if getattr(options, name) is not None:
                raise UsageError(f"--{name}: it belongs to --command, --base-command and --candidate-command.")
        return None
    if options.study:
        raise UsageError("ab: a study and a command are given. A command is a study by itself: leave one of them out.")
    if options.inject_rows:
        raise UsageError(
            "--inject-rows: extra work goes into adapters of lorameter's own, and a script has none of them."
        )
    if options.variant:
        raise UsageError("--variant: a command is the one variant. Leave it out.")
    if one is not None and (base is not None or candidate is not None):
        raise UsageError("--command is for both sides, but each side also has its own command. Give one of the two.")
    if one is None and (base is None or candidate is None):
        missing = "--base-command" if base is None else "--candidate-command"
        raise UsageError(
            f"ab: {missing} COMMAND is missing. Give it, or one --command on the sides --base and --candidate."
        )
    if one is None and (options.base or options.candidate):
        raise UsageError(
            "--base and --candidate are sides for one --command. Two commands are the sides themselves: leave them out."
        )
    if candidate is not None:
        split_command("--candidate-command", candidate)
    steps = 16 if options.steps is None else options.steps
    protocol = time_steps(Protocol(phases=("train",)), steps)
    command = one if one is not None else base
    study = study_of_command(command, name=name_of_command(command), cwd=options.cwd or "", protocol=protocol)
    if candidate is not None:
        study = dataclasses.replace(study, title=f"{base} against {candidate}")
    return study, candidate or ""
