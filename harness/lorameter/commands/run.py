"""The commands `run`, `ab` and `wrap`, and functions that plan, forecast, measure and resume a study.

`run` measures a study, `ab` measures it on two sides, and `wrap` runs an unchanged training script and stores its
measurements as a run. The other commands that measure, and the pytest plugin, use the functions too.
"""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from kernels_check import REQUIREMENTS
from lorameter.attach.launch import finalize_run, run_command
from lorameter.commands.output import show_result
from lorameter.commands.report import show_ab, show_run
from lorameter.errors import EXIT_INVALID, EXIT_PASS, UsageError, format_error, require, shorten
from lorameter.machine.products import make_target
from lorameter.records import codec, store
from lorameter.records.fileio import scratch_folder
from lorameter.records.record import Notice
from lorameter.records.store import Run
from lorameter.report.blocks import Document
from lorameter.report.estimate import describe_plan
from lorameter.report.live import LiveDisplay
from lorameter.report.phrases import warn_before_run
from lorameter.report.run import describe_run, encode_spending
from lorameter.report.run_view import RunView, make_run_view
from lorameter.report.terminal import console_for, show
from lorameter.run.build_plan import PlanOptions, build_plan
from lorameter.run.feasibility import NOT_HERE
from lorameter.run.forecast import Forecast, forecast
from lorameter.run.measure import measure
from lorameter.run.plan import AB_PHASES, Plan
from lorameter.run.resume import is_finished, restore_plan
from lorameter.run.runner import find_unfinished
from lorameter.run.sites.driver import read_interrupted_run
from lorameter.run.sites.placement import Placement, open_placement
from lorameter.run.workers import IfBusy, open_executor
from lorameter.run.workers.sides import command_sides, name_sides
from lorameter.studies.commands import study_of_command, study_of_engine
from lorameter.studies.peft_experiments import study_of_experiments
from lorameter.studies.protocol import HERE, Protocol
from lorameter.studies.script import OWN, name_of_words, split_command, time_steps
from lorameter.studies.study import Study
from lorameter.studies.study_file import StudyFor, load_study, read_study, read_study_file
from lorameter.studies.workload import LOSSES, SYNTHETIC
from lorameter.terminal import print_stderr
from lorameter.verdicts.calibrate import MAX_ROWS
from lorameter.verdicts.gate import load_policy

ON_RESUME = frozenset(
    "calls study resume runs_dir json max_minutes sites on if_busy verbose trust policy format markdown html".split()
)
"""Options that are allowed with --resume; the run holds its study and plan."""


def apply_overrides(
    study: Study, options: argparse.Namespace, *, effort: str | None = None, replicates: int | None = None,
    until_decided: bool = False,
) -> Study:  # fmt: skip
    """The study with the options' changes; `until_decided`, or else `effort` or `replicates`, apply if the options
    set no other rule.

    Raises:
        UsageError: both replicates and an effort are given, or a value is invalid.
    """
    values = vars(options)
    require(
        not (options.effort and options.replicates is not None),
        "--effort and --replicates both set the replicates. Give one of them.",
    )
    decided = values.get("until_decided")
    other_rule = study.protocol.precision or values.get("precision") or study.protocol.mixed or values.get("mixed")
    if decided is None and until_decided and not other_rule:
        decided = True
    if options.effort or options.replicates is not None or values.get("precision") is not None or decided:
        effort, replicates = options.effort, options.replicates
    return study.with_overrides(
        model=options.model,
        data=options.data,
        effort=effort,
        replicates=replicates,
        precision=values.get("precision"),
        until_decided=decided,
        max_minutes=options.max_minutes,
        allow_disturbed=options.allow_disturbed,
        on=values.get("on", HERE),  # commands without this option measure here
        sites=values.get("sites"),
        mixed=values.get("mixed", False),
    )


def plan_study(study: Study, placement: Placement, runs: Path, wanted: PlanOptions) -> tuple[Plan, tuple[Notice, ...]]:
    """Plan a study for a placement; returns the plan and the notices before the run starts."""
    return build_plan(study, placement.machine, wanted, free_bytes=placement.free_bytes, runs=runs)


