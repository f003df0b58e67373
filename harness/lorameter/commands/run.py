"""The commands that measure a study or two sides of one: `run` and `ab`.

The command `wrap`: runs an unchanged training script, and stores its measurements as a run.
"""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from kernels_check import REQUIREMENTS
from kernels_check.terminal import print_stderr
from lorameter.attach.launch import finalize_run, run_command
from lorameter.commands.measure import find_interrupted, measure_study, override, resume
from lorameter.commands.report import show_ab, show_run
from lorameter.errors import EXIT_INVALID, EXIT_PASS, UsageError, format_error, require, shorten
from lorameter.records import codec, store
from lorameter.records.fileio import scratch_folder
from lorameter.records.store import Run
from lorameter.report.phrases import warn_before_run
from lorameter.report.run import describe_run, encode_spending
from lorameter.report.run_view import RunView, view_of
from lorameter.report.terminal import console_for, show
from lorameter.run.plan import AB_PHASES
from lorameter.run.sites.placement import open_placement
from lorameter.run.workers.sides import command_sides, name_sides
from lorameter.studies.peft_experiments import study_of_experiments
from lorameter.studies.protocol import Protocol
from lorameter.studies.script import name_of_words, split_command, time_steps
from lorameter.studies.script_study import study_of_command, study_of_engine
from lorameter.studies.study import Study
from lorameter.studies.study_file import load_study
from lorameter.verdicts.calibrate import MOST_ROWS
from lorameter.verdicts.gate import load_policy


def run_study(options: argparse.Namespace) -> int:
    """Measure a study, or the rest of a run, and print its report; the exit code says whether the run is valid."""
    if options.resume:
        return _show(resume(find_interrupted(options), options), options)
    require(
        options.study or options.peft_experiments is not None,
        "run: no study named. Give one, as in `lorameter run lora-or-qlora`, or --resume RUN.",
    )
    with open_placement(override(load_requested_study(options), options), options.runs_dir) as placement:
        study = override(load_requested_study(options, placement.machine.kind), options)
        run = measure_study(
            study,
            placement,
            options,
            select=options.variant,
            phases=options.phase or study.protocol.phases,
            interleaving=options.interleave,
            shown_only=options.dry_run,
        )
    return _show(run, options)


def load_requested_study(options: argparse.Namespace, device: str = "") -> Study:
    """The study that the options name, from its own variants or from a script; `device` selects its profile.

    Raises:
        UsageError: the study does not exist, or options exclude each other.
    """
    if options.peft_experiments is not None:
        require(
            not options.study and options.script is None,
            "--peft-experiments: it is a study of its own. Leave the study and --command out.",
        )
        return study_of_experiments(options.peft_experiments, options.select or (), quality=options.quality)
    _refuse_without("--peft-experiments", options, "select", "quality")
    if options.script is None:
        _refuse_without("--command", options, "cwd", "steps")
        return load_study(options.study, profile=options.profile, device=device)
    require(
        options.profile is None,
        f"--profile {options.profile}: a script has none: it brings model and data. Leave it out.",
    )
    require(not options.variant, "--variant: both are needed, with the engine and without it. Leave it out.")
    study = study_of_engine(load_study(options.study), options.script, cwd=options.cwd or "")
    if options.steps is None:
        return study
    return dataclasses.replace(study, protocol=time_steps(study.protocol, options.steps))


def _refuse_without(needed: str, options: argparse.Namespace, *names: str) -> None:
    """Raise `UsageError` for options that have no meaning without another option."""
    for name in names:
        require(getattr(options, name) in (None, False), f"--{name}: it belongs to {needed}. Leave it out.")


def _show(run: Run | None, options: argparse.Namespace) -> int:
    """Print the report of a run, if one was measured, in the same way as its command."""
    if run is None:
        return EXIT_PASS
    if run.manifest.sides:
        return show_ab(run, options)
    view = view_of(run)
    if options.json:
        show(warn_before_run(view.notices), console_for(stderr=True))
    return show_run(view, options, lambda: _encode(view))


def _encode(view: RunView) -> dict[str, Any]:
    controls = {f"{one.phase} on {one.site}" if one.site else one.phase: one.control for one in view.tables}
    return {
        "run": view.run.manifest.run,
        "path": str(view.run.path),
        "status": "ok" if view.valid else "invalid",
        "invalid": view.validity.invalid,
        "control": controls,
        "trials": view.counts,
        **encode_spending(view.run.manifest.spending),
    }


