"""The one door of every measuring process: `python -m lorameter.worker zygote FD | cold FD | tokens`.

An executor starts these by name in the host of either side of an A/B, whose harness may be of another revision, so
what stands behind the door can move and the door cannot.
"""

from __future__ import annotations

import os
import signal
import socket
import sys

from lorameter.machine.processes import CPUS, PARENT, end_with_parent, leave


def main(arguments: list[str]) -> int:
    """Become the process that is named, on the descriptor that it is given. It ends with the process that started it,
    and not only when its imports, its downloads or its answer have come to their end."""
    if parent := os.environ.get(PARENT):
        end_with_parent(int(parent))
    if cpus := os.environ.get(CPUS):
        os.sched_setaffinity(0, [int(cpu) for cpu in cpus.split(",")])
    what, *rest = arguments
    if what.isdigit():  # as harnesses before schema 5 ask for a zygote: they get its schema, and refuse it by name
        what, rest = "zygote", arguments
    if what == "zygote":
        from lorameter.trial.zygote import zygote

        with socket.socket(fileno=int(rest[0])) as control:
            zygote(control)
        return 0
    if signal.getsignal(signal.SIGINT) is signal.default_int_handler:
        # It ends the process and says so, as other signals do: transformers makes of an exception that meets one of its
        # imports an error of its own, which names no signal.
        signal.signal(signal.SIGINT, signal.SIG_DFL)
    if what == "cold":
        from lorameter.trial.inference import cold

        return cold.main(int(rest[0]))
    if what == "tokens":
        # Standard output is for the answer alone: what a library prints goes to standard error.
        with os.fdopen(os.dup(1), "w", encoding="utf-8") as reply:
            os.dup2(2, 1)
            from lorameter.trial.data import tokens

            return tokens.main(reply)
    raise SystemExit(f"lorameter.worker: {what!r} is no process of a trial; known: zygote, cold, tokens")


if __name__ == "__main__":
    leave(main(sys.argv[1:]))
