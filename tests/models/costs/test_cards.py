"""A GPU is found by its words or given by its memory, and what is neither is refused with what would be right."""

from __future__ import annotations

import pytest

from lorameter.errors import UsageError
from lorameter.models.costs.peaks import DEVICES, DRIVER_SHARE, find_card

GIB = 2**30


@pytest.mark.parametrize(("text", "size"), [
    ("24GiB", 24 * GIB), (" 24 gib ", 24 * GIB), ("24GB", 24 * 10**9), ("40536MiB", 40536 * 2**20),
    ("0.5TiB", 512 * GIB), ("80000MB", 80 * 10**9), ("16TiB", 2**44),
])  # fmt: skip
def test_a_size_is_taken_as_it_is_given(text, size):
    """GiB are of 2^30 bytes and GB of 10^9; of no device by name."""
    card = find_card(text)
    assert (card.total_bytes, card.device_name, card.source) == (size, "", "as given")
    assert card.usable_bytes == int(size * (1 - DRIVER_SHARE)) < size


@pytest.mark.parametrize(("text", "label", "mib"), [
    ("H100", "H100 80GB", 81559), ("h100 pcie", "H100 80GB", 81559), ("H100 80GB", "H100 80GB", 81559),
    ("NVIDIA H100 80GB HBM3", "H100 80GB", 81559), ("H200", "H200 141GB", 143771), ("A100 40GB", "A100 40GB", 40960),
    ("a100-80gb", "A100 80GB", 81920), ("A100 80", "A100 80GB", 81920), ("A100-SXM4-40GB", "A100 40GB", 40960),
    ("L4", "L4 24GB", 23034), ("L40S", "L40S 48GB", 46068), ("A10", "A10 24GB", 23028), ("T4", "T4 16GB", 15360),
    ("Tesla T4", "T4 16GB", 15360), ("V100 32GB", "V100 32GB", 32768), ("RTX 4090", "RTX 4090 24GB", 24564),
    ("rtx4090", "RTX 4090 24GB", 24564), ("4090", "RTX 4090 24GB", 24564), ("RTX 3090", "RTX 3090 24GB", 24576),
    ("NVIDIA GeForce RTX 5090", "RTX 5090 32GB", 32607),
])  # fmt: skip
def test_a_name_is_found_by_its_words(text, label, mib):
    """With or without the maker, the form factor and the memory; as people write it or as nvidia-smi prints it."""
    card = find_card(text)
    assert (card.name, card.total_bytes) == (label, mib * 2**20)
    assert "nvidia-smi" in card.source


def test_every_card_is_found_by_what_it_is_called():
    """By each of its names and by its label, with the memory of the table."""
    for device in DEVICES:
        for name in (*device.names, device.label):
            assert find_card(name).total_bytes == device.memory_bytes, name


def test_a_card_shows_no_more_than_it_is_sold_as():
    """A vendor's GB are GiB of chips, of which ECC may take a sixteenth before the driver shows any."""
    for device in DEVICES:
        assert 0.92 <= device.memory_mib / 1024 / device.sold_gb <= 1, device.label


@pytest.mark.parametrize(("text", "choices"), [
    ("A100", ("A100 40GB", "A100 80GB")), ("V100", ("V100 16GB", "V100 32GB")), ("RTX", ("RTX 3090", "RTX 5090")),
])  # fmt: skip
def test_a_name_of_cards_of_different_memory_is_refused_with_the_choices(text, choices):
    """Each choice can be typed."""
    with pytest.raises(UsageError, match="several, of different memory") as refused:
        find_card(text)
    for choice in choices:
        assert choice in str(refused.value)
        assert find_card(choice)


@pytest.mark.parametrize("text", [
    "L40", "A10G", "H100 96GB", "RTX 4090 Laptop GPU", "4090 Ti", "MI300X", "", "  ", "nvidia", "GB", "½GiB", "٢٤GiB",
    "24GiB; rm", "x" * 5000, "\x1b]0;t\x07", "TPU",
])  # fmt: skip
def test_an_unknown_name_is_refused_with_the_known_ones(text):
    """And that a size can be given; a relative of a GPU is another GPU; a long name is shortened in the message."""
    with pytest.raises(UsageError) as refused:
        find_card(text)
    said = str(refused.value)
    assert "24GiB" in said
    assert len(said) < 500
    assert said.isprintable()
    assert "Known: A100 40GB" in said


@pytest.mark.parametrize("text", ["24", "80", "40", "-3GiB", "1,5GiB", "24XB", "24GiBs", "1e30GiB", "nanGiB"])
def test_a_size_without_number_or_unit_is_refused(text):
    """Naming what was written, and what would be right."""
    with pytest.raises(UsageError, match="unit") as refused:
        find_card(text)
    assert "--gpu" in str(refused.value)
    assert len(str(refused.value)) < 500
