"""Tests that a study refuses claims whose rule and fields do not match."""

import pytest

from lorameter.errors import UsageError
from lorameter.studies.study_file import load_study

STUDY = """
[controls]
r = 16
lora_dropout = 0.1
[sweeps]
r = [16, 32]
lora_dropout = [0.0, 0.1]
[[claim]]
id = "1"
says = "a sentence"
parts = [{ PART }]
"""


@pytest.fixture
def parts_of(tmp_path):
    """A function that reads a study with one claim of this part."""

    def read(part):
        path = tmp_path / "mine.toml"
        path.write_text(STUDY.replace("PART", part))
        return load_study(str(path)).claims[0].parts

    return read


@pytest.mark.parametrize(
    ("part", "words"),
    [
        ('rule = "rising", axis = "r", metric = "step_time_s"', ["rising", "trend-up"]),
        ('rule = "equal", axis = "r", metric = "speed"', ["'equal'", "'speed'", "step_time_s"]),
        ('rule = "rises", axis = "r", metric = "step_time_s"', ["'rises'", "trainable_parameters"]),
        ('rule = "differs", axis = "r", metric = "step_time_s", levels = [16]', ["levels = [16.0]: 2 expected"]),
        ('rule = "differs", axis = "r", metric = "step_time_s", levels = [16, 16]', ["the same one twice"]),
        ('rule = "highest", axis = "r", metric = "step_time_s", levels = [64]', ["level 64 of r", "16, 32"]),
        ('rule = "best", axis = "r", metric = "step_time_s", levels = [16]', ["give metrics (with weights)"]),
        ('rule = "equal", axis = "lora_alpha", metric = "step_time_s"', ["'lora_alpha'", "fewer than two"]),
        ('rule = "largest-effect", axis = "r", metric = "step_time_s"', ["against = []"]),
        ('rule = "largest-effect", axis = "r", metric = "step_time_s", against = ["r"]', ["holds the axis itself"]),
        ('rule = "trend-up", axis = "lora_dropout", metric = "step_time_s"', ["level 0 has no logarithm", "linear"]),
        (
            'rule = "equal", axis = "r", metric = "step_time_s", margin = 1',
            ["'equal'", "margin = 1.0: not a fraction"],
        ),
        (
            'rule = "trend-up", axis = "r", metric = "step_time_s", tolerance = -0.1',
            ["tolerance = -0.1: not a fraction"],
        ),
    ],
)
def test_a_part_that_makes_no_statement_is_refused(parts_of, part, words):
    """The error has the study's file, the claim or part, and a valid replacement."""
    with pytest.raises(UsageError) as caught:
        parts_of(part)
    for word in ["mine.toml", *words]:
        assert word in str(caught.value)


@pytest.mark.parametrize("name", ["tolerance", "margin", "by"])
@pytest.mark.parametrize(("rule", "own"), [
    ("trend-up", "tolerance"), ("no-trend", "margin"), ("faster", "by"), ("largest-effect", ""),
])  # fmt: skip
def test_a_limit_of_another_rule_is_refused(parts_of, rule, own, name):
    """A limit of another rule would have no effect. The error names it and the rule's own limit, which is accepted."""
    rest = {"largest-effect": ', against = ["lora_dropout"], scale = "linear"'}.get(rule, "")
    part = f'rule = "{rule}", axis = "{"engine" if own == "by" else "r"}", metric = "step_time_s"{rest}, {name} = 0.2'
    if name == own and own != "by":
        assert parts_of(part)[0].limit == (own, 0.2)
        return
    with pytest.raises(UsageError) as caught:
        parts_of(part)
    said = str(caught.value)
    if name == own:  # the error says instead that the study is not about an engine
        assert "does not go by it" not in said
        return
    assert f"mine.toml, claim number 1: {name} = 0.2: rule '{rule}' does not go by it" in said
    assert (f"its limit is '{own}'" if own else "it has no limit") in said
