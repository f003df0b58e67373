"""Tests of kernels_check on random models and small families: a part of the long program, with injected faults."""

from types import SimpleNamespace

import pytest

SEEDS = range(1_000_000, 1_000_008)
"""Seeds outside the range of the long run."""
FAMILIES = ("bart", "beam", "clip", "gemma2", "gpt2", "ibert", "mixtral", "siglip")


@pytest.fixture
def models(program):
    """The program."""
    return program("random_models")


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("seed", SEEDS)
def test_checks_of_a_random_model_are_true(models, seed):
    """There is no wrong verdict, false alarm or disagreement, and the run continues as its unverified twin does."""
    faults, about = models.examine(seed)
    assert faults == [], about


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("name", FAMILIES)
def test_checks_of_a_family_agree_with_the_oracle(models, name, capsys):
    """The families cover encoder-decoders, vision, experts, observers, and each attention backend of a CPU."""
    if name not in {family.name for family in models.oracle.families()}:
        pytest.skip(f"this transformers has no {name}")
    assert [*models.oracle.faults_of_families([name])] == []
    assert capsys.readouterr().out.startswith("1 families: 1 ")


@pytest.mark.parametrize(
    ("required", "status", "hidden", "fault"),
    [
        ("flash", "active", False, None),
        ("flash", "fallback", False, "false alarm"),
        ("flash", "unknown", False, "false alarm"),
        ("flash", "unknown", True, None),
        ("flash", "absent", True, "false alarm"),
        ("flash", None, False, "false alarm"),
        ("math", "active", False, "wrong"),
        ("math", "active", True, "wrong"),
        ("math", "unknown", False, None),
        ("fused", "active", False, None),
        ("fused", "fallback", False, None),
    ],
)
def test_a_check_is_compared_with_the_truth(models, required, status, hidden, fault):
    """A requirement must be active exactly if it holds; unknown is right for a path that cannot be observed."""
    truth = models.Truth(holds=frozenset({"flash"}), free=frozenset({"fused"}), hidden=hidden)
    checks = [SimpleNamespace(path="mode", status=status, observed=None, reason="")] if status else []
    found = [*models.faults_of({"mode": truth}, {"mode": required}, checks)]
    assert [one.partition(":")[0] for one in found] == ([fault] if fault else [])


def test_a_fault_ends_the_program_with_1(models, monkeypatch, capsys):
    """The program prints the seed, the fault and the properties of the run; an exception of the run itself is a
    fault."""
    monkeypatch.setattr(models, "examine", lambda seed: (["wrong: mode"] if seed == 3 else [], ["LoRA"]))
    assert models.main(["--many", "3", "--families", "none"]) == 0
    assert models.main(["--many", "5", "--families", "none"]) == 1
    assert "does not hold: seed 3: wrong: mode [LoRA]" in capsys.readouterr().out
    monkeypatch.setattr(models, "examine", lambda seed: 1 / 0)
    assert models.main(["--seed", "9", "--families", "none"]) == 1
    assert "ZeroDivisionError" in capsys.readouterr().out