def measure_study(
    study: Study,
    placement: Placement,
    options: argparse.Namespace,
    wanted: PlanOptions,
    *,
    policy: Mapping[str, Any] | None = None,
) -> Run:
    """Plan a study and measure it.

    Args:
        study: the study with the options' changes.
        placement: the machines that measure it.
        options: options of the command.
        wanted: what to plan.
        policy: policy of an A/B, stored with the run.
    """
    runs, console = store.runs_dir(options.runs_dir, make=True), console_for(stderr=True)
    plan, notices = plan_study(study, placement, runs, wanted)
    with placement.hold(options.if_busy) as waited:
        if waited:
            plan, notices = plan_study(study, placement, runs, wanted)
        show(warn_before_run(notices), console)
        with LiveDisplay(console, device=placement.machine.device_name) as display:
            return measure(plan, runs=runs, display=display, notices=notices, policy=policy or {}, placement=placement)


def forecast_study(
    study: Study, placement: Placement, options: argparse.Namespace, wanted: PlanOptions
) -> tuple[Document, dict[str, Any]]:
    """Plan a study and forecast the time, memory and disk space of the plan, as a report and as JSON."""
    from lorameter.trial.data.records import describe_data

    runs = store.runs_dir(options.runs_dir)
    plan, notices = plan_study(study, placement, runs, wanted)
    cannot_measure_here = any(notice.code == NOT_HERE for notice in notices)
    executor = None if cannot_measure_here or placement.is_remote else open_executor()
    if_busy: IfBusy = "share" if options.if_busy == "share" else "refuse"  # no wait for an estimate
    expected = forecast(plan, placement.machine, runs, executor, if_busy=if_busy)
    require(expected.replicates != 0, f"{expected.basis}.")
    if cannot_measure_here:  # time and memory on another machine are unknown
        why = "it cannot be measured on this machine"
        expected = Forecast(time_s=None, basis=why, disk_bytes=expected.disk_bytes, unknown=why)
    workload = plan.study.workload
    has_no_data_source = workload.data in (SYNTHETIC, OWN)
    data = None if has_no_data_source else f"{describe_data(workload)}; {LOSSES[workload.loss]}"
    return describe_plan(plan, expected, placement.machine, notices, data), {
        "order": [slot.trial for slot in plan.slots],
        "interleaving": plan.interleaving,
        "why": plan.why,
        **({"dtype": plan.study.dtype} if plan.study.dtype else {}),
        "seed": plan.study.protocol.seed,
        "time_s": expected.time_s,
        "time_basis": expected.basis,
        "replicates": expected.replicates,
        "skipped": expected.skipped,
        "half_width": expected.half_width,
        "detectable": expected.detectable,
        "decided": expected.decided,
        "noise_basis": expected.noise,
        "time_for_3_percent_s": expected.sought_width_s,
        "memory_bytes": expected.memory_bytes,
        "disk_bytes": expected.disk_bytes,
        **({"unknown": expected.unknown} if expected.unknown else {}),
        **({"data": data} if data else {}),
    }


def find_interrupted(options: argparse.Namespace, *, prefix: str = "--") -> Run:
    """The interrupted run that the option `resume` names.

    Raises:
        UsageError, InvalidRunError: the run does not exist or cannot be resumed, or an option cannot be given with it.
    """
    refused = [
        f"{prefix}{'command' if name == 'script' else name.replace('_', '-')}"
        for name, value in vars(options).items()
        if name not in ON_RESUME and value not in (None, False, [])
    ]
    require(
        not refused,
        f"{prefix}resume: {', '.join(refused)} cannot be given, since the run holds its study and plan. Leave the "
        "option out, or measure a new run.",
    )
    study = load_study(options.study).name if options.study else None
    trust = vars(options).get("trust", False)
    return read_interrupted_run(options.resume, store.runs_dir(options.runs_dir), study=study, trust=trust)


def resume(run: Run, options: argparse.Namespace) -> Run:
    """Measure the rest of a run, if there is any, in its original placement or in that of `--on` and `--sites`.

    Raises:
        UsageError, InvalidRunError: the run cannot be resumed here.
    """
    name, study = run.manifest.run, read_study(run)
    if is_finished(run):
        print_stderr(f"run {name} is complete: nothing is left to be measured.")
        return run
    relocated = study.with_overrides(on=options.on, sites=options.sites, mixed=study.protocol.mixed)
    with open_placement(relocated, options.runs_dir) as placement:
        facts = None if run.manifest.sides else placement.facts
        plan = restore_plan(run, facts, remote=placement.is_remote, max_minutes=options.max_minutes)
        unfinished = find_unfinished(plan, run.records, whole=placement.launcher is not None)
        remaining = [slot.trial for group in unfinished for slot in group.slots]
        state = f"{len(plan.slots) - len(remaining)} of {len(plan.slots)} trials are kept"
        print_stderr(f"run {name}: {state}, {len(remaining)} are left to be measured.")
        with placement.hold(options.if_busy), LiveDisplay(console_for(stderr=True)) as display:
            return measure(plan, runs=run.path.parent, display=display, resume=run, placement=placement)


