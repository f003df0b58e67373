"""One pytest session over one study: measured once after collection, replayed in each test, reported at the end."""

from __future__ import annotations

import sys
from collections.abc import Callable, Collection
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest

from kernels_check.pipes import BestEffortStderr
from kernels_check.terminal import escape_control_chars
from lorameter.commands.output import check_page, save_run_page
from lorameter.commands.pytest_clock import ReplayClock
from lorameter.errors import LorameterError, UsageError

if TYPE_CHECKING:
    from lorameter.machine.provenance import MachineFacts
    from lorameter.records.record import Notice, TrialRecord
    from lorameter.records.store import Run
    from lorameter.report.blocks import Document
    from lorameter.run.plan import Plan
    from lorameter.run.sites.placement import Placement
    from lorameter.run.workers import Executor
    from lorameter.studies.study import Study
    from lorameter.verdicts.gate import GateResult


PLUGIN = "lorameter-session"
DEFAULT_STUDY = "lora-or-qlora"
HERE = "here"
"""As `lorameter.studies.placement` has it, which is not imported in projects that do not use the plugin."""
DRY = "--lorameter-dry-run: the plan is shown at the end, and nothing was measured"
NOTHING_MEASURED = "--benchmark-disable: nothing was measured, so nothing was stored and nothing can be replayed"


