"""The pytest plugin: `pytest benchmarks/ --benchmark-save=NAME`.

A benchmark suite activates it with three lines in its conftest (`attach`); in every other project the plugin only adds
its options. The whole selected plan is measured once, interleaved, after collection; each test then passes its recorded
samples to pytest-benchmark by replaying them exactly through a clock. So pytest-benchmark does the saving, comparing
and histograms, and no test measures anything while pytest runs it.

A marker selects the phase of a test, and the study defines its variants:

    @pytest.mark.lorameter("train")
    def test_train_step(replay):
        replay()
"""

from __future__ import annotations

import pytest

from lorameter.commands.options import DEFAULT_STUDY, PYTEST_PREFIX, add_arguments, argument, shared_options

PLUGIN = "lorameter-session"
OPTIONS = (
    argument("--lorameter-study", metavar="STUDY", help=f"built-in study or TOML file; default: {DEFAULT_STUDY}"),
    *shared_options("profile", prefix=PYTEST_PREFIX),
    argument("--lorameter-model", metavar="M", help="model in place of the study's"),
    argument("--lorameter-data", metavar="FILE|ID", help="data in place of the study's"),
    argument("--lorameter-effort", choices=("quick", "standard", "rigorous"), help="3, 8 or 12 replicates"),
    *shared_options("replicates", prefix=PYTEST_PREFIX),
    argument("--lorameter-interleave", metavar="L", help="shared-base, lockstep or replicates; default: finest"),
    *shared_options(
        "until-decided", "precision", "max-minutes", "allow-disturbed", "sites", "on", "if-busy", prefix=PYTEST_PREFIX
    ),
    argument("--lorameter-dry-run", action="store_true", help="show the plan and what it will take, measure nothing"),
    argument("--lorameter-resume", metavar="RUN", help="resume an interrupted run, and replay all of it"),
    argument("--lorameter-base", metavar="RUN", help="gate: a run, a saved .json, or the word baseline"),
    argument("--lorameter-policy", metavar="FILE", help="policy of the gate, as for lorameter gate"),
    *shared_options("html", prefix=PYTEST_PREFIX),
    argument("--lorameter-runs-dir", metavar="DIR", help="folder of the runs"),
)


def pytest_addoption(parser: pytest.Parser) -> None:
    """Add the options, with the names of the command line."""
    add_arguments(parser.getgroup("lorameter", "measuring LoRA variants").addoption, OPTIONS)


def pytest_configure(config: pytest.Config) -> None:
    """Register the marker."""
    config.addinivalue_line("markers", "lorameter(phase): replays the samples of one phase: train, generate or cold")


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Refuse tests with our marker in a suite that is not attached: they would find no fixture."""
    if not config.pluginmanager.has_plugin(PLUGIN) and any(item.get_closest_marker("lorameter") for item in items):
        raise pytest.UsageError(
            "the marker lorameter needs a call of `lorameter.pytest_plugin.attach(config)` in `pytest_configure` of "
            "the suite's conftest.py. `lorameter init FOLDER` writes such a suite."
        )


def attach(config: pytest.Config) -> None:
    """Turn the calling conftest's suite into a lorameter suite; call it from `pytest_configure`."""
    if config.pluginmanager.has_plugin(PLUGIN):
        return
    if config.getoption("benchmark_cprofile", None):
        raise pytest.UsageError(
            "--benchmark-cprofile: the tests replay recorded samples, so there is nothing to profile. "
            "Leave the option out; the checks of each trial show what ran inside a step."
        )
    if config.getoption("dist", "no") != "no" or config.getoption("numprocesses", None):
        raise pytest.UsageError(
            "pytest-xdist: trials that are measured at the same time disturb each other. Run without -n."
        )
    from lorameter.commands.pytest_session import Session

    config.pluginmanager.register(Session(config), PLUGIN)