def run_ab(options: argparse.Namespace) -> int:
    """Measure an A/B, print it, and return the exit code of the verdicts under the policy."""
    require(
        0 <= options.inject_rows <= MOST_ROWS,
        f"--inject-rows = {options.inject_rows}: no amount of work. Use 0 to {MOST_ROWS}.",
    )
    policy = load_policy(options.policy)  # before the measurement
    if options.resume:
        interrupted = find_interrupted(options)
        if not interrupted.manifest.sides:
            name = interrupted.manifest.run
            raise UsageError(f"run {name} is no A/B. Resume: lorameter run --resume {name}")
        return _show(resume(interrupted, options), options)
    of_commands = study_of_commands(options)
    require(
        of_commands is not None or options.study is not None,
        "ab: STUDY is missing. Give it, or resume an interrupted A/B by --resume RUN.",
    )
    needs_sides = options.base_command is None
    for name in ("base", "candidate") if needs_sides else ():
        require(
            getattr(options, name) is not None,
            f"ab: --{name} SIDE is missing. Give it, or resume an interrupted A/B by --resume RUN.",
        )
    study = override(of_commands or load_study(options.study), options, effort="standard")
    if needs_sides:  # before a job waits in a queue
        words = {"base": options.base, "candidate": options.candidate}
        sides = name_sides(words, Path.cwd(), study.protocol, slowdown_rows=options.inject_rows)  # type: ignore[arg-type]
    else:
        sides = command_sides(study.scripts[0].command, options.candidate_command)
    with open_placement(study, options.runs_dir) as placement:
        loaded = of_commands or load_study(options.study, device=placement.machine.kind)
        study = override(loaded, options, effort="standard")
        run = measure_study(
            study,
            placement,
            options,
            policy=codec.to_json(policy) if options.policy else None,
            select=options.variant,
            sides=sides,
            phases=options.phase or (study.protocol.phases if study.trains_only else AB_PHASES),
        )
    return _show(run, options)


def study_of_commands(options: argparse.Namespace) -> Study | None:
    """The study of the command, or of the two commands, of an A/B; None without commands.

    Raises:
        UsageError: an option is missing, or two options contradict each other.
    """
    base, candidate, one = options.base_command, options.candidate_command, options.script
    if base is candidate is one is None:
        _refuse_without("--command, --base-command and --candidate-command", options, "cwd", "steps")
        return None
    require(
        not options.study, "ab: a study and a command are given. A command is a study by itself: leave one of them out."
    )
    require(
        not options.inject_rows,
        "--inject-rows: extra work goes into adapters of lorameter's own, and a script has none of them.",
    )
    require(not options.variant, "--variant: a command is the one variant. Leave it out.")
    require(
        one is None or (base is None and candidate is None),
        "--command is for both sides, but each side also has its own command. Give one of the two.",
    )
    if one is None and (base is None or candidate is None):
        missing = "--base-command" if base is None else "--candidate-command"
        raise UsageError(
            f"ab: {missing} COMMAND is missing. Give it, or one --command on the sides --base and --candidate."
        )
    require(
        one is not None or (not options.base and not options.candidate),
        "--base and --candidate are sides for one --command. Two commands are the sides themselves: leave them out.",
    )
    protocol = time_steps(Protocol(phases=("train",)), 16 if options.steps is None else options.steps)
    command = one if one is not None else base
    study = study_of_command(command, cwd=options.cwd or "", protocol=protocol)
    if candidate is None:
        return study
    split_command("--candidate-command", candidate)
    return dataclasses.replace(study, title=f"{base} against {candidate}")


def run_wrap(options: argparse.Namespace) -> int:
    """Run the command; returns its exit code, 128 plus the number of the signal that ended it, or 4."""
    words = options.words[1:] if options.words[:1] == ["--"] else options.words
    require(words, "wrap: no command. Write it behind --, as in `lorameter wrap -- python train.py`.")
    required = read_requirements(options.require)
    runs = store.runs_dir(options.runs_dir, make=True).absolute()
    path, invalid = runs / store.new_run_id(name_of_words(words), runs), True
    with scratch_folder() as folder:
        code = run_command(words, path, required, folder)
        with _report_errors():
            invalid = finalize_run(path, code, folder, required=bool(required))
    if not options.no_report and (path / store.MANIFEST).is_file():
        with _report_errors():  # on standard error: standard output belongs to the command
            show(describe_run(view_of(store.read_run(str(path), runs))), console_for(stderr=True))
    return code or (EXIT_INVALID if invalid and required else code)


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
        require(
            equals,
            f"wrap: --require {shorten(entry, 60)}: PATH=VALUE is expected, and -- in front of the command. "
            "Write it as in `lorameter wrap --require base.bits=4 -- python train.py`.",
        )
        require(
            path in REQUIREMENTS, f"wrap: --require {shorten(path, 60)}: not known. Known: {', '.join(REQUIREMENTS)}."
        )
        requirements[path] = value
        with contextlib.suppress(codec.NotJsonError):
            requirements[path] = codec.parse({"True": "true", "False": "false"}.get(value, value))
        if problem := REQUIREMENTS[path].problem(requirements[path]):
            raise UsageError(f"wrap: --require {path}={shorten(value, 60)}: {problem}. Mend the value.")
    return requirements