class Session:
    """One pytest session over one study: measures once after collection, replays in each test, reports at the end."""

    def __init__(self, config: pytest.Config) -> None:
        from lorameter.commands.pytest_gate import load_gate
        from lorameter.commands.pytest_resume import load_resumed

        self._config = config
        self._run: Run | None = None
        self._disabled = bool(config.getoption("benchmark_disable")) and not config.getoption("benchmark_enable")
        self._skipped = bool(config.getoption("benchmark_skip")) and not config.getoption("benchmark_only")
        self._judged: GateResult | str | None = None
        self._html: str | None = config.getoption("--lorameter-html")
        self._dry = bool(config.getoption("--lorameter-dry-run"))
        self._planned: Document | None = None
        with _usage_errors():
            check_page(self._html, "--lorameter-html")
            self._resumed = load_resumed(config)
            self._study = self._load("")
            self._facts: MachineFacts | None = None
            """Of where it is measured, if that is another machine."""
            if self._study.protocol.on == HERE:  # else the profile is that of what is found there
                self._study = self._load(self._executor().machine().kind)
            self._gate = load_gate(config, measures=not (self._disabled or self._skipped or self._dry))

    def pytest_generate_tests(self, metafunc: pytest.Metafunc) -> None:
        """A test for each variant of the study."""
        if metafunc.definition.get_closest_marker("lorameter") and "variant_name" in metafunc.fixturenames:
            names = [variant.name for variant in self._study.variants]
            if self._resumed is not None:
                names = [name for name in names if name in self._resumed.variants]
            metafunc.parametrize("variant_name", names)

    def pytest_collection_modifyitems(self, items: list[pytest.Item]) -> None:
        """Give each test its clock and its phase as the group of its table; no test of what a resumed run, a script
        or several ranks have not."""
        phases: Collection[str] | None = self._study.protocol.phases if self._study.trains_only else None
        if self._resumed is not None:
            phases = self._resumed.phases
        if phases is not None:
            lacking = [item for item in items if _phase_of(item) not in (None, *phases)]
            self._config.hook.pytest_deselected(items=lacking)
            items[:] = [item for item in items if item not in lacking]
        for item in items:
            if phase := _phase_of(item):
                item.add_marker(pytest.mark.benchmark(timer=ReplayClock(), group=phase, warmup=False))

    @pytest.hookimpl(tryfirst=True)
    def pytest_runtestloop(self, session: pytest.Session) -> None:
        """Measure what the selected tests need, once, before the first of them runs; with --benchmark-disable only see
        whether it could be."""
        items = [(item, phase) for item in session.items if (phase := _phase_of(item))]
        collecting = self._config.option.collectonly or session.testsfailed
        if not items or self._skipped or collecting:
            return
        names = [str(item.callspec.params["variant_name"]) for item, _ in items]  # type: ignore[attr-defined]
        phases = {phase for _, phase in items}
        with _usage_errors(), self._opened() as placement:
            if placement.is_remote:
                self._facts, self._study = placement.facts, self._load(placement.machine.kind)
            if self._gate is not None:
                from lorameter.machine.provenance import fingerprint, fingerprint_fields

                facts = self._provenance()
                self._gate.prepare(self._study, fingerprint_fields(facts), fingerprint(facts))
            if self._dry:
                self._planned = self._foresee(names, phases, placement)
            elif not self._disabled:
                self._run = self._measure(names, phases, placement)
            elif self._resumed is None and self._study.protocol.on == HERE:
                self._plan(names, phases, placement, make=False)

    @pytest.fixture
    def replay(self, request: pytest.FixtureRequest, variant_name: str) -> Callable[[], None]:
        """Hand this test's recorded samples to pytest-benchmark; fails where a trial has no result."""
        if self._dry:
            pytest.skip(DRY)
        benchmark = request.getfixturevalue("benchmark")
        phase = _phase_of(request.node)
        marker = request.node.get_closest_marker("benchmark")

        def replayed() -> None:
            from lorameter.records.metrics import PRIMARY
            from lorameter.verdicts.benchmark_files import extra_info
            from lorameter.verdicts.series import group_trials

            if self._disabled:
                benchmark(_nothing)  # its fixture would warn that nobody has used it
                pytest.skip(NOTHING_MEASURED)
            if self._run is None or phase is None:
                pytest.fail("nothing was measured for this test; is it marked with lorameter(phase)?", pytrace=False)
            series = group_trials(self._run.records)[variant_name, "variant"]
            failed = [record for record in series.records if record.status != "ok"]
            if failed:
                pytest.fail("\n".join(_failure(record, self._run.path) for record in failed), pytrace=False)
            metric = PRIMARY[phase]  # type: ignore[index]
            if not series.measuring(metric):
                pytest.fail(f"no trial of {variant_name} measured {metric}, although all are ok", pytrace=False)
            benchmark.extra_info.update(extra_info(self._run, series, phase, metric))
            durations = tuple(sample for trial in series.trials(metric) for sample in trial)
            marker.kwargs["timer"].load(durations)
            benchmark.pedantic(_nothing, rounds=len(durations), iterations=1)

        return replayed

    @pytest.hookimpl(tryfirst=True)
    def pytest_terminal_summary(self, terminalreporter: pytest.TerminalReporter) -> None:
        """The report; before pytest-benchmark's own table, which may end in an exception (--benchmark-compare-fail)."""
        if isinstance(self._judged, str):
            terminalreporter.section("lorameter gate")
            terminalreporter.write(self._judged, flush=True)
        if self._planned is not None:
            _show(terminalreporter, "lorameter plan", self._planned)
        if self._disabled:
            terminalreporter.write_line(f"lorameter: {NOTHING_MEASURED}")
        if self._run is None:
            return
        from lorameter.report.comparison import describe_gate
        from lorameter.report.run import describe_run
        from lorameter.report.run_view import view_of

        view = view_of(self._run)
        said = describe_run(view)
        _show(terminalreporter, "lorameter", said)
        with _usage_errors():
            save_run_page(self._html, self._run, view, said)
        if self._judged is not None and not isinstance(self._judged, str):
            _show(terminalreporter, "lorameter gate", describe_gate(self._judged))

    @pytest.hookimpl(tryfirst=True)
    def pytest_sessionfinish(self, session: pytest.Session) -> None:
        """A run that is invalid as a whole, or that its gate does not let pass, is no pass although each test is."""
        if self._gate is not None and not self._config.option.collectonly:
            self._judged = self._gate.judged(self._run)
            passed = not isinstance(self._judged, str) and self._judged.passed
            if not passed and session.exitstatus == pytest.ExitCode.OK:
                session.exitstatus = pytest.ExitCode.TESTS_FAILED
        if self._run is None:
            return
        from lorameter.verdicts.validity import run_validity

        if not run_validity(self._run, self._study).valid and session.exitstatus == pytest.ExitCode.OK:
            session.exitstatus = pytest.ExitCode.TESTS_FAILED

    def pytest_benchmark_update_machine_info(self, machine_info: dict[str, Any]) -> None:
        """Device, libraries and workload, as far as two runs must agree on them to be compared."""
        from lorameter.machine.provenance import fingerprint_fields

        machine_info["lorameter"] = fingerprint_fields(self._provenance())

    def pytest_benchmark_compare_machine_info(
        self, machine_info: dict[str, Any], compared_benchmark: dict[str, Any]
    ) -> None:
        """Refuse to set unlike machines, libraries or workloads beside each other, and name what differs."""
        from lorameter.verdicts.benchmark_files import unlike

        option = "--benchmark-compare"
        with _usage_errors():
            if different := unlike(self._study, machine_info["lorameter"], compared_benchmark, option):
                said = f"{option}: not comparable: {'; '.join(different)}."
                raise UsageError(f"{said} Measure the base again on this machine.")

    def pytest_benchmark_update_json(self, benchmarks: list[Any], output_json: dict[str, Any]) -> None:
        """`--benchmark-save` alone drops the durations; raw samples are always kept."""
        data = {bench.fullname: bench.stats.data for bench in benchmarks}
        for entry in output_json["benchmarks"]:
            if entry["fullname"] in data:
                entry["stats"].setdefault("data", data[entry["fullname"]])
        if self._run is not None:
            from lorameter.verdicts.benchmark_files import about_run

            output_json["lorameter"] = about_run(self._run)

    def _opened(self) -> AbstractContextManager[Placement]:
        """Where it is measured; for what measures nothing no cluster is asked."""
        from lorameter.run.sites.gpus import check_spreadable
        from lorameter.run.sites.placement import Placement, open_placement

        place = self._study.protocol.place
        if place.mixed:
            raise UsageError(
                f"{place.said}, mixed: pytest-benchmark has one row for a variant, and each site has its own. Measure "
                "it by `lorameter run`."
            )
        nothing = self._disabled or (self._resumed is not None and self._resumed.is_finished)
        if nothing and place.on != HERE:
            check_spreadable(self._study, place)
            return nullcontext(Placement())
        return open_placement(self._study, self._config.getoption("--lorameter-runs-dir"))

    def _load(self, device: str) -> Study:
        from lorameter.studies.study_file import load_study

        option = self._config.getoption
        place = {"on": option("--lorameter-on"), "sites": option("--lorameter-sites")}
        if self._resumed is not None:
            return self._resumed.study.with_overrides(**place)
        profile = option("--lorameter-profile")
        study = load_study(option("--lorameter-study") or DEFAULT_STUDY, profile=profile, device=device)
        return study.with_overrides(
            model=option("--lorameter-model"),
            data=option("--lorameter-data"),
            effort=option("--lorameter-effort"),
            replicates=option("--lorameter-replicates"),
            precision=option("--lorameter-precision"),
            max_minutes=option("--lorameter-max-minutes"),
            allow_disturbed=option("--lorameter-allow-disturbed"),
            **place,
        )

    def _measure(self, names: list[str], phases: set[str], placement: Placement) -> Run:
        from lorameter.commands.measure import display_of
        from lorameter.report.live import LiveDisplay
        from lorameter.report.notices import warn_before_run
        from lorameter.report.terminal import console_for, show
        from lorameter.run.measure import measure

        console = console_for(BestEffortStderr(sys.stderr))
        held = placement.hold(self._config.getoption("--lorameter-if-busy"))
        if self._resumed is not None:
            with held, LiveDisplay(console) as display:
                return self._resumed.measure(placement, display)
        plan, notices, runs = self._plan(names, phases, placement, make=True)
        show(warn_before_run(notices), console)
        with held, display_of(plan, placement.machine, runs, console) as display:
            return measure(plan, runs=runs, display=display, notices=notices, placement=placement)

    def _foresee(self, names: list[str], phases: set[str], placement: Placement) -> Document:
        """The plan of the session and what it will take. Raises `UsageError` for what cannot be measured here."""
        from lorameter.report.estimate import describe_plan
        from lorameter.run.forecast import forecast

        if self._resumed is not None:
            raise UsageError("--lorameter-dry-run: a run that is resumed has its plan. Leave one of the two out.")
        plan, notices, runs = self._plan(names, phases, placement, make=False)
        return describe_plan(plan, forecast(plan, placement.machine, runs), placement.machine, notices)

    def _plan(
        self, names: list[str], phases: set[str], placement: Placement, *, make: bool
    ) -> tuple[Plan, tuple[Notice, ...], Path]:
        """What the tests need, and the folder of runs, to be made or not. Raises `UsageError` for what cannot be
        measured there."""
        from lorameter.records import store
        from lorameter.run.build_plan import build_plan

        runs = store.runs_dir(self._config.getoption("--lorameter-runs-dir"), make=make)
        plan, notices = build_plan(
            self._study,
            placement.machine,
            free_bytes=placement.free_bytes,
            select=names,
            phases=sorted(phases),
            interleaving=self._config.getoption("--lorameter-interleave"),
            runs=runs,
        )
        return plan, notices, runs

    def _executor(self) -> Executor:
        from lorameter.run.workers import open_executor

        return open_executor()

    def _provenance(self) -> dict[str, Any]:
        from lorameter.machine.provenance import collect

        return collect(self._study, self._facts or self._executor().facts(), self._study.workload.threads)


