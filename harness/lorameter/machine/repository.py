"""Runs git commands, and reads the state of a repository.

Git hooks export variables that direct every git command to the hook's repository, regardless of the working folder.
They are removed here, so that a run started by a hook reads the intended repository.
"""

from __future__ import annotations

import os
import subprocess
from pathlib import Path
from typing import Any

_POINTERS = ("GIT_DIR", "GIT_WORK_TREE", "GIT_INDEX_FILE", "GIT_PREFIX", "GIT_OBJECT_DIRECTORY")
STATE_TIMEOUT_S = 10.0
"""A repository on an unresponsive network disk must not delay a run just to read its commit."""


def run_git(folder: Path, *arguments: str, timeout_s: float | None = None) -> subprocess.CompletedProcess[str]:
    """Run a git command in a folder. The result has code 127 and the reason if git cannot be run or does not end within
    `timeout_s`.

    Ctrl-C in the terminal reaches only the parent, which may need git for the cleanup. A read-only call takes no lock:
    git would otherwise rewrite the index, and if it is killed then, or the disk is full, it leaves a lock that blocks
    the user's later commits.
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
    """Commit and dirty flag of the repository around `folder`; None if there is none. Bytecode does not count as a
    change."""
    commit = run_git(folder, "rev-parse", "HEAD", timeout_s=STATE_TIMEOUT_S)
    if commit.returncode:
        return {"commit": None, "dirty": None}
    bytecode = ":(top,exclude,glob)**/__pycache__/**"
    changes = run_git(folder, "status", "--porcelain", "--", ":/", bytecode, timeout_s=STATE_TIMEOUT_S)
    return {"commit": commit.stdout.strip(), "dirty": bool(changes.stdout.strip())}
