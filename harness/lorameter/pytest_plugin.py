"""`pytest benchmarks/ --benchmark-save=NAME`: the main entry point.

A benchmark suite asks for it with three lines in its conftest (`attach`); in every other project this plugin adds its
options and does nothing. The whole selected plan is measured once, interleaved, after collection; each test then
hands its own recorded samples to pytest-benchmark by replaying them through a clock, to the bit. So saving, comparing
and histograms are pytest-benchmark's own, and no test measures anything while pytest runs it.

A test asks for a phase with a marker and gets its variants from the study:

    @pytest.mark.lorameter("train")
    def test_train_step(replay):
        replay()
"""

from __future__ import annotations

from collections.abc import Generator

import pytest

from lorameter.commands.options import add_options
from lorameter.commands.pytest_output import Output
from lorameter.commands.pytest_session import DEFAULT_STUDY, PLUGIN, Session

PREFIX = "--lorameter-"


def pytest_addoption(parser: pytest.Parser) -> None:
    """The options, in the words of the command line."""
    group = parser.getgroup("lorameter", "measuring LoRA variants")
    group.addoption("--lorameter-study", metavar="STUDY", help=f"built-in study or TOML file; default: {DEFAULT_STUDY}")
    add_options(group.addoption, "profile", prefix=PREFIX)
    group.addoption("--lorameter-model", metavar="M", help="model in place of the study's")
    group.addoption("--lorameter-data", metavar="FILE|ID", help="data in place of the study's")
    group.addoption("--lorameter-effort", choices=("quick", "standard", "rigorous"), help="3, 8 or 12 replicates")
    add_options(group.addoption, "replicates", prefix=PREFIX)
    group.addoption("--lorameter-interleave", metavar="L", help="shared-base, lockstep or replicates; default: finest")
    add_options(group.addoption, "precision", "max-minutes", "allow-disturbed", "sites", "on", "if-busy", prefix=PREFIX)
    group.addoption(
        "--lorameter-dry-run", action="store_true", help="show the plan and what it will take, measure nothing"
    )
    group.addoption("--lorameter-resume", metavar="RUN", help="resume an interrupted run, and replay all of it")
    group.addoption("--lorameter-base", metavar="RUN", help="gate: a run, a saved .json, or the word baseline")
    group.addoption("--lorameter-policy", metavar="FILE", help="policy of the gate, as for lorameter gate")
    add_options(group.addoption, "html", prefix=PREFIX)
    group.addoption("--lorameter-runs-dir", metavar="DIR", help="where runs live")


def pytest_configure(config: pytest.Config) -> None:
    """Register the marker."""
    config.addinivalue_line("markers", "lorameter(phase): replays the samples of one phase: train, generate or cold")


FIXTURES = ("replay", "variant_name")
"""What `attach` brings to a suite."""
HINT = (
    "The fixtures of lorameter come with three lines in the conftest.py of the suite:\n\n"
    "    from lorameter.pytest_plugin import attach\n\n"
    "    def pytest_configure(config):\n"
    "        attach(config)\n"
)


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(item: pytest.Item) -> Generator[None, pytest.TestReport, pytest.TestReport]:
    """Where a test is marked as ours and its suite was not attached, say what is missing beside pytest's own words."""
    report = yield
    missing = f"fixture '{FIXTURES[0]}' not found", f"fixture '{FIXTURES[1]}' not found"
    marked = report.failed and item.get_closest_marker("lorameter") is not None
    if (
        marked
        and not item.config.pluginmanager.has_plugin(PLUGIN)
        and any(one in report.longreprtext for one in missing)
    ):
        report.sections.append(("lorameter", HINT))
    return report


def attach(config: pytest.Config) -> None:
    """Turn the suite of the calling conftest into a lorameter suite; call it from `pytest_configure`."""
    if config.pluginmanager.has_plugin(PLUGIN):
        return
    for name, value in vars(config.option).items():
        if name.startswith("lorameter_") and value == []:  # what argparse makes of --option=--
            raise pytest.UsageError(f"argument --{name.replace('_', '-')}: '--' is no value of it")
    if config.getoption("benchmark_cprofile", None):
        raise pytest.UsageError(
            "--benchmark-cprofile: the tests replay recorded samples, so there is nothing of theirs to profile. "
            "Leave the option out; what ran inside a step is in the checks of each trial."
        )
    if config.getoption("dist", "no") != "no" or config.getoption("numprocesses", None):
        raise pytest.UsageError(
            "pytest-xdist: trials that are measured at the same time disturb each other. Run without -n."
        )
    config.pluginmanager.register(Session(config), PLUGIN)
    config.pluginmanager.register(Output())
