"""The study of one command: what a run of a script on disk is a study of, and what an A/B of commands measures."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from lorameter.studies.protocol import Protocol
from lorameter.studies.script import name_of_command, script_workload
from lorameter.studies.study import Study
from lorameter.studies.variant import ScriptVariant


def study_of_command(
    command: str,
    *,
    name: str = "",
    cwd: str = "",
    threads: int = 1,
    protocol: Protocol | None = None,
    requirements: Mapping[str, Any] | None = None,
) -> Study:
    """A study with one variant, which is the command.

    Args:
        command: as one would type it (`shlex.join` of its words).
        name: of the variant and of the study; that of the script if left out.
        cwd: folder that it is run in; "" for the working folder.
        threads: of each process on the CPU.
        protocol: how it is measured; of a run that measured one script from its beginning to its end: one replicate,
            and in `turns` its timed steps, one a turn.
        requirements: paths of kernels_check that its step must have.

    Raises:
        UsageError: no command, or one that takes a shell.
    """
    name = name or name_of_command(command)
    variant = ScriptVariant(name=name, command=command, cwd=cwd)
    return Study(
        name=name,
        title=command,
        workload=script_workload(threads),
        protocol=protocol or Protocol(phases=("train",)),
        variants=(variant,),
        reference=name,
        requirements=dict(requirements or {}),
    )
