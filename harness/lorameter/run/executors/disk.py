"""Where the files of a run's trials lie on this machine: logs with the run, all else in a temporary folder."""

from __future__ import annotations

import contextlib
import shutil
from pathlib import Path

from lorameter.errors import InvalidRunError, redact
from lorameter.records.tempdirs import scratch_folder
from lorameter.run.executors import TrialFiles


class Disk:
    """Where a run's files lie, by absolute paths: a host may run in another folder."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder.resolve()
        self.logs = self.folder / "logs"
        self.logs.mkdir(parents=True, exist_ok=True)
        self._stack = contextlib.ExitStack()
        self.scratch = self._stack.enter_context(scratch_folder())

    def make_place(self, trial: str, log: str) -> TrialFiles:
        """A folder for a trial, and the name of its log."""
        scratch = self.scratch / trial
        scratch.mkdir(parents=True, exist_ok=True)
        return TrialFiles(scratch=str(scratch), log_path=str(self.logs / f"{log}.log"))

    def fetch(self, trial: str, name: str, folder: Path) -> Path:
        """Move a file of a trial; where it does not fit, no part of it is left."""
        try:
            return Path(shutil.move(self.scratch / trial / name, folder / name))
        except OSError:
            (folder / name).unlink(missing_ok=True)
            raise

    def clear(self, trial: str) -> None:
        """Remove the folder of a trial."""
        shutil.rmtree(self.scratch / trial, ignore_errors=True)

    def close(self) -> None:
        """Remove what was not to be kept, and redact the logs."""
        self._stack.close()
        redact_logs(self.logs)


class DiskExecutor:
    """The part of an `Executor` that knows where files lie."""

    _disk: Disk | None = None
    _threads = 1

    def start(self, folder: Path, threads: int) -> None:
        """Make the folders of a run; further processes compute with so many threads."""
        self._threads, self._disk = threads, Disk(folder)

    def make_place(self, trial: str, log: str) -> TrialFiles:
        """In a temporary folder of this executor; the log lies with the run from the start."""
        return self._required_disk().make_place(trial, log)

    def fetch(self, trial: str, name: str, folder: Path) -> Path:
        """Moved: nothing else of the trial needs it."""
        return self._required_disk().fetch(trial, name, folder)

    def clear_place(self, trial: str) -> None:
        """Adapters and compile caches of a long run would fill the disk."""
        self._required_disk().clear(trial)

    def close(self) -> None:
        """Remove what was not to be kept."""
        if self._disk is not None:
            self._disk.close()
            self._disk = None

    def _required_disk(self) -> Disk:
        if self._disk is None:
            raise InvalidRunError("the executor is not started. Call start() first.")
        return self._disk


def redact_logs(folder: Path) -> None:
    """Leave credentials out of logs. Processes write their logs themselves, so this is done when they have ended.

    A file is changed in place: a process of another executor may still have it open, and appends to it.
    """
    for path in sorted(folder.glob("*.log")):
        with contextlib.suppress(OSError), path.open("r+b") as file:
            text = file.read().decode(errors="surrogateescape")
            if (redacted := redact(text)) != text:
                file.seek(0)
                file.write(redacted.encode(errors="surrogateescape"))
                file.truncate()
