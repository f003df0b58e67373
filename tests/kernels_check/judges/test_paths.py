"""The paths are joined from their judges: each is exported once, and says what it takes to judge it."""

import subprocess
import sys

import pytest

from kernels_check.check import INSTRUMENTS
from kernels_check.judges import (
    adapter,
    attached,
    attention,
    base_layers,
    base_products,
    batch,
    execution,
    fused,
    learning,
    loss,
    optimizer,
    trained,
)
from kernels_check.judges.paths import PATHS, REQUIREMENTS

JUDGES = (
    *(attention, batch, loss, base_layers, base_products, attached),
    *(learning, adapter, trained, optimizer, execution, fused),
)
LEFT_OUT = {
    "attention": {"attention.backend", "attention.dtype", "attention.mask"},
    "recomputation": {"checkpointing", "checkpointing.layers"},
    "compilation": {"compile", "compile.share", "fused.kernels"},
    "update": {"optimizer.fused"},
    "products": {"base.compute_dtype"},
    "product_paths": {"base.gemm_path"},
    "kernels": {"tf32"},
    "inputs": {"padding.share", "loss.tokens"},
}


def test_no_path_is_exported_twice():
    """One judge would silently replace the other."""
    assert sum(len(judge.PATHS) for judge in JUDGES) == len(PATHS)
    assert list(REQUIREMENTS) == list(PATHS)


def test_every_path_is_judged_where_it_is_exported():
    """A judge is a function of the module whose table names it."""
    for module in JUDGES:
        assert {judged.judge.__module__ for judged in module.PATHS.values()} == {module.__name__}


@pytest.mark.parametrize("evidence", LEFT_OUT)
def test_what_rests_on_evidence_is_left_out_without_it(evidence):
    """And nothing else is."""
    assert {path for path, judged in PATHS.items() if evidence in judged.rests_on} == LEFT_OUT[evidence]


def test_what_rests_on_no_call_of_a_module_is_judged_where_those_could_not_be_watched():
    """Storage, values before and after, and the optimizer; nothing else is."""
    storage = {f"base.{one}" for one in ("bits", "bytes_in_4bit", "quant_type", "double_quant", "frozen")}
    optimizers = {f"optimizer.{one}" for one in ("class", "fused", "paged_share")}
    values = {"lora.dtype", "lora.learning", "embedding.trained", "norms.trained", "tf32"}
    assert {path for path, judged in PATHS.items() if not judged.by_modules} == storage | optimizers | values
    updated = {"lora.learning", "embedding.trained", "norms.trained"}
    assert {path for path, judged in PATHS.items() if judged.takes_update} == optimizers | updated


def test_only_isolation_takes_a_batch_and_a_profile():
    """Its forwards are left to the profile; all others are judged by either instrument."""
    assert [path for path, judged in PATHS.items() if judged.packed] == ["packing.isolated"]
    assert [path for path, judged in PATHS.items() if judged.instruments != INSTRUMENTS] == ["packing.isolated"]


def test_the_judges_load_no_torch():
    """A requirement is refused before anything heavy is imported."""
    code = "import sys; from kernels_check.judges import paths; print({'torch', 'numpy'} & set(sys.modules))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "set()"
