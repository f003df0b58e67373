"""Where the command `lorameter` begins: a Ctrl-C while it imports ends it in silence, as it ends any other tool."""

from __future__ import annotations

import signal


def main() -> int:
    """Entry point of the console script; what it returns is its exit code."""
    if signal.getsignal(signal.SIGINT) is signal.default_int_handler:  # a shell may have had it ignored
        signal.signal(signal.SIGINT, signal.SIG_DFL)
    from lorameter.cli import main as run

    return run()
