"""The judge of what a copied head costs and what mending it gains, by planted times."""

from types import SimpleNamespace

import pytest

from harness.trial.profiling import borders
from harness.trial.profiling.phases import Phases


@pytest.fixture
def copied(program):
    return program("copied_head")


LOADS = [1.0, 1.1, 0.9, 1.7, 1.0, 2.5, 1.2, 1.4, 0.8, 3.0]
"""By how much other work slows each turn."""


@pytest.mark.parametrize(
    ("cost_s", "status", "said"),
    [
        (0.43, 0, "the cost is within 10% of the gain"),
        (0.37, 0, "the cost is within 10% of the gain"),
        (0.80, 1, "the cost is over 10% from the gain"),
        (0.10, 1, "the cost is over 10% from the gain"),
    ],
)
def test_what_disturbs_a_turn_falls_on_cost_and_gain(copied, capsys, cost_s, status, said):
    """A load that comes and goes between turns and is the same within one decides nothing."""
    assert copied.judge([cost_s * load for load in LOADS], [0.4 * load for load in LOADS]) == status
    assert said in capsys.readouterr().out


@pytest.mark.parametrize(
    ("gains", "said"),
    [
        ([0.4 * load for load in LOADS], "the intervals are too wide"),  # by a cost that does not follow the load
        ([0.4] * 5, "too few turns"),
        ([0.0] * 5 + [0.8] * 5, "the intervals are too wide"),
    ],
)
def test_what_is_not_known_is_no_success(copied, capsys, gains, said):
    """A cost that may as well be the gain as not is not decided, and the exit status says no."""
    assert copied.judge([0.4] * len(gains), gains) == 1
    assert f"not decided: {said}" in capsys.readouterr().out


@pytest.mark.parametrize("gain_s", [0.0, -0.4])
def test_a_remedy_that_gains_nothing_is_foretold_wrongly(copied, capsys, gain_s):
    """However near the cost is to it by its absolute value."""
    assert copied.judge([0.4] * 10, [gain_s] * 10) == 1
    assert "the cost is over 10% from the gain" in capsys.readouterr().out


def test_requests_with_the_remedy_are_in_the_same_turns(copied, monkeypatch):
    """Between the two of a pair, so that plain and mended requests are as early and as late as each other."""
    asked = []

    def answer(name, first_s):
        asked.append(name)
        return SimpleNamespace(first_token_time_s=first_s, time_per_output_token_s=0.1)

    class Mended:
        def __init__(self, model, stream, workload, variant):
            assert variant.copy_head_input

        def warm_up(self, count):
            assert (count, asked) == (1, [])

        def ask(self):
            return answer("mended", 0.3)

    class Bordered:
        def __init__(self, model, ask, device):
            self.phases = Phases(("prefill",), device)

        def __call__(self):
            with self.phases.within("prefill"):
                return answer("bordered", 0.8)

    monkeypatch.setattr(copied, "Server", Mended)
    monkeypatch.setattr(copied, "BorderedRequest", Bordered)
    trial = SimpleNamespace(
        _built=SimpleNamespace(trainee=SimpleNamespace(model=None), stream=None),
        _serving=SimpleNamespace(ask=lambda: answer("plain", 0.7)),
    )
    samples = copied.turns(trial, None, 0.0)
    assert asked == ["plain", "mended", "bordered", "bordered", "mended", "plain"] * (borders.LEAST_STEP_PAIRS // 2)
    assert samples["first_token_time_s"] == (0.7,) * borders.LEAST_STEP_PAIRS
    assert samples[copied.MENDED] == (0.3,) * borders.LEAST_STEP_PAIRS
    assert len(samples["phase_prefill_s"]) == borders.LEAST_STEP_PAIRS
