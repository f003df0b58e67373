"""The program that looks for false alarms, on verdicts that are made up, on one real trial and on healthy twins."""

import re
from pathlib import Path
from types import SimpleNamespace

import peft
import pytest

SELFTEST = Path(__file__).parents[2] / "benchmarks" / "selftest"


def healthy_twins():
    """Names of the healthy twins that are quick: all but families, loops and runs of two ranks."""
    text = "".join((SELFTEST / f"{name}.py").read_text() for name in ("healthy", "healthy_methods", "healthy_steps"))
    methods = re.findall(r'^    "([^"\n]+)": lambda', text, re.MULTILINE)
    return list(dict.fromkeys(methods)), re.findall(r'^@twin\("(.+)"\)$', text, re.MULTILINE)


METHODS, STEPS = healthy_twins()


@pytest.fixture
def without_twins(program, monkeypatch):
    """The program, which knows no healthy twins."""
    module = program("false_alarms")
    monkeypatch.setattr(module, "MAKERS", {})
    monkeypatch.setattr(module, "RANKED", {})
    return module


@pytest.fixture
def verdict(without_twins):
    """The module, and a function that makes the verdict of an instrument on one claim of four bits."""
    module = without_twins

    def make(*, status="active", required=4, instrument="profile", path="base.bits", judged=True):
        check = {"path": path, "required": required, "status": status, "reason": "as made up"}
        return module.Verdict(
            case="case", model="model", phase="train", instrument=instrument, required={path: 4},
            checks=(check,) if judged else (),
        )  # fmt: skip

    return module, make


@pytest.mark.parametrize(
    ("path", "instrument", "compiled", "alarms"),
    [
        ("optimizer.fused", "spy", True, 0),
        ("optimizer.fused", "spy", False, 1),
        ("optimizer.fused", "profile", True, 1),
        ("base.bits", "spy", True, 1),
    ],
)
def test_the_spy_leaves_the_operators_of_compiled_code_to_a_profile(verdict, path, instrument, compiled, alarms):
    """And nothing else, nor where nothing is compiled."""
    module, _ = verdict
    met = {"path": "compile", "required": compiled, "status": "active", "reason": "as made up"}
    one = module.Verdict(
        case="case", model="model", phase="train", instrument=instrument, required={path: True, "compile": compiled},
        checks=(met,),
    )  # fmt: skip
    assert len(one.alarms) == alarms


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
    studies = [study for study in studies if study.engine is None or not study.engine.obstacle("cpu")]
    for model, lengths in (("tiny-llama", {64, 128, 256}), ("random:smollm2-135m", {64})):
        cases = list(module.cases(model))
        grid = {(case.variant.dtype, case.variant.quantization, case.workload.layout) for case in cases[:8]}
        assert len(grid) == 8
        assert {case.variant for case in cases[8:]} == {variant for study in studies for variant in study.variants}
        assert len({(case.variant, case.workload) for case in cases}) == len(cases)
        assert {case.workload.model for case in cases} == {model}
        assert {case.workload.sequence_length for case in cases if ":" in case.name} <= lengths


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


@pytest.mark.parametrize("name", [*(f"PEFT: {method}" for method in METHODS), *STEPS])
def test_a_healthy_twin_raises_no_alarm(program, name):
    """Methods of PEFT and everyday steps: both instruments find all that is claimed active."""
    module = program("false_alarms")
    try:
        found = [alarm for one in module.judge_twin(name) for alarm in one.alarms]
    except module.SkippedError as reason:
        pytest.skip(str(reason))
    assert found == []


def test_every_type_that_peft_has_is_among_the_twins(program):
    """A new one is to be tried. X-LoRA is a twin of its own, and AdaMSS is not even configured without scikit-learn."""
    module = program("healthy_methods")
    kinds = {make().peft_type for name, make in module.METHODS.items() if name != "AdaMSS"}
    assert kinds | {peft.PeftType.XLORA, peft.PeftType.ADAMSS} == set(peft.PeftType)


def test_there_are_as_many_twins_as_the_proof_needs(program):
    """Twelve methods of PEFT, forty families, five loops of others, and runs of two ranks of which one is sick."""
    module = program("false_alarms")
    count = {kind: sum(name.startswith(kind) for name in module.MAKERS) for kind in ("PEFT", "family", "loop")}
    assert count["PEFT"] >= 12
    assert count["family"] >= 40
    assert count["loop"] >= 5
    sick = [name for name, run in module.RANKED.items() if run.sick]
    assert sick == ["ranks: FSDP2, NF4, left in eval mode, computes wrong losses"]
    assert len(module.RANKED) >= 6


@pytest.mark.parametrize(
    ("found", "sick", "status", "said"),
    [
        (["active"], False, 0, "holds: no false alarm in 1 judged claims"),
        (["fallback"], False, 1, "false alarm: rank 0, run, train, spy: base.bits: 4 is claimed"),
        (["fallback"], True, 0, "holds"),
        (["active"], True, 1, "false alarm: run, rank 0, spy: not found"),
        (["fallback", "active"], True, 1, "not found"),
        (ValueError("broken"), False, 1, "false alarm: run: raised ValueError('broken')"),
    ],
)
def test_twins_are_judged_by_what_they_are(without_twins, monkeypatch, capsys, found, sick, status, said):
    """A healthy one must raise no alarm; a sick one must, in every rank; one that raises is an alarm."""
    module = without_twins

    def judge(name):
        if isinstance(found, Exception):
            raise found
        for one in found:
            check = {"path": "base.bits", "required": 4, "status": one, "reason": "as made up"}
            yield module._twin_verdict(name, "rank 0", "spy", {"base.bits": 4}, [check])

    monkeypatch.setattr(module, "RANKED", {"run": SimpleNamespace(sick=sick)})
    monkeypatch.setattr(module, "judge_ranks", judge)
    assert module.main(["--twins", "run"]) == status
    assert said in " ".join(capsys.readouterr().out.split())


def test_a_twin_that_cannot_be_built_is_skipped_with_the_reason(without_twins, monkeypatch, capsys):
    """What needs a package that is not there is no alarm, and is said."""
    module = without_twins

    def make():
        raise module.SkippedError("nothing_like_it is not installed")

    monkeypatch.setattr(module, "MAKERS", {"loop": make})
    assert module.main(["--twins", "loop"]) == 0
    assert "skipped: loop: nothing_like_it is not installed" in capsys.readouterr().out
