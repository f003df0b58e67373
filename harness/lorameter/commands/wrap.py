"""The command `wrap`: runs an unchanged training script, and stores its measurements as a run."""

from __future__ import annotations

import argparse
import contextlib
from collections.abc import Iterator
from typing import Any

from kernels_check import REQUIREMENTS
from kernels_check.terminal import print_stderr
from lorameter.attach.launch import finalize_run, run_command
from lorameter.errors import EXIT_INVALID, UsageError, format_error, shorten
from lorameter.records import codec, store
from lorameter.records.tempdirs import scratch_folder
from lorameter.report.run import describe_run
from lorameter.report.run_view import view_of
from lorameter.report.terminal import console_for, show
from lorameter.studies.script import name_of_words


def run_wrap(options: argparse.Namespace) -> int:
    """Run the command; returns its exit code, 128 plus the number of the signal that ended it, or 4."""
    words = options.words[1:] if options.words[:1] == ["--"] else options.words
    if not words:
        raise UsageError("wrap: no command. Write it behind --, as in `lorameter wrap -- python train.py`.")
    require = read_requirements(options.require)
    runs = store.runs_dir(options.runs_dir, make=True).absolute()
    path, invalid = runs / store.new_run_id(name_of_words(words), runs), True
    with scratch_folder() as folder:
        code = run_command(words, path, require, folder)
        with _report_errors():
            invalid = finalize_run(path, code, folder, required=bool(require))
    if not options.no_report and (path / store.MANIFEST).is_file():
        with _report_errors():  # on standard error: standard output belongs to the command
            show(describe_run(view_of(store.read_run(str(path), runs))), console_for(stderr=True))
    return code or (EXIT_INVALID if invalid and require else code)


@contextlib.contextmanager
def _report_errors() -> Iterator[None]:
    """Report an error in the block, such as a full disk, and continue: the exit code is that of the command."""
    try:
        yield
    except Exception as error:
        print_stderr(f"lorameter: {format_error(error)}")


def read_requirements(given: list[str]) -> dict[str, Any]:
    """Requirements by kernels_check path; a value is parsed as JSON if possible, else it is a text.

    Raises:
        UsageError: the argument is not path=value, the path is unknown, or it does not accept the value.
    """
    requirements: dict[str, Any] = {}
    for entry in given:
        path, equals, value = entry.partition("=")
        if not equals:
            raise UsageError(
                f"wrap: --require {shorten(entry, 60)}: PATH=VALUE is expected, and -- in front of the command. "
                "Write it as in `lorameter wrap --require base.bits=4 -- python train.py`."
            )
        known = REQUIREMENTS.get(path)
        if known is None:
            raise UsageError(f"wrap: --require {shorten(path, 60)}: not known. Known: {', '.join(REQUIREMENTS)}.")
        requirements[path] = value
        with contextlib.suppress(codec.NotJsonError):
            requirements[path] = codec.parse({"True": "true", "False": "false"}.get(value, value))
        if problem := known.problem(requirements[path]):
            raise UsageError(f"wrap: --require {path}={shorten(value, 60)}: {problem}. Mend the value.")
    return requirements
