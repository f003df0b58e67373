"""The judge of what a finding costs and what its remedy gains, by planted ratios; what it asks the command for."""

import pytest

from harness import cli
from harness.commands.profile import DEAREST
from harness.models import catalogue, shapes
from harness.profile.diagnosis import RULES
from harness.studies.study_file import load_variant

GOOD, BAD, WIDE = "foretold", "not foretold", "not decided: the interval is too wide"


@pytest.fixture
def forecasts(program):
    return program("forecasts")


@pytest.fixture
def copied(program):
    return program("copied_head")


@pytest.mark.parametrize(
    ("cost", "low", "high", "said"),
    [
        (0.43, 0.58, 0.60, GOOD),
        (0.38, 0.58, 0.60, GOOD),
        (0.50, 0.58, 0.60, BAD),
        (0.30, 0.58, 0.60, BAD),
        (0.41, 0.50, 0.70, WIDE),
        (0.45, 0.58, 0.60, WIDE),
        (0.41, None, None, "not decided: too few replicates"),
        (0.40, 0.99, 1.01, BAD),
        (0.40, 1.39, 1.41, BAD),  # a loss as large as the cost
    ],
)
def test_a_copied_head_is_foretold_within_a_tenth_of_its_gain(forecasts, copied, capsys, cost, low, high, said):
    """Of the whole interval: a cost that may as well be the gain as not is not decided, and that is no success."""
    middle = 0.59 if low is None else (low + high) / 2
    assert forecasts.judge(cost, middle, low, high, copied.near_a_tenth) == int(said is not GOOD)
    assert f"\n{said}" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("cost", "low", "high", "said"),
    [(0.08, 0.95, 0.97, GOOD), (0.01, 0.95, 0.97, GOOD), (0.18, 0.95, 0.97, BAD), (0.08, 0.90, 1.02, WIDE)],
)
def test_a_remedy_of_a_step_is_foretold_within_the_margin(forecasts, capsys, cost, low, high, said):
    """A share of the step, whatever the cost is."""
    assert forecasts.judge(cost, (low + high) / 2, low, high, forecasts.near_a_step) == int(said is not GOOD)
    assert f"\n{said}" in capsys.readouterr().out


def found(code="weight-copied", **changes):
    """A document of the command, as far as it is read."""
    finding = {"code": code, "message": "a copy", "cost_share": 0.41, "changes": {"copy_head_input": True}}
    comparison = {"ratio": 0.59, "low": 0.58, "high": 0.60, "replicates": 8}
    tried = {"finding": finding, "comparison": comparison, "valid": True, "failures": [], "interleaving": "lockstep"}
    return {"findings": [finding], "tried": tried | changes}


@pytest.mark.parametrize(
    ("document", "status", "said"),
    [
        (found(), 0, "tried: copy_head_input = True; lockstep, 8 replicates"),
        (found("adapter-unmerged"), 1, "found: adapter-unmerged\nweight-copied was not tried"),
        (found(comparison=None), 1, "weight-copied was not tried"),
        ({"findings": [], "tried": None}, 1, "found: nothing\nweight-copied was not tried"),
        (found(valid=False), 1, "the comparison does not count: its control differs"),
        (found(valid=False, failures=["t: oom"]), 1, "the comparison does not count: t: oom"),
    ],
)
def test_only_what_was_found_and_tried_counts(forecasts, copied, capsys, document, status, said):
    """Another finding that is dearer, or a comparison that does not count, is no success."""
    assert forecasts.judge_document(document, copied.CODE, "a request", copied.near_a_tenth) == status
    assert said in capsys.readouterr().out


def test_the_command_is_told_nothing_of_the_head(copied, tmp_path):
    """Study and arguments are such as it takes: a model of so many words, and the remedy of whatever is dearest."""
    study = copied.write_study(tmp_path, 64, 4096)
    options = cli.parser().parse_args(copied.arguments(study, "quick"))
    assert (options.phase, options.attempt, options.effort, options.json) == ("generate", DEAREST, "quick", True)
    loaded, variant = load_variant(options.variant)
    assert shapes.shape(catalogue.resolve(loaded.workload.model)).vocab_size == 4096
    assert not variant.copy_head_input


def test_each_finding_of_a_step_is_asked_for(forecasts, tmp_path):
    """By a name that the command has, of a step."""
    for code, variant in forecasts.VARIANTS.items():
        options = cli.parser().parse_args(forecasts.arguments(variant, code, "quick", str(tmp_path)))
        assert (options.phase, options.attempt, code in RULES) == ("train", code, True)
        load_variant(options.variant)
