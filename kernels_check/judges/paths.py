"""The table of all paths that can be required, combined from the judges.

To add a path, add an entry to the ``PATHS`` of its judge. This table imports neither torch nor numpy, so that a study
with an unknown requirement is refused before heavy imports: a judge only names the types of its evidence, and the
observation reads it.
"""

from __future__ import annotations

from collections.abc import Mapping

from kernels_check.check import JudgedPath, Requirement
from kernels_check.judges import adapter, attention, base, batch, execution, optimizer, ranks

PATHS: Mapping[str, JudgedPath] = {
    **attention.PATHS,
    **batch.PATHS,
    **base.PATHS,
    **adapter.PATHS,
    **optimizer.PATHS,
    **execution.PATHS,
    **ranks.PATHS,
}
"""Every path, in the order of the report."""

REQUIREMENTS: Mapping[str, Requirement] = {path: judged.requirement for path, judged in PATHS.items()}
"""The accepted values of each path, in the same order."""


def validate(requirements: Mapping[str, object]) -> None:
    """Refuse an unknown path or a value of the wrong type.

    Raises:
        ValueError: the message names the path and its accepted values.
    """
    for path, value in requirements.items():
        requirement = REQUIREMENTS.get(path)
        if requirement is None:
            raise ValueError(f"unknown requirement {path!r}; known paths: {', '.join(REQUIREMENTS)}")
        problem = requirement.problem(value)
        if problem is not None:
            raise ValueError(f"requirement {path}={value!r} {problem}")
