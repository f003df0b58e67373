"""One pytest session over one study: measured once after collection, replayed in each test, reported at the end."""

from __future__ import annotations

import contextlib
import errno
import itertools
import sys
import traceback
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import pytest

from lorameter.commands.options import DEFAULT_STUDY, PYTEST_PREFIX
from lorameter.commands.output import check_page, save_page
from lorameter.commands.parser import build_parser
from lorameter.commands.report import make_run_page
from lorameter.commands.run import (
    apply_overrides,
    find_interrupted,
    forecast_study,
    measure_study,
    read_requested_study,
    resume,
)
from lorameter.errors import LorameterError, redact, require
from lorameter.machine.products import make_target
from lorameter.machine.provenance import collect, fingerprint, fingerprint_fields
from lorameter.measurements.metrics import PRIMARY
from lorameter.pipes import EXIT_CLOSED_PIPE, EXIT_UNWRITABLE, BestEffortStderr, CapturedStdout
from lorameter.records import store
from lorameter.records.record import TrialRecord
from lorameter.records.store import Run
from lorameter.report.blocks import Document
from lorameter.report.comparison import describe_gate
from lorameter.report.run import describe_run
from lorameter.report.run_view import make_run_view
from lorameter.report.terminal import PIPED_WIDTH, render_text
from lorameter.run.build_plan import PlanOptions
from lorameter.run.sites.placement import open_placement
from lorameter.run.workers import open_executor
from lorameter.studies.protocol import HERE
from lorameter.studies.study import Study, Target
from lorameter.studies.study_file import read_study
from lorameter.terminal import escape_control_chars
from lorameter.verdicts.benchmark_files import about_run, differences_from_saved, extra_info
from lorameter.verdicts.compare import (
    compare,
    comparison_input,
    describe_differences,
    session_differences,
)
from lorameter.verdicts.gate import GateResult, judge, load_policy, read_base
from lorameter.verdicts.same_training import REPORTED
from lorameter.verdicts.series import group_trials
from lorameter.verdicts.validity import run_validity


@contextlib.contextmanager
def usage_errors() -> Iterator[None]:
    """Convert lorameter's errors into pytest's usage errors, which print one line and exit with 4."""
    try:
        yield
    except LorameterError as error:
        raise pytest.UsageError(escape_control_chars(f"lorameter: {error}")) from None


