"""Makes this folder a lorameter suite: its tests replay one interleaved run."""

import pytest

from harness.pytest_plugin import attach


def pytest_configure(config: pytest.Config) -> None:
    """Attach the session that plans, measures and reports."""
    attach(config)


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Self-benchmarks of the harness run only when asked for: `-m selftest`."""
    if "selftest" in config.getoption("markexpr"):
        return
    asked = [item for item in items if item.get_closest_marker("selftest") is None]
    config.hook.pytest_deselected(items=[item for item in items if item not in asked])
    items[:] = asked
