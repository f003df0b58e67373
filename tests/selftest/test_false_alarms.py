"""The program that looks for false alarms, on verdicts that are made up and on one real trial."""

import pytest


@pytest.fixture
def verdict(program):
    """The module, and a function that makes the verdict of an instrument on one claim of four bits."""
    module = program("false_alarms")

    def make(*, status="active", required=4, instrument="profile", path="base.bits", judged=True):
        check = {"path": path, "required": required, "status": status, "reason": "as made up"}
        return module.Verdict(
            case="case", model="model", phase="train", instrument=instrument, required={path: 4},
            checks=(check,) if judged else (),
        )  # fmt: skip

    return module, make


@pytest.mark.parametrize(
    ("given", "reason"),
    [
        ({"status": "fallback"}, "base.bits: 4 is claimed, judged against 4, fallback: as made up"),
        ({"required": None}, "judged against None"),
        ({"judged": False}, "was not judged"),
        ({"judged": False, "instrument": "spy"}, "was not judged"),
        ({"judged": False, "path": "packing.isolated"}, "was not judged"),
    ],
)
def test_a_claim_that_does_not_hold_is_an_exit_status(verdict, monkeypatch, capsys, given, reason):
    """Not active, against another value, or not judged: exit 1, with case, phase, instrument and reason."""
    module, make = verdict
    monkeypatch.setattr(module, "judge", lambda case, folder: [make(**given)])
    assert module.main(["--model", "tiny-llama"]) == 1
    printed = " ".join(capsys.readouterr().out.split())
    assert "false alarm: model, case, train, " in printed
    assert reason in printed
    assert "holds" not in printed


@pytest.mark.parametrize("given", [{}, {"judged": False, "path": "packing.isolated", "instrument": "spy"}])
def test_claims_that_hold_are_counted(verdict, monkeypatch, capsys, given):
    """Exit 0; what the spy leaves to the profile is no alarm."""
    module, make = verdict
    monkeypatch.setattr(module, "judge", lambda case, folder: [make(**given)])
    assert module.main(["--model", "tiny-llama"]) == 0
    assert "holds: no false alarm" in capsys.readouterr().out


def test_the_grid_and_every_study_are_judged(program):
    """Eight combinations and every study's variants once, fitted to a CPU, all on the model named; on another model
    than theirs the studies are cut short."""
    from harness.studies.study_file import builtin_studies, load_study

    module = program("false_alarms")
    studies = [load_study(name, device="cpu") for name in builtin_studies()]
    for model, length in (("tiny-llama", 128), ("random:smollm2-135m", 64)):
        cases = list(module.cases(model))
        grid = {(case.variant.dtype, case.variant.quantization, case.workload.layout) for case in cases[:8]}
        assert len(grid) == 8
        assert {case.variant for case in cases[8:]} == {variant for study in studies for variant in study.variants}
        assert len({(case.variant, case.workload) for case in cases}) == len(cases)
        assert {case.workload.model for case in cases} == {model}
        assert {case.workload.sequence_length for case in cases if ":" in case.name} <= {length, 64}


@pytest.mark.parametrize(("layout", "only"), [("packed", "packing.isolated"), ("padded", "attention.mask")])
def test_a_real_trial_raises_no_alarm(program, tmp_path, layout, only):
    """Two variants of the grid: both instruments, in training and in generation; what is padded has a mask."""
    module = program("false_alarms")
    case = next(case for case in module.cases("tiny-llama") if case.name == f"bfloat16 nf4 {layout}")
    verdicts = list(module.judge(case, tmp_path))
    assert [(one.phase, one.instrument) for one in verdicts] == [
        ("train", "profile"), ("train", "spy"), ("generate", "profile"), ("generate", "spy"),
    ]  # fmt: skip
    assert [alarm for one in verdicts for alarm in one.alarms] == []
    assert {only, "base.double_quant", "lora.learning"} <= set(verdicts[0].active)
