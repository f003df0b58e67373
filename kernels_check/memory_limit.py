"""Whether numpy starts in the memory that this process may have (`ulimit -v`, as batch systems set it).

OpenBLAS, which numpy uses, takes its buffers when it is loaded or first used. Where it gets none it ends the
process with exit code 1, which is a verdict here, or tries for minutes. No exception is raised, so it is tried in
another process first, and only where there is a limit.
"""

from __future__ import annotations

import os
import resource
import signal
import time

PATIENCE_S = 20.0
"""What starts takes a part of a second; OpenBLAS gives up after minutes."""


LIMITS = {resource.RLIMIT_AS: "addresses (ulimit -v)", resource.RLIMIT_DATA: "data (ulimit -d)"}


def memory_limit_problem() -> str:
    """What is the matter and what to do about it; nothing where numpy starts."""
    limits = {words: resource.getrlimit(kind)[0] for kind, words in LIMITS.items()}
    set_here = {words: limit for words, limit in limits.items() if limit != resource.RLIM_INFINITY}
    if not set_here or _starts():
        return ""
    given = " and ".join(f"{limit / 2**20:,.0f} MiB of {words}" for words, limit in set_here.items())
    return f"this process may have {given}, in which numpy does not start. Raise the limit."


def _starts() -> bool:
    pid = os.fork()
    if pid == 0:
        try:
            _use_numpy()
            os._exit(0)
        finally:
            os._exit(1)
    deadline = time.monotonic() + PATIENCE_S
    while time.monotonic() < deadline:
        ended, status = os.waitpid(pid, os.WNOHANG)
        if ended:
            return status == 0
        time.sleep(0.01)
    os.kill(pid, signal.SIGKILL)
    os.waitpid(pid, 0)
    return False


def _use_numpy() -> None:
    nowhere = os.open(os.devnull, os.O_WRONLY)
    for number in (1, 2):  # the words of OpenBLAS name nothing that helps
        os.dup2(nowhere, number)
    import numpy as np

    square = np.ones((256, 256))
    np.linalg.inv(square @ square + np.eye(256))
