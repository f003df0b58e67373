"""Entry point of the command `lorameter`; Ctrl-C during its imports ends it without a traceback, as with any tool."""

from __future__ import annotations

import signal


def main() -> int:
    """Run the console script; returns its exit code."""
    if signal.getsignal(signal.SIGINT) is signal.default_int_handler:  # a shell may have set it to ignore
        signal.signal(signal.SIGINT, signal.SIG_DFL)
    from lorameter.cli import main as run

    return run()
