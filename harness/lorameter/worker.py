"""The entry point of every measuring process: `python -m lorameter.worker zygote|cold|tokens FD`.

An executor starts these by name in the host of each side of an A/B, whose harness may have another revision. The
process uses `lorameter.wire` on the descriptor; its output goes to a log.
"""

from __future__ import annotations

import os
import signal
import sys
from multiprocessing.connection import Connection

from lorameter.machine.processes import CPUS, PARENT, end_with_parent, exit_quickly


def main(arguments: list[str]) -> int:
    """Run the named process. It ends with the process that started it, even during imports, downloads or an answer."""
    if parent := os.environ.get(PARENT):
        end_with_parent(int(parent))
    if cpus := os.environ.get(CPUS):
        os.sched_setaffinity(0, [int(cpu) for cpu in cpus.split(",")])
    what, descriptor = arguments[0], int(arguments[1])
    os.set_inheritable(descriptor, False)
    with Connection(descriptor) as connection:
        if what == "zygote":
            from lorameter.trial.zygote import zygote

            zygote(connection)
            return 0
        if signal.getsignal(signal.SIGINT) is signal.default_int_handler:
            # End the process as other signals do: transformers would convert an exception during its imports into an
            # error that does not name the signal.
            signal.signal(signal.SIGINT, signal.SIG_DFL)
        from lorameter.trial.serve import serve_once

        serve_once(connection)
    return 0


if __name__ == "__main__":
    exit_quickly(main(sys.argv[1:]))
