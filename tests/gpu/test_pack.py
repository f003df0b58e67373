"""Tests that the packed folder has everything for a machine without a network, and that results are unpacked into their
places."""

from __future__ import annotations

import re
import tomllib
from pathlib import Path

from packaging.requirements import Requirement

from benchmarks.gpu import pack

ROOT = Path(__file__).parents[2]
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
PREINSTALLED = frozenset(
    "torch transformers accelerate safetensors tokenizers numpy scipy pandas pyarrow pytest pytest-benchmark "
    "pytest-timeout hypothesis psutil nvidia-ml-py filelock rich threadpoolctl packaging jinja2 pip".split()
)
"""Packages that an image with torch, transformers, scikit-learn and pytest is assumed to have, with their
dependencies."""


def name(requirement):
    return re.sub(r"[-_.]+", "-", Requirement(requirement).name).lower()


def packed_requirements():
    lines = [line for line in pack.CARRIED.read_text().splitlines() if not line.startswith("#")]
    return {name(line): Requirement(line) for line in lines}


def test_every_dependency_is_packed_or_assumed():
    """Packed or assumed packages cover all dependencies and the additional imports of tests marked `gpu`."""
    needed = {name(one) for one in PROJECT["dependencies"]} | {"hypothesis", "pytest-timeout", "psutil", "gguf"}
    assert needed <= set(packed_requirements()) | PREINSTALLED
    assert not set(packed_requirements()) & PREINSTALLED


def test_packed_packages_are_pinned_within_the_allowed_versions():
    """Each package has a single version, so that the packed versions are the tested ones."""
    allowed = {name(one): Requirement(one).specifier for one in PROJECT["dependencies"]}
    for one, requirement in packed_requirements().items():
        version = re.fullmatch(r"==([\w.]+)", str(requirement.specifier))
        assert version, one
        assert version[1] in allowed.get(one, requirement.specifier), one


def test_results_of_a_call_are_unpacked_into_their_places(tmp_path, monkeypatch):
    """State, reports and page are unpacked into their places; large files are left out."""
    there, here = tmp_path / "there", tmp_path / "here"
    monkeypatch.setattr(pack, "ROOT", there)
    monkeypatch.setattr(pack, "MAX_PACKED_BYTES", 10)
    for file, text in (
        (".gpu/elsewhere/journal.jsonl", "{}"), (".gpu/elsewhere/runs/a/tokens", "x" * 11),
        ("reports/2027_card_gpu/report.txt", "r"), ("reports/proof/other.txt", "o"), ("docs/gpu.md", "p"),
    ):  # fmt: skip
        (there / file).parent.mkdir(parents=True, exist_ok=True)
        (there / file).write_text(text)
    archive = pack.pack_results(tmp_path, there / ".gpu" / "elsewhere", there / "reports", there / "docs" / "gpu.md")
    here.mkdir()
    assert sorted(pack.unpack_results(archive, here)) == [
        ".gpu/state/journal.jsonl", "docs/gpu.md", "reports/2027_card_gpu/report.txt",
    ]  # fmt: skip
    assert (here / "docs" / "gpu.md").read_text() == "p"
