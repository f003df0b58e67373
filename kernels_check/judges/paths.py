"""Every path that can be required, joined from the judges that export them.

To add one is an entry in the ``PATHS`` of its judge. Neither torch nor numpy is loaded by this table, so that a study
can be refused for an unknown requirement before anything heavy is imported: a judge names the types of what
was observed, and leaves reading it to the observation.
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
"""Every path, in the order in which checks are reported."""

REQUIREMENTS: Mapping[str, Requirement] = {path: judged.requirement for path, judged in PATHS.items()}
"""What each path accepts, in the same order."""


def validate(requirements: Mapping[str, object]) -> None:
    """Refuse an unknown path or a value of the wrong kind.

    Raises:
        ValueError: names the path and what it accepts.
    """
    for path, value in requirements.items():
        requirement = REQUIREMENTS.get(path)
        if requirement is None:
            raise ValueError(f"unknown requirement {path!r}; known paths: {', '.join(REQUIREMENTS)}")
        problem = requirement.problem(value)
        if problem is not None:
            raise ValueError(f"requirement {path}={value!r} {problem}")
