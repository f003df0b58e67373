"""What the gate of a session of pytest refuses before anything is measured."""

from types import SimpleNamespace

import pytest

from lorameter.commands import pytest_gate
from lorameter.errors import UsageError
from lorameter.verdicts.comparison_input import ComparisonInput
from lorameter.verdicts.gate import Policy

FACTS = {"device": "cpu", "python": "3.11.7", "cuda": "13.0", "libraries": {"torch": "2.15.0"}, "threads": 1}


@pytest.fixture
def prepare(monkeypatch, tmp_path):
    """Checks a base of such facts against a session that has those above."""

    def check(*, of_scripts, **facts):
        base = ComparisonInput(name="base", facts=FACTS | facts)
        monkeypatch.setattr(pytest_gate, "read_base", lambda *_, **__: base)
        study = SimpleNamespace(name="small", variants=(), of_scripts=of_scripts)
        pytest_gate.SessionGate("base", Policy(), tmp_path).prepare(study, FACTS, "")

    return check


TOLD = [{"cuda": None}, {"python": "3.12.1"}, {"libraries": {"torch": None}}]


@pytest.mark.parametrize("told", TOLD, ids=str)
def test_what_a_script_tells_itself_is_not_foreseen(prepare, told):
    """It may use another interpreter than the one that was found, and no torch: the end will tell."""
    prepare(of_scripts=True, **told)
    with pytest.raises(UsageError, match="base is not comparable"):
        prepare(of_scripts=False, **told)


@pytest.mark.parametrize("of_scripts", [True, False])
def test_another_machine_is_refused_before_anything_is_measured(prepare, of_scripts):
    """Of a script as well."""
    with pytest.raises(UsageError, match="threads: 2 in the base, 1 in the candidate"):
        prepare(of_scripts=of_scripts, threads=2)
