"""A session of pytest whose reader goes away (`pytest | head -1`) measures to its end, as a run does.

pytest writes its progress on standard output, and would end there with exit code 1, which means a regression.
"""

from __future__ import annotations

import errno

import pytest

from kernels_check.pipes import EXIT_CLOSED_PIPE, EXIT_UNWRITABLE, CapturedStdout


class Output:
    """Takes the place of the stream that pytest's reporter writes on; the exit code says at the end what was lost."""

    def __init__(self) -> None:
        self._session: pytest.Session | None = None
        self._stream: CapturedStdout | None = None

    @pytest.hookimpl(tryfirst=True)
    def pytest_sessionstart(self, session: pytest.Session) -> None:
        """Before the first line is written."""
        reporter = session.config.pluginmanager.get_plugin("terminalreporter")
        screen = getattr(reporter, "_tw", None)
        if screen is not None and hasattr(screen, "_file"):
            self._session, self._stream = session, CapturedStdout(screen._file)
            screen._file = self._stream

    @pytest.hookimpl(trylast=True)
    def pytest_unconfigure(self) -> None:
        """After the last one: pytest returns what the session holds now."""
        if self._session is None or self._stream is None:
            return
        self._stream.flush()
        if self._stream.lost is not None:
            self._stream.drain()
            closed = self._stream.lost.errno == errno.EPIPE
            self._session.exitstatus = EXIT_CLOSED_PIPE if closed else EXIT_UNWRITABLE