def run_study(options: argparse.Namespace) -> int:
    """Measure a study, or the rest of a run, and print its report; the exit code says whether the run is valid."""
    if options.resume:
        return _show(resume(find_interrupted(options), options), options)
    _refuse_without("--resume", options, "trust")
    require(
        options.study or options.peft_experiments is not None,
        "run: no study named. Give one, as in `lorameter run lora-or-qlora`, or --resume RUN.",
    )
    study_for = read_requested_study(options)
    with open_placement(apply_overrides(study_for(None), options), options.runs_dir) as placement:
        study = apply_overrides(study_for(make_target(placement.machine)), options)
        wanted = PlanOptions(
            select=options.variant,
            phases=options.phase or study.protocol.phases,
            interleaving=options.interleave,
            shown_only=options.dry_run,
        )
        if options.dry_run:
            return _show_forecast(study, placement, options, wanted)
        run = measure_study(study, placement, options, wanted)
    return _show(run, options)


def _show_forecast(study: Study, placement: Placement, options: argparse.Namespace, wanted: PlanOptions) -> int:
    document, data = forecast_study(study, placement, options, wanted)
    show_result(options, document, lambda: data)
    return EXIT_PASS


def read_requested_study(options: argparse.Namespace) -> StudyFor:
    """The study that the options name, from its own variants or from a script, for any machine.

    Raises:
        UsageError: the study does not exist, or options exclude each other.
    """
    if options.peft_experiments is not None:
        require(
            not options.study and options.script is None,
            "--peft-experiments: it is a study of its own. Leave the study and --command out.",
        )
        experiments = study_of_experiments(options.peft_experiments, options.select or (), quality=options.quality)
        return lambda target: experiments
    _refuse_without("--peft-experiments", options, "select", "quality")
    if options.script is None:
        _refuse_without("--command", options, "cwd", "steps")
        return read_study_file(options.study, profile=options.profile)
    require(
        options.profile is None,
        f"--profile {options.profile}: a script has no profile, since it brings its own model and data. Leave it out.",
    )
    require(not options.variant, "--variant: both are needed, with the engine and without it. Leave it out.")
    study = study_of_engine(load_study(options.study), options.script, cwd=options.cwd or "")
    if options.steps is not None:
        study = dataclasses.replace(study, protocol=time_steps(study.protocol, options.steps))
    return lambda target: study


def _refuse_without(needed: str, options: argparse.Namespace, *names: str) -> None:
    """Raise `UsageError` for options that have no meaning without another option."""
    for name in names:
        require(getattr(options, name) in (None, False), f"--{name}: it belongs to {needed}. Leave it out.")


def _show(run: Run, options: argparse.Namespace) -> int:
    """Print the report of a run, in the same way as its command."""
    if run.manifest.sides:
        return show_ab(run, options)
    view = make_run_view(run)
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
        0 <= options.inject_rows <= MAX_ROWS,
        f"--inject-rows = {options.inject_rows}: not a valid amount of work. Use 0 to {MAX_ROWS}.",
    )
    policy = load_policy(options.policy)  # before the measurement
    if options.resume:
        return _show(resume(find_interrupted(options), options), options)
    _refuse_without("--resume", options, "trust")
    commands = study_of_commands(options)
    require(
        commands is not None or options.study is not None,
        "ab: STUDY is missing. Give it, or resume an interrupted A/B by --resume RUN.",
    )
    needs_sides = options.base_command is None
    for name in ("base", "candidate") if needs_sides else ():
        require(
            getattr(options, name) is not None,
            f"ab: --{name} SIDE is missing. Give it, or resume an interrupted A/B by --resume RUN.",
        )
    study_for: StudyFor = read_study_file(options.study) if commands is None else lambda target: commands
    study = apply_overrides(study_for(None), options, effort="standard", until_decided=True)
    if needs_sides:  # here, so that a wrong side is refused before a job waits in a queue
        side_names = {"base": options.base, "candidate": options.candidate}
        sides = name_sides(side_names, Path.cwd(), study.protocol, slowdown_rows=options.inject_rows)  # type: ignore[arg-type]
    else:
        sides = command_sides(str(study.variants[0].setting("command")), options.candidate_command)
    with open_placement(study, options.runs_dir) as placement:
        study = study_for(make_target(placement.machine))
        study = apply_overrides(study, options, effort="standard", until_decided=True)
        phases = AB_PHASES if {*AB_PHASES} <= {*study.phases} else study.protocol.phases
        wanted = PlanOptions(select=options.variant, sides=sides, phases=options.phase or phases)
        if options.dry_run:
            return _show_forecast(study, placement, options, wanted)
        stored_policy = codec.to_json(policy) if options.policy else None
        run = measure_study(study, placement, options, wanted, policy=stored_policy)
    return _show(run, options)


