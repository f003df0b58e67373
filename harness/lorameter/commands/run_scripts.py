"""What `lorameter run` takes beside the study of an engine: a training script in place of its variants."""

from __future__ import annotations

import argparse
import dataclasses
from typing import TYPE_CHECKING, Any

from lorameter.errors import UsageError

if TYPE_CHECKING:
    from lorameter.studies.study import Study

SCRIPT_OPTIONS = ("script", "cwd", "steps")
"""Names under which the options are kept; a run that is resumed has settled them."""


def add_script_options(parser: Any) -> None:
    """The options of a script."""
    parser.add_argument(
        "--command",
        dest="script",
        metavar="COMMAND",
        help="training command; put the engine's flags in {braces}",
    )
    parser.add_argument("--cwd", metavar="DIR", help="folder that the command is run in; default: this one")
    parser.add_argument("--steps", type=int, metavar="N", help="timed steps of each process of the command")


def study_of_options(options: argparse.Namespace, device: str) -> Study:
    """The study that is named, or with --command what it claims, of that script; `device` chooses its profile.

    Raises:
        UsageError: no such study, or a command that makes none.
    """
    from lorameter.studies.engine_command import study_of_engine
    from lorameter.studies.script import time_steps
    from lorameter.studies.study_file import load_study

    if options.script is None:
        for name in ("cwd", "steps"):
            if getattr(options, name) is not None:
                raise UsageError(f"--{name}: it belongs to --command. Leave it out.")
        return load_study(options.study, profile=options.profile, device=device)
    if options.profile is not None:
        raise UsageError(f"--profile {options.profile}: a script has none: it brings model and data. Leave it out.")
    if options.variant:
        raise UsageError("--variant: both are needed, with the engine and without it. Leave it out.")
    study = study_of_engine(load_study(options.study), options.script, cwd=options.cwd or "")
    if options.steps is None:
        return study
    return dataclasses.replace(study, protocol=time_steps(study.protocol, options.steps))
