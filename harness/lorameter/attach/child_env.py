"""How a script is started so that its training is followed: variables of its environment, and nothing else.

No file of the user's is changed and nothing is installed. A folder in front on PYTHONPATH holds a module that every
interpreter imports when it starts (`hook/sitecustomize.py`); launchers hand the environment on to what they start, so
that the hook is in each of their processes, and it only does something in one that trains.
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path

from lorameter.attach.variables import AFTER_IMPORT, DEFAULT_FOLLOWER, ENV_FOLLOWER, SEEN

HOOK = Path(__file__).with_name("hook")
"""The folder that goes in front on the path."""


def environment(
    inherited: Mapping[str, str],
    *,
    follower: str = DEFAULT_FOLLOWER,
    after_import: str = "",
    seen: Path | None = None,
    variables: Mapping[str, str] | None = None,
) -> dict[str, str]:
    """The variables of a process whose first training is followed.

    Args:
        inherited: what it would have.
        follower: who follows, as `package.module:callable`; it is called without arguments when the training begins.
        after_import: what to call when the script has imported a module: `module=package.module:function`, several with
            commas between; the function is given the module.
        seen: a file that the hook makes when an interpreter has loaded it.
        variables: further ones.
    """
    path = os.pathsep.join(filter(None, [str(HOOK), inherited.get("PYTHONPATH", "")]))
    told = {"PYTHONPATH": path, ENV_FOLLOWER: follower}
    told |= {AFTER_IMPORT: after_import} if after_import else {}
    told |= {SEEN: str(seen)} if seen is not None else {}
    return {**inherited, **told, **(variables or {})}