def study_of_commands(options: argparse.Namespace) -> Study | None:
    """The study of the command, or of the two commands, of an A/B; None without commands.

    Raises:
        UsageError: an option is missing, or two options contradict each other.
    """
    base, candidate, shared_command = options.base_command, options.candidate_command, options.script
    if base is candidate is shared_command is None:
        _refuse_without("--command, --base-command and --candidate-command", options, "cwd", "steps")
        return None
    missing = "--base-command" if base is None else "--candidate-command"
    for refused, message in (
        (options.study, "ab: a study and a command are given. A command is a study by itself: leave one of them out."),
        (
            options.inject_rows,
            "--inject-rows: extra work goes into adapters of lorameter's own, and a script has none of them.",
        ),
        (options.variant, "--variant: a command is the one variant. Leave it out."),
        (
            shared_command is not None and (base is not None or candidate is not None),
            "--command is for both sides, but each side also has its own command. Give one of the two.",
        ),
        (
            shared_command is None and None in (base, candidate),
            f"ab: {missing} COMMAND is missing. Give it, or one --command on the sides --base and --candidate.",
        ),
        (
            shared_command is None and (options.base or options.candidate),
            "--base and --candidate are sides for one --command. Two commands are the sides themselves: leave them "
            "out.",
        ),
    ):
        require(not refused, message)
    protocol = time_steps(Protocol(phases=("train",)), 16 if options.steps is None else options.steps)
    command = base if shared_command is None else shared_command
    study = study_of_command(command, cwd=options.cwd or "", protocol=protocol)
    if candidate is None:
        return study
    split_command("--candidate-command", candidate)
    return dataclasses.replace(study, title=f"{base} against {candidate}")


def run_wrap(options: argparse.Namespace) -> int:
    """Run the command; returns its exit code, 128 plus the number of the signal that ended it, or 4."""
    words = options.words[1:] if options.words[:1] == ["--"] else options.words
    require(words, "wrap: no command. Write it after --, as in `lorameter wrap -- python train.py`.")
    required = read_requirements(options.require)
    runs = store.runs_dir(options.runs_dir, make=True).absolute()
    path, invalid = runs / store.new_run_id(name_of_words(words), runs), True
    with scratch_folder() as folder:
        code = run_command(words, path, required, folder)
        with _report_errors():
            invalid = finalize_run(path, code, folder, required=bool(required))
    if not options.no_report and (path / store.MANIFEST).is_file():
        with _report_errors():  # on standard error: standard output belongs to the command
            show(describe_run(make_run_view(store.read_run(str(path), runs))), console_for(stderr=True))
    return code or (EXIT_INVALID if invalid and required else code)


@contextlib.contextmanager
def _report_errors() -> Iterator[None]:
    """Report an error in the block, such as a full disk, and continue: the exit code is that of the command."""
    try:
        yield
    except Exception as error:
        print_stderr(f"lorameter: {format_error(error)}")


def read_requirements(given: list[str]) -> dict[str, Any]:
    """Requirements by kernels_check path; a value is parsed as JSON if possible, and is text otherwise.

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
        with contextlib.suppress(codec.NotReadableError):
            requirements[path] = codec.parse({"True": "true", "False": "false"}.get(value, value))
        if problem := REQUIREMENTS[path].problem(requirements[path]):
            raise UsageError(f"wrap: --require {path}={shorten(value, 60)}: {problem}. Correct the value.")
    return requirements
