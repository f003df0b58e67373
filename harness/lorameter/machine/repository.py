"""Calls of git, and the state of a repository.

Git's hooks export variables that direct every git command to the repository of the hook, whichever folder it is started
in. They are removed here, so that a run that a hook starts reads the repository that was named.
"""

from __future__ import annotations

import os
import subprocess
from pathlib import Path
from typing import Any

_POINTERS = ("GIT_DIR", "GIT_WORK_TREE", "GIT_INDEX_FILE", "GIT_PREFIX", "GIT_OBJECT_DIRECTORY")
STATE_TIMEOUT_S = 10.0
"""A repository on a network disk that does not answer must not hold up a run for the sake of its commit."""


def run_git(folder: Path, *arguments: str, timeout_s: float | None = None) -> subprocess.CompletedProcess[str]:
    """The result of a git command in a folder. Code 127 and the reason where it cannot be run or does not end within
    `timeout_s`.

    A Ctrl-C in the terminal is for its parent, which may need git to take down what git put up. A read-only call takes
    no lock: git would otherwise rewrite the index, and one that is killed there, or whose disk is full, leaves a lock
    behind that stops every later commit of the user's.
    """
    environment = {name: value for name, value in os.environ.items() if name not in _POINTERS}
    command = ["git", "--no-optional-locks", "-C", str(folder), *arguments]
    try:
        return subprocess.run(
            command,
            capture_output=True,
            text=True,
            errors="replace",
            env=environment,
            timeout=timeout_s,
            check=False,
            start_new_session=True,
        )
    except OSError as error:
        return subprocess.CompletedProcess(command, 127, "", f"git cannot be run: {error.strerror}")
    except subprocess.TimeoutExpired:
        return subprocess.CompletedProcess(command, 127, "", f"git did not answer within {timeout_s:g} s")


def git_state(folder: Path) -> dict[str, Any]:
    """Commit and dirty flag of the repository around `folder`; None where there is none. Bytecode is no change."""
    commit = run_git(folder, "rev-parse", "HEAD", timeout_s=STATE_TIMEOUT_S)
    if commit.returncode:
        return {"commit": None, "dirty": None}
    bytecode = ":(top,exclude,glob)**/__pycache__/**"
    changes = run_git(folder, "status", "--porcelain", "--", ":/", bytecode, timeout_s=STATE_TIMEOUT_S)
    return {"commit": commit.stdout.strip(), "dirty": bool(changes.stdout.strip())}
