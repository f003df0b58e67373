"""Families of transformers against the step on flash alone: the program on a few families, and on planted lies."""

import pytest

FAMILIES = ("bart", "beam", "clip", "gemma2", "gpt2", "ibert", "mixtral", "siglip", "squeezebert", "xlm")


@pytest.fixture
def oracle(program):
    """The program."""
    return program("oracle")


def family(oracle, name):
    found = [one for one in oracle.families() if one.name == name]
    if not found:
        pytest.skip(f"this transformers has no {name}")
    return found[0]


def result(oracle, **given):
    """One that is all flash and learns, unless told otherwise."""
    told = {"scaled": 1, "refused": 0, "written": 0, "alone": True, "attached": True, "learns": True} | given
    return oracle.Result(family="llama", implementation="sdpa", **told)


@pytest.mark.parametrize("name", FAMILIES)
def test_what_is_said_of_a_family_is_so(oracle, name):
    """Encoder-decoders, vision, experts or names of such, observers, and each backend of a CPU: nothing is at fault."""
    assert oracle.examine(family(oracle, name)).faults == []


def test_the_oracle_knows_each_backend(oracle):
    """Of a scaled dot product, with dropout, written out, or torch's own in a head, without looking at the check.

    Which of the first and the third Gemma 2 takes, whose scores are capped, depends on the transformers.
    """
    truths, asked = {}, {}
    for name in ("llama", "gpt2", "gemma2", "siglip"):
        run = oracle.Run(family(oracle, name))
        with oracle.Attentions() as seen:
            run.step()
        truths[name] = (seen.scaled, seen.refused, seen.written)
        asked[name] = run.model.config._attn_implementation
    capped = {"sdpa": (2, 0, 0), "eager": (0, 0, 2)}[asked["gemma2"]]
    assert truths == {"llama": (2, 0, 0), "gpt2": (2, 2, 0), "gemma2": capped, "siglip": (2, 0, 1)}


@pytest.mark.parametrize(("weights", "counted"), [(True, (0, 0, 1)), (False, (1, 0, 0))])
def test_the_oracle_knows_how_torchs_own_attention_is_done(oracle, weights, counted):
    """With the weights of attention it is written out; without them it is a scaled dot product."""
    import torch

    layer, hidden = torch.nn.MultiheadAttention(8, 2, batch_first=True), torch.randn(2, 3, 8)
    with oracle.Attentions() as seen:
        layer(hidden, hidden, hidden, need_weights=weights)
    assert (seen.scaled, seen.refused, seen.written) == counted


@pytest.mark.parametrize(("name", "still"), [("llama", True), ("granite_speech", True), ("ibert", False)])
def test_the_oracle_knows_what_of_the_base_moves(oracle, name, still):
    """Observers of a quantised model move; a batch norm only where it is called, as one for sound is not by text."""
    run = oracle.Run(family(oracle, name))
    before = run.base()
    run.step()
    after = run.base()
    assert before.keys() == after.keys()
    assert all(oracle._same(before[one], after[one]) for one in before) is still


@pytest.mark.parametrize(
    ("name", "left"), [("llama", ()), ("mixtral", ()), ("beam", ("model.layers.1.mlp.down_proj",))]
)
def test_the_oracle_knows_what_was_asked_for_and_left_out(oracle, name, left):
    """PEFT takes dense layers for experts by their names; in a model that has experts, by right."""
    lost = oracle.Run(family(oracle, name)).lost
    assert set(left) <= set(lost)
    assert bool(lost) is bool(left)


@pytest.mark.parametrize(
    ("status", "truth", "learns", "faults"),
    [
        ("active", "flash", True, []),
        ("fallback", "flash", True, ["attention.backend 'flash' holds, and is fallback"]),
        ("active", None, True, ["attention.backend 'flash' does not hold, and is active"]),
        ("unknown", None, True, []),
        ("active", "flash", False, ["lora.learning True does not hold, and is active"]),
        ("active", "flash", None, []),
    ],
)
def test_what_is_said_is_compared_with_what_is_so(oracle, status, truth, learns, faults):
    """In both directions; what rounding decides is left alone."""
    from kernels_check import Check

    def check(path, status):
        return Check(path=path, required=True, observed=None, status=status, reason="as made up")

    checks = {
        "attention.backend": check("attention.backend", status),
        "lora.learning": check("lora.learning", "active"),
    }
    required = {"attention.backend": "flash", "lora.learning": True}
    found = [*oracle._faults(result(oracle, learns=learns), required, checks, truth)]
    assert [fault.partition(":")[0] for fault in found] == faults


def test_families_are_many_and_small(oracle):
    """Every model type with a task is walked, and what cannot be built small says why."""
    from families import PARAMETERS, UnfitError

    walked = [*oracle.families()]
    assert len({one.name for one in walked}) == len(walked) > 100
    assert {one.task for one in walked} >= {
        "AutoModelForCausalLM", "AutoModelForSeq2SeqLM", "AutoModelForImageClassification", "AutoModelForSpeechSeq2Seq",
    }  # fmt: skip
    model = family(oracle, "llama").build()
    assert sum(value.numel() for value in model.parameters()) < PARAMETERS
    with pytest.raises(UnfitError, match="parameters"):
        family(oracle, "resnet").build()


def test_a_fault_is_an_exit_status(oracle, monkeypatch, capsys):
    """Exit 1 with the family named; and where no family is left, too."""
    found = result(oracle, faults=["wrong"])
    monkeypatch.setattr(oracle, "examine", lambda one: found)
    assert oracle.main(["--families", "llama"]) == 1
    assert "at fault: 1: llama" in capsys.readouterr().out
    found.faults.clear()
    assert oracle.main(["--families", "llama"]) == 0
    assert oracle.main(["--families", "no-such-family"]) == 1