class Session:
    """One pytest session over one study: measures once after collection, replays in each test, reports at the end."""

    def __init__(self, config: pytest.Config) -> None:
        self._config, self._options = config, build_parser().parse_args(["run"])
        for name, value in vars(config.option).items():
            if name.startswith("lorameter_"):
                setattr(self._options, name.removeprefix("lorameter_"), value)
        reasons = (
            (
                config.getoption("benchmark_skip") and not config.getoption("benchmark_only"),
                "--benchmark-skip: nothing was measured",
            ),
            (
                config.getoption("benchmark_disable") and not config.getoption("benchmark_enable"),
                "--benchmark-disable: nothing was measured, so nothing was stored and nothing can be replayed",
            ),
            (self._options.dry_run, "--lorameter-dry-run: nothing was measured"),
        )
        self._idle = next((reason for applies, reason in reasons if applies), "")
        """Why this session measures nothing; empty if it measures."""
        self._gate = vars(self._options).pop("base")
        self._interrupted: Run | None = None
        self._run: Run | None = None
        self._judged: GateResult | str | None = None
        """The result of the gate, or why there is no result."""
        self._planned: Document | None = None
        self._output: CapturedStdout | None = None
        with usage_errors():
            self._load()

    def _load(self) -> None:
        """Read the study or run that the options name. Raises `UsageError` if it cannot be measured, resumed or
        judged."""
        options = self._options
        check_page(options.html, "--lorameter-html")
        if options.resume:
            self._interrupted = find_interrupted(options, prefix=PYTEST_PREFIX)
            name = self._interrupted.manifest.run
            require(
                not self._interrupted.manifest.sides,
                f"--lorameter-resume: run {name} is an A/B. Resume: lorameter run --resume {name}",
            )
        options.study = options.study or DEFAULT_STUDY
        is_here = self._load_study(None).protocol.on == HERE  # otherwise the remote machine determines the profile
        self._study = self._load_study(make_target(open_executor().machine()) if is_here else None)
        require(
            not self._study.protocol.mixed,
            f"{self._study.protocol.said}, mixed: pytest-benchmark has one row for a variant, but "
            "each site needs its own row. Use `lorameter run`.",
        )
        require(
            not options.policy or self._gate,
            "--lorameter-policy: there is no base to gate against. Add --lorameter-base=RUN.",
        )
        require(
            not (self._gate and self._idle),
            "--lorameter-base: this session measures nothing that could be judged. Leave one of the options out.",
        )
        self._policy = load_policy(options.policy)

    def _load_study(self, target: Target | None) -> Study:
        options = self._options
        if self._interrupted is not None:
            return read_study(self._interrupted).with_overrides(on=options.on, sites=options.sites)
        return apply_overrides(read_requested_study(options)(target), options)

    @pytest.hookimpl(tryfirst=True)
    def pytest_sessionstart(self, session: pytest.Session) -> None:
        """Replace the stream of pytest's reporter before its first line, so that a session whose reader goes away
        (`pytest | head -1`) still completes its measurement."""
        screen = getattr(session.config.pluginmanager.get_plugin("terminalreporter"), "_tw", None)
        if screen is not None and hasattr(screen, "_file"):
            self._output = screen._file = CapturedStdout(screen._file)

    @pytest.hookimpl(trylast=True)
    def pytest_unconfigure(self) -> None:
        """If output was lost, say so by the exit code: pytest's own would be 1, which means a regression."""
        if self._output is None:
            return
        self._output.flush()
        if self._output.lost is not None:
            self._output.drain()
            closed = self._output.lost.errno == errno.EPIPE
            session = self._config.pluginmanager.get_plugin("session")
            session.exitstatus = EXIT_CLOSED_PIPE if closed else EXIT_UNWRITABLE  # type: ignore[union-attr]

    def pytest_generate_tests(self, metafunc: pytest.Metafunc) -> None:
        """Generate a test for each variant of the study, or of the resumed run."""
        if metafunc.definition.get_closest_marker("lorameter") and "variant_name" in metafunc.fixturenames:
            names = [variant.name for variant in self._study.variants]
            selected = self._interrupted.manifest.selection if self._interrupted is not None else ()
            metafunc.parametrize("variant_name", [name for name in names if not selected or name in selected])

    def pytest_collection_modifyitems(self, items: list[pytest.Item]) -> None:
        """Deselect tests of phases that a resumed run, a script or a multi-rank trial does not have."""
        phases = self._study.phases if self._interrupted is None else self._interrupted.manifest.phases
        lacking = [item for item in items if _read_phase(item) not in (None, *phases)]
        self._config.hook.pytest_deselected(items=lacking)
        items[:] = [item for item in items if item not in lacking]

    @pytest.hookimpl(tryfirst=True)
    def pytest_runtestloop(self, session: pytest.Session) -> None:
        """Measure everything that the selected tests need, once, before the first test."""
        # Otherwise --benchmark-save stores no samples.
        self._config.pluginmanager.get_plugin("pytest-benchmark").save_data = True  # type: ignore[union-attr]
        items = [(item, phase) for item in session.items if (phase := _read_phase(item))]
        idle = self._idle and not self._options.dry_run
        if not items or idle or self._config.option.collectonly or session.testsfailed:
            return
        names = [str(item.callspec.params["variant_name"]) for item, _ in items]  # type: ignore[attr-defined]
        with usage_errors(), contextlib.redirect_stderr(BestEffortStderr(sys.stderr)):
            if self._interrupted is None:
                self._measure(names, {phase for _, phase in items})
            else:
                self._prepare_gate(self._interrupted.manifest.provenance)
                self._run = resume(self._interrupted, self._options)

    def _measure(self, names: list[str], phases: set[str]) -> None:
        """Measure the plan of the selected tests, or forecast it."""
        study, options = self._study, self._options
        wanted = PlanOptions(select=names, phases=sorted(phases), interleaving=options.interleave)
        with open_placement(study, options.runs_dir) as placement:
            if placement.is_remote:
                study = self._study = self._load_study(make_target(placement.machine))
            if options.dry_run:
                self._planned, _ = forecast_study(study, placement, options, wanted)
                return
            self._prepare_gate(collect(study, placement.facts, study.workload.threads))
            self._run = measure_study(study, placement, options, wanted)

    def _prepare_gate(self, provenance: Mapping[str, Any]) -> None:
        """Read the base and compare it with the plan, because otherwise hours of measurement could end as "not
        comparable". Facts reported by a script's process are judged at the end.

        Raises:
            UsageError: the base cannot be read, is invalid, or does not agree. A baseline that is not accepted yet is
                allowed, so that the first one can be measured; the session then ends as `no_baseline`.
        """
        if not self._gate:
            return
        study, facts = self._study, fingerprint_fields(provenance)
        runs = store.runs_dir(self._options.runs_dir)
        base = read_base(self._gate, runs, fingerprint=fingerprint(provenance), study=study.name)
        require(not base.broken, f"--lorameter-base: {base.broken}. Give a valid run.")
        if study.supports("own training"):
            known = base.facts or {}
            facts |= {name: known[name] for name in REPORTED if name in known}
        differences = session_differences(base, study, facts)
        require(
            not differences,
            f"--lorameter-base: {base.name} is not comparable: {describe_differences(differences, force=False)}.",
        )

    @pytest.fixture
    def replay(self, request: pytest.FixtureRequest, variant_name: str) -> Callable[[], None]:
        """Replay this test's recorded samples in pytest-benchmark; fails if a trial has no result."""

        def replayed() -> None:
            if self._idle:
                pytest.skip(self._idle)
            phase = _read_phase(request.node)
            if self._run is None or phase is None:
                pytest.fail("nothing was measured for this test; is it marked with lorameter(phase)?", pytrace=False)
            series = group_trials(self._run.records)[variant_name, "variant"]
            failed = [_describe_failure(record, self._run) for record in series.records if record.status != "ok"]
            if failed:
                pytest.fail("\n".join(failed), pytrace=False)
            metric = PRIMARY[phase]
            if not series.measuring(metric):
                pytest.fail(f"no trial of {variant_name} measured {metric}, although all are ok", pytrace=False)
            durations = [sample for trial in series.trials(metric) for sample in trial]
            # Each pair of readings is 0 and the next duration, so that their difference is exactly the recorded float.
            clock = itertools.chain.from_iterable((0.0, duration) for duration in durations).__next__
            request.node.add_marker(pytest.mark.benchmark(timer=clock, group=phase, warmup=False))
            benchmark = request.getfixturevalue("benchmark")
            benchmark.extra_info.update(extra_info(self._run, series, phase, metric))
            benchmark.pedantic(_nothing, rounds=len(durations), iterations=1)

        return replayed

    @pytest.hookimpl(tryfirst=True)
    def pytest_sessionfinish(self, session: pytest.Session) -> None:
        """Fail the session if the run is invalid or fails its gate, although each test passes."""
        passed = self._run is None or run_validity(self._run, self._study).valid
        if self._gate and not self._config.option.collectonly:
            self._judged = self._judge()
            passed = passed and isinstance(self._judged, GateResult) and self._judged.passed
        if not passed and session.exitstatus == pytest.ExitCode.OK:
            session.exitstatus = pytest.ExitCode.TESTS_FAILED

    def _judge(self) -> GateResult | str:
        """The gate's result, or why there is none; an exception never counts as a pass."""
        if self._run is None:
            return "Gate failed: nothing was measured, so there was nothing to judge.\n"
        try:
            candidate, runs = comparison_input(self._run), store.runs_dir(self._options.runs_dir)
            base = read_base(self._gate, runs, fingerprint=candidate.fingerprint, study=candidate.study)
            studied = frozenset(variant["name"] for variant in self._run.manifest.study["variants"])
            base = base.without(studied - candidate.variants.keys())  # remove variants that were not selected
            report = compare(base, candidate, metrics=self._policy.metrics, limits_of=self._policy.limits_of)
            return judge(report, self._policy)
        except Exception:
            text = escape_control_chars(redact(traceback.format_exc()))
            return f"Gate failed: the comparison ended in an error.\n{text}"

    @pytest.hookimpl(tryfirst=True)
    def pytest_terminal_summary(self, terminalreporter: pytest.TerminalReporter) -> None:
        """Print the report before pytest-benchmark's own table, which may raise an exception
        (--benchmark-compare-fail)."""
        if isinstance(self._judged, str):
            terminalreporter.section("lorameter gate")
            terminalreporter.write(self._judged, flush=True)
        if self._planned is not None:
            _show(terminalreporter, "lorameter plan", self._planned)
        if self._idle:
            terminalreporter.write_line(f"lorameter: {self._idle}")
        if self._run is None:
            return
        view = make_run_view(self._run)
        report = describe_run(view)
        _show(terminalreporter, "lorameter", report)
        with usage_errors():
            save_page(self._options.html, report, lambda: make_run_page(view))
        if isinstance(self._judged, GateResult):
            _show(terminalreporter, "lorameter gate", describe_gate(self._judged))

    def pytest_benchmark_update_machine_info(self, machine_info: dict[str, Any]) -> None:
        """Add device, libraries and workload, as far as two runs must agree on them to be compared."""
        machine_info["lorameter"] = fingerprint_fields(
            collect(self._study, open_executor().facts(), self._study.workload.threads)
            if self._run is None
            else self._run.manifest.provenance
        )

    def pytest_benchmark_compare_machine_info(
        self, machine_info: dict[str, Any], compared_benchmark: dict[str, Any]
    ) -> None:
        """Refuse to compare different machines, libraries or workloads, and name the differences."""
        option = "--benchmark-compare"
        with usage_errors():
            different = differences_from_saved(self._study, machine_info["lorameter"], compared_benchmark, option)
            why = f"{option}: not comparable: {'; '.join(different)}."
            require(not different, f"{why} Measure the base again on this machine.")

    def pytest_benchmark_update_json(self, output_json: dict[str, Any]) -> None:
        """Add facts about the run."""
        if self._run is not None:
            output_json["lorameter"] = about_run(self._run)


def _read_phase(item: pytest.Item) -> str | None:
    marker = item.get_closest_marker("lorameter")
    if marker is None:
        return None
    if len(marker.args) != 1:
        raise pytest.UsageError(f"{item.nodeid}: the marker lorameter takes one phase: train, generate or cold.")
    return str(marker.args[0])


def _describe_failure(record: TrialRecord, run: Run) -> str:
    why = f" in {record.failure.phase}: {record.failure.message}" if record.failure else ""
    return escape_control_chars(f"{record.trial}: {record.status}{why} (log: {run.path / record.log})")


def _show(reporter: pytest.TerminalReporter, title: str, document: Document) -> None:
    """A section of the summary, with the width and colours of pytest."""
    screen = reporter._tw
    width = screen.fullwidth if screen.hasmarkup else PIPED_WIDTH
    verbose = reporter.config.option.verbose > 0
    reporter.section(title)
    reporter.write(render_text(document, width=width, coloured=screen.hasmarkup, verbose=verbose))


def _nothing() -> None:
    """The call of a replayed round; the actual work was measured before."""
