"""Makes this folder a lorameter suite: its tests replay one interleaved run."""

import pytest

from lorameter.pytest_plugin import attach


def pytest_configure(config: pytest.Config) -> None:
    """Attach the session that plans, measures and reports."""
    attach(config)