class _usage_errors:  # noqa: N801 - reads as a statement
    """Turn our errors into pytest's usage errors, which print one line and exit with 4."""

    def __enter__(self) -> None:
        """Nothing to prepare."""

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: object) -> None:
        if isinstance(error, LorameterError):
            raise pytest.UsageError(escape_control_chars(f"lorameter: {error}")) from None


def _phase_of(item: pytest.Item) -> str | None:
    marker = item.get_closest_marker("lorameter")
    if marker is None:
        return None
    if len(marker.args) != 1:
        raise pytest.UsageError(f"{item.nodeid}: the marker lorameter takes one phase: train, generate or cold.")
    return str(marker.args[0])


def _failure(record: TrialRecord, run: Path) -> str:
    why = f" in {record.failure.phase}: {record.failure.message}" if record.failure else ""
    return escape_control_chars(f"{record.trial}: {record.status}{why} (log: {run / record.log})")


def _show(reporter: pytest.TerminalReporter, title: str, document: Document) -> None:
    """A section of the summary, as wide and as coloured as pytest's own."""
    from lorameter.report.terminal import PIPED_WIDTH, text_of

    screen = reporter._tw
    width = screen.fullwidth if screen.hasmarkup else PIPED_WIDTH
    verbose = reporter.config.option.verbose > 0
    reporter.section(title)
    reporter.write(text_of(document, width=width, coloured=screen.hasmarkup, verbose=verbose))


def _nothing() -> None:
    """What a replayed round calls: the work was done when it was measured."""
