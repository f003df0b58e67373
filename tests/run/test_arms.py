"""The trials of a replicate: the selected variants, the reference, and the control."""

from lorameter.run.plan import arms_of


def named(arms):
    return [(one.variant.name, one.role) for one in arms]


def test_selecting_never_drops_the_reference_or_the_control(small_study):
    """A ratio needs its denominator, and a run its control; another order of the selection is the same."""
    whole = [("plain", "variant"), ("nf4", "variant"), ("plain", "control")]
    assert named(arms_of(small_study)) == named(arms_of(small_study, ["nf4"])) == whole
    assert named(arms_of(small_study, ["plain"])) == [whole[0], whole[2]]
    assert [one.name for one in arms_of(small_study)] == ["plain", "nf4", "plain-control"]
