"""Tests that a study's dtype follows the machine, by timed products, and that emulated dtypes are reported."""

from __future__ import annotations

import dataclasses
import json

import pytest

from lorameter.cli import main
from lorameter.machine.products import add_products, make_target
from lorameter.studies.study_file import load_study

NATIVE = {"float32": 100.0, "bfloat16": 170.0, "float16": 40.0}
EMULATED = {"float32": 54.0, "bfloat16": 1.3, "float16": 1.3}
TWO = """[[variant]]
name = "narrow"
dtype = "bfloat16"
[[variant]]
name = "open"
"""


@pytest.fixture
def slow_products(tmp_path, monkeypatch):
    """A torch without oneDNN, which multiplies 16-bit dtypes in its scalar loop, as on a CPU without AVX-512."""
    (tmp_path / "sitecustomize.py").write_text("import torch\ntorch.backends.mkldnn.enabled = False\n")
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    monkeypatch.setenv("LORAMETER_CACHE", str(tmp_path / "cache"))


@pytest.mark.parametrize(
    ("change", "dtype", "why"),
    [
        ({"gflops": NATIVE}, "bfloat16", "1.7 times faster than float32 (170 against 100 GFLOP/s)"),
        ({"gflops": EMULATED}, "float32", "42 times slower than float32 (1.3 against 54 GFLOP/s)"),
        ({"gflops": {}}, "float32", "could not be timed"),
        ({"device": "cuda", "device_name": "NVIDIA H100 80GB HBM3"}, "bfloat16", "has products of bfloat16"),
        ({"device": "cuda", "device_name": "Tesla T4"}, "float32", "has no products of bfloat16"),
        ({"device": "cuda", "device_name": "Quadro RTX 6000", "capability": (7, 5)}, "float32", "has no products"),
        ({"device": "cuda", "device_name": "GPU of tomorrow", "capability": (13, 0)}, "bfloat16", "has products"),
    ],
)
def test_the_dtype_follows_the_machine(machine, change, dtype, why):
    """bfloat16 is chosen where it is multiplied at least as fast as float32, on a CPU by measured rates."""
    target = make_target(dataclasses.replace(machine, **change))
    study = load_study("lora-or-qlora", target=target)
    assert {one.dtype for one in study.built} == {one.compute_dtype for one in study.built} == {dtype}
    assert study.dtype.startswith(f"{dtype}: ")
    assert why in study.dtype


def test_products_are_timed_once(machine, tmp_path, monkeypatch):
    """The rates of a CPU come from real products, and later from the cache; a damaged file is timed again."""
    monkeypatch.setenv("LORAMETER_CACHE", str(tmp_path))
    rates = add_products(machine).gflops
    assert set(rates) == {"float32", "bfloat16", "float16"}
    assert min(rates.values()) > 0
    (file,) = (tmp_path / "products").iterdir()
    file.write_text(json.dumps(NATIVE))
    assert add_products(machine).gflops == NATIVE
    file.write_text("{")
    assert add_products(machine).gflops != NATIVE


def test_a_dry_run_names_the_dtype_and_what_is_emulated(slow_products, tmp_path, capsys):
    """On a CPU that emulates bfloat16 the open variant is float32, and the other one gets a notice with the remedy."""
    path = tmp_path / "two.toml"
    path.write_text(TWO)
    assert main(["run", str(path), "--dry-run", "--runs-dir", str(tmp_path / "runs")]) == 0
    printed = " ".join(capsys.readouterr().out.split())
    assert "dtype float32: this CPU multiplies bfloat16" in printed
    assert "dtype-emulated bfloat16 in narrow: this CPU emulates it" in printed
    assert 'Set dtype and compute_dtype to "auto"' in printed


def test_the_doctor_shows_which_dtypes_are_emulated(slow_products, capsys):
    """Its row has the rate of each dtype and the emulated ones."""
    main(["doctor", "--json"])
    (row,) = [one for one in json.loads(capsys.readouterr().out)["checks"] if one["name"] == "dtypes"]
    assert "emulated: bfloat16, float16" in row["found"]
    assert row["grade"] == "note"
