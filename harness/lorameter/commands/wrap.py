"""The command that runs a training script as it is, and makes a run of what it measures meanwhile."""

from __future__ import annotations

import argparse
import contextlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from kernels_check.terminal import print_stderr
from lorameter.errors import EXIT_INVALID, UsageError, said_by, shorten
from lorameter.records import codec


def add_commands(commands: Any, common: Any) -> None:
    """The parser of `wrap`. What it prints on standard output is the command's, so it has no option `--json`."""
    wrap = commands.add_parser(
        "wrap",
        help="measure a training script while it runs",
        description="Run a command as it is and measure the training in it: `lorameter wrap -- python train.py`. Its "
        "output, its exit code and signals to it pass through; the run is stored in the runs directory; the report "
        "is printed to stderr.",
    )
    wrap.add_argument(
        "--require",
        metavar="PATH=VALUE",
        nargs="+",
        action="extend",
        default=[],
        help="required paths, such as attention.backend=flash; if one is not active, the run is invalid, and the "
        "exit code is 4 where the command's is 0",
    )
    wrap.add_argument("--runs-dir", metavar="DIR", help="default: $LORAMETER_RUNS or ./.lorameter/runs")
    wrap.add_argument("--no-report", action="store_true", help="print no report")
    wrap.add_argument(
        "words", metavar="-- COMMAND", nargs=argparse.REMAINDER, help="the command, as typed without lorameter"
    )
    wrap.set_defaults(command=run_wrap)


def run_wrap(options: argparse.Namespace) -> int:
    """Run the command; the exit code is its own, 128 and the number of the signal that ended it, or 4."""
    from lorameter.attach.launch import finalize_run, run_command
    from lorameter.records import store
    from lorameter.records.tempdirs import scratch_folder
    from lorameter.studies.script import name_of_words

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
        with _report_errors():
            _report(path)
    return code or (EXIT_INVALID if invalid and require else code)


@contextlib.contextmanager
def _report_errors() -> Iterator[None]:
    """Meanwhile an error, as of a full disk, is told and ends nothing: the exit code is the command's."""
    try:
        yield
    except Exception as error:
        print_stderr(f"lorameter: {said_by(error)}")


def read_requirements(given: list[str]) -> dict[str, Any]:
    """The paths of kernels_check and their values; a value is JSON where it reads as such, else a text.

    Raises:
        UsageError: no path=value, an unknown path, or a value that it does not take.
    """
    from kernels_check import REQUIREMENTS

    found: dict[str, Any] = {}
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
        found[path] = _value(value)
        if problem := known.problem(found[path]):
            raise UsageError(f"wrap: --require {path}={shorten(value, 60)}: {problem}. Mend the value.")
    return found


def _value(text: str) -> Any:
    try:
        return codec.parse({"True": "true", "False": "false"}.get(text, text))
    except codec.NotJsonError:
        return text


def _report(path: Path) -> None:
    """The report of the run, on standard error: standard output is the command's."""
    from lorameter.records import store
    from lorameter.report.run import describe_run
    from lorameter.report.run_view import view_of
    from lorameter.report.terminal import console_for, show

    run = store.read_run(str(path), path.parent)
    show(describe_run(view_of(run)), console_for(stderr=True))
