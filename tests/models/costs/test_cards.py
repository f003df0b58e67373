"""Tests of `--gpu`: it takes the name of a GPU or a memory size, and refuses anything else with the choices."""

from __future__ import annotations

import pytest

from lorameter.errors import UsageError
from lorameter.models.costs.peaks import DEVICES, DRIVER_SHARE, find_card

GIB = 2**30


@pytest.mark.parametrize(("text", "size"), [
    (" 24 gib ", 24 * GIB), ("24GB", 24 * 10**9), ("40536MiB", 40536 * 2**20), ("0.5TiB", 512 * GIB),
])  # fmt: skip
def test_a_memory_size_is_accepted_as_a_gpu(text, size):
    """A GiB is 2^30 bytes, a GB is 10^9 bytes, and the device has no name."""
    card = find_card(text)
    assert (card.total_bytes, card.device_name, card.source) == (size, "", "as given")
    assert card.usable_bytes == int(size * (1 - DRIVER_SHARE)) < size


@pytest.mark.parametrize(("text", "label", "mib"), [
    ("H100", "H100 80GB", 81559), ("h100 pcie", "H100 80GB", 81559), ("A100 80", "A100 80GB", 81920),
    ("NVIDIA GeForce RTX 5090", "RTX 5090 32GB", 32607), ("Tesla T4", "T4 16GB", 15360),
    ("rtx4090", "RTX 4090 24GB", 24564), ("4090", "RTX 4090 24GB", 24564),
])  # fmt: skip
def test_a_gpu_name_is_found_without_its_optional_words(text, label, mib):
    """Maker, form factor and memory are optional in a name, and the spelling of nvidia-smi is accepted."""
    card = find_card(text)
    assert (card.name, card.total_bytes) == (label, mib * 2**20)
    assert "nvidia-smi" in card.source


def test_every_gpu_is_found_by_each_of_its_names():
    """Each GPU of the table is found by each of its names and by its label."""
    for device in DEVICES:
        for name in (*device.names, device.label):
            assert find_card(name).total_bytes == device.memory_bytes, name


@pytest.mark.parametrize(("text", "choices"), [
    ("A100", ("A100 40GB", "A100 80GB")), ("V100", ("V100 16GB", "V100 32GB")), ("RTX", ("RTX 3090", "RTX 5090")),
])  # fmt: skip
def test_a_name_of_gpus_of_different_memory_is_refused_with_the_choices(text, choices):
    """Each choice in the error is a valid argument."""
    with pytest.raises(UsageError, match="several, of different memory") as refused:
        find_card(text)
    for choice in choices:
        assert choice in str(refused.value)
        assert find_card(choice)


@pytest.mark.parametrize("text", ["L40", "A10G", "RTX 4090 Laptop GPU", "MI300X", "", "GB", "24", "24XB", "x" * 5000])
def test_an_unknown_name_is_refused_with_the_known_ones(text):
    """A similar name is not accepted; the short error says that a memory size can be given instead."""
    with pytest.raises(UsageError) as refused:
        find_card(text)
    assert "Known: A100 40GB" in str(refused.value)
    assert "24GiB" in str(refused.value)
    assert len(str(refused.value)) < 500
