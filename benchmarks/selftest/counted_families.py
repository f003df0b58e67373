"""Are the FLOPs that are counted from a model's modules those of its step? Every causal family of transformers.

    python benchmarks/selftest/counted_families.py [--families gpt2 mixtral] [--within 0.05]

Each family that can be built small with random weights takes a step with an adapter on all its linear layers, and one
in which all weights train. What `harness.models.costs.modules` counts of it, once the step has been watched, is set
against what torch's own counter sees of the operators. Where it is further off than a twentieth the family must be
among the exceptions, each with the reason, and whoever is among them must be off.

Exit status 1, with the families, if anything is not so.
"""

from __future__ import annotations

import os

os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("HF_HUB_OFFLINE", "1")

import argparse
import inspect
import logging
import sys
import warnings
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from families import ROWS, Family, UnfitError, families, inputs_of
from flop_counting import counted_flops
from peft import LoraConfig, get_peft_model

from harness.machine import provenance
from harness.models.costs.flops import StepTokens
from harness.models.costs.modules import UncountedError, count_products
from harness.trial.profiling.wanted import see_wanted

TASK = "AutoModelForCausalLM"
WITHIN = 0.05
LENGTH = 32
"""Tokens of a row; of fewer what is multiplied once a pass, or padded to whole blocks, would be most of a step."""
STEP = StepTokens(positions=ROWS * LENGTH, pairs=ROWS * LENGTH**2)
WAYS = ("adapter", "all weights")
REASONS: Mapping[str, str] = {
    "scans and convolutions are not counted, and of convolutions torch counts those of each channel as of all":
        """bailing_hybrid falcon_h1 falcon_mamba inkling_text jamba kimi_linear lara_mini lfm3 mamba nemotron_h
        olmo_hybrid qwen3_5 qwen3_5_moe qwen3_5_moe_text qwen3_5_text qwen3_next qwen4_exp qwen4_exp_text
        recurrent_gemma""",
    "what chooses the pairs that attend has no gradient, and scores of its own": "axk2 deepseek_v32 glm_moe_dsa hy_v4",
    "its experts are adapted as one tensor, whose whole update PEFT makes twice": "cohere2_moe",
    "it goes through its blocks several times": "dory hrm_text",
    "every position goes through all experts": "llama4 llama4_text",
    "each expert that is chosen has heads of its own": "jetmoe",
    "each head attends twice": "diffllama",
    "it puts positions before the text": "cpmant git",
    "it goes on with several tokens at once": "prophetnet",
    "its attention has weights in no layer": "xlnet",
}  # fmt: skip
EXCEPTIONS: Mapping[str, str] = {family: reason for reason, names in REASONS.items() for family in names.split()}
"""Families whose count is off, and why."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Result:
    """What came of one family."""

    family: str
    errors: Mapping[str, float]
    """What is counted over what torch sees, less one, by the way in which it trains."""
    left_out: Mapping[str, str]
    """Why there is none of a way."""

    def off(self, within: float) -> bool:
        """Whether any is further off."""
        return any(abs(error) > within for error in self.errors.values())


def main() -> int:
    """Count every family, print a line each, and what is not as it is said to be."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--families", nargs="*", help="only these")
    parser.add_argument("--within", type=float, default=WITHIN)
    options = parser.parse_args()
    quiet()
    versions = ", ".join(f"{name} {provenance.library_version(name)}" for name in ("torch", "transformers", "peft"))
    print(versions)
    results = []
    for family in causal():
        if options.families and family.name not in options.families:
            continue
        one = examine(family)
        results.append(one)
        said = [f"{way} {one.errors[way]:+.2%}" if way in one.errors else f"{way}: {one.left_out[way]}" for way in WAYS]
        why = f"  ({EXCEPTIONS[one.family]})" if one.family in EXCEPTIONS else ""
        print(f"{one.family:24}{'; '.join(said)}{why}", flush=True)
    counted = [one for one in results if one.errors]
    faults = list(faults_in(results, options.within))
    exact = sum(not one.off(0.002) for one in counted)
    print(
        f"{len(counted)} of {len(results)} families counted, {exact} within 0.2 %, "
        f"{sum(not one.off(options.within) for one in counted)} within {options.within:.0%}; faults: "
        f"{'; '.join(faults) or 'none'}"
    )
    return int(bool(faults))


def faults_in(results: list[Result], within: float) -> Iterator[str]:
    """Families that are off and not said to be, and the other way round."""
    for one in results:
        if one.errors and one.off(within) != (one.family in EXCEPTIONS):
            yield f"{one.family} is {'off' if one.off(within) else 'no exception any more'}"


def causal() -> Iterator[Family]:
    """The families that go on with a text."""
    return (one for one in families() if one.task == TASK)


def examine(family: Family) -> Result:
    """A step in each way."""
    errors: dict[str, float] = {}
    left_out: dict[str, str] = {}
    for way in WAYS:
        try:
            errors[way] = error_of(family, adapter=way == "adapter")
        except (UnfitError, UncountedError) as reason:
            left_out[way] = str(reason)
    return Result(family=family.name, errors=errors, left_out=left_out)


def error_of(family: Family, *, adapter: bool) -> float:
    """What is counted of a step over what torch sees of it, less one.

    Raises:
        UnfitError: it cannot be built, adapted or trained like this.
        UncountedError: its modules do not say what it multiplies.
    """
    model = family.build(experts_implementation="eager")  # torch counts no product of several groups
    batch: dict[str, Any] = inputs_of(model) | {"input_ids": torch.randint(3, 90, (ROWS, LENGTH))}
    if "use_cache" in inspect.signature(model.forward).parameters:
        batch["use_cache"] = False
    model, step = _training(model, batch, adapter=adapter)
    try:
        counted = counted_flops(step)
    except Exception as error:
        raise UnfitError(f"cannot be trained: {type(error).__name__}: {str(error).splitlines()[0][:100]}") from error
    return count_products(model, see_wanted(model, step)).flops(STEP, fused=counted.fused).hardware / counted.total - 1


def _training(model: Any, batch: Mapping[str, Any], *, adapter: bool) -> tuple[Any, Callable[[], None]]:
    if adapter:
        try:
            model = get_peft_model(model, LoraConfig(r=4, target_modules="all-linear", task_type="CAUSAL_LM"))
        except Exception as error:
            raise UnfitError(f"PEFT: {type(error).__name__}: {str(error).splitlines()[0][:100]}") from error
    model.train()

    def step() -> None:
        model(**batch, labels=batch["input_ids"]).loss.backward()

    return model, step


def quiet() -> None:
    """What libraries warn of while a family is built is no result."""
    warnings.simplefilter("ignore")
    logging.disable(logging.WARNING)
    torch.set_num_threads(1)


if __name__ == "__main__":
    sys.exit(main())
