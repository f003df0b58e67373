"""The command `doctor`: the checks that need no measurement, before one is made."""

from __future__ import annotations

import argparse
from typing import Any

from lorameter.commands.output import print_json
from lorameter.errors import EXIT_INVALID, EXIT_PASS


def add_commands(commands: Any, common: Any) -> None:
    """The parser of this command; `common` adds the options that every command has."""
    doctor = commands.add_parser(
        "doctor",
        help="what this machine can run and measure, and what would disturb it",
        description="Check, in about a second and without measuring, what this machine can run and measure, what "
        "would disturb a measurement, and how to fix it. Exit code 0: fit, 4: unfit.",
    )
    common(doctor)
    doctor.set_defaults(command=run_doctor)


def run_doctor(options: argparse.Namespace) -> int:
    """Print what was found; the exit code says whether anything may be measured here."""
    from lorameter.machine.doctor import examine, is_fit, survey
    from lorameter.records import codec, store

    checks = examine(survey(store.runs_dir(options.runs_dir)))
    fit = is_fit(checks)
    if options.json:
        print_json({"fit": fit, "checks": [codec.to_json(check) for check in checks]})
    else:
        from lorameter.report.machine import describe_checks
        from lorameter.report.terminal import console_for, show

        show(describe_checks(checks, fit=fit), console_for())
    return EXIT_PASS if fit else EXIT_INVALID
