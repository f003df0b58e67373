"""Tests of storage formats: those of other packages, and names that no package has."""

from __future__ import annotations

import pytest

from lorameter.errors import UsageError
from lorameter.studies.request import serving_modes
from lorameter.studies.variant import LoraVariant

DECLARATION = """
from lorameter.studies.quantization import Quantization

EIGHTHS = Quantization(
    name="eighths", implementation="eighths:Eighths", bits=8, fields=("compute_dtype",), merges=False, dequantises=False
)
"""


@pytest.fixture
def install(tmp_path, monkeypatch):
    """A function that installs a package whose entry point declares a format."""

    def write(name, target, code):
        facts = tmp_path / f"{name}-1.0.dist-info"
        facts.mkdir()
        (facts / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {name}\nVersion: 1.0\n")
        (facts / "entry_points.txt").write_text(f"[lorameter.quantizations]\n{name} = {target}\n")
        (tmp_path / f"{name}.py").write_text(code)
        monkeypatch.syspath_prepend(tmp_path)

    return write


@pytest.mark.parametrize(("name", "remedy"), [("nf5", "Did you mean 'nf4'?"), ("int4", "Did you mean 'int8'?")])
def test_an_unknown_format_is_refused_with_the_nearest_name(name, remedy):
    """It is never taken for another format."""
    with pytest.raises(UsageError) as refusal:
        LoraVariant(name="v", quantization=name)
    assert str(refusal.value).startswith(f"variant 'v': quantization = {name!r}: neither lorameter nor an installed")
    assert str(refusal.value).endswith(remedy)


def test_a_format_of_another_package_states_what_it_stores_and_supports(install):
    """Bits, the fields with an effect, the checks and the modes of serving follow from the declaration."""
    install("eighths", "eighths:EIGHTHS", DECLARATION)
    variant = LoraVariant(name="v", quantization="eighths", compute_dtype="float16")
    assert (variant.stored_bits, variant.base_dtype) == (8, "float16")
    assert variant.id == LoraVariant(quantization="eighths", compute_dtype="float16", double_quant=False).id
    assert variant.storage_checks == {"base.bits": 8, "base.quant_type": None, "base.compute_dtype": "float16"}
    own = [way.name for group in serving_modes(variant) for way in group if way.variant.quantization == "eighths"]
    assert own == ["unmerged, eighths", "no adapter, eighths", "unmerged, eighths, asked again"]
    with pytest.raises(UsageError, match=r"merge_adapter = True: no adapter can be merged into eighths weights"):
        LoraVariant(quantization="eighths", merge_adapter=True)


@pytest.mark.parametrize(
    ("name", "target", "code", "why"),
    [
        ("broken", "broken:MISSING", "", "broken:MISSING cannot be loaded"),
        ("other", "other:EIGHTHS", DECLARATION, "other:EIGHTHS is no Quantization of this name"),
    ],
)
def test_an_entry_point_that_declares_no_such_format_is_refused(install, name, target, code, why):
    """The message names the entry point and the remedy."""
    install(name, target, code)
    with pytest.raises(UsageError, match=why):
        LoraVariant(quantization=name)
