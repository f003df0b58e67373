"""What `lorameter run` takes in place of a study or of its variants: a training script, or PEFT's own experiments."""

from __future__ import annotations

import argparse
import dataclasses
from typing import TYPE_CHECKING, Any

from lorameter.errors import UsageError

if TYPE_CHECKING:
    from lorameter.studies.study import Study

SCRIPT_OPTIONS = ("script", "cwd", "steps", "peft_experiments", "select", "quality")
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
    parser.add_argument("--peft-experiments", metavar="DIR", help="method_comparison/MetaMathQA of PEFT, as a study")
    parser.add_argument("--select", metavar="GLOB", help="of these experiments, by METHOD/NAME; default: all")
    parser.add_argument(
        "--quality", action="store_true", help="train these experiments for all their steps; default: some tens"
    )


def study_of_options(options: argparse.Namespace, device: str) -> Study:
    """The study that is named, or with --command what it claims, of that script; `device` chooses its profile.

    Raises:
        UsageError: no such study, or a command that makes none.
    """
    from lorameter.studies.engine_command import study_of_engine
    from lorameter.studies.peft_experiments import study_of_experiments
    from lorameter.studies.script import time_steps
    from lorameter.studies.study_file import load_study

    if options.peft_experiments is not None:
        if options.study or options.script is not None:
            raise UsageError("--peft-experiments: it is a study of its own. Leave the study and --command out.")
        return study_of_experiments(options.peft_experiments, options.select or "*", quality=options.quality)
    for name in ("select", "quality"):
        if getattr(options, name):
            raise UsageError(f"--{name}: it belongs to --peft-experiments. Leave it out.")
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
