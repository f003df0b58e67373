"""Trains every method of PEFT's registry on tiny-llama, in bfloat16 and in NF4.

    python benchmarks/selftest/methods.py

A method passes if its trial is ok, which requires that its checks are active, or if PEFT refuses it with a message.
`METHOD_ARGUMENTS` has the arguments that single methods require; any other method gets those of `COMMON_ARGUMENTS` that
its configuration has.
"""

from __future__ import annotations

import dataclasses
import sys
import tempfile
from pathlib import Path
from typing import Any

from shared import print_origin, report_violations, run_lorameter

from lorameter.models.methods import method_facts
from lorameter.records import store
from lorameter.studies.variant import PeftVariant

COMMON_ARGUMENTS: dict[str, Any] = {"target_modules": ["q_proj", "v_proj"], "num_virtual_tokens": 8, "total_step": 100}
"""Arguments for every method whose configuration has these fields."""
METHOD_ARGUMENTS: dict[str, dict[str, Any]] = {
    "ADALORA": {"tinit": 2, "tfinal": 2},
    "ADAPTION_PROMPT": {"target_modules": None, "adapter_layers": 2, "adapter_len": 4},
    "C3A": {"block_size": 32},
    "CPT": {"cpt_token_ids": list(range(8)), "cpt_tokens_type_mask": [1, 2, 2, 2, 3, 3, 4, 4]},
    "IA3": {"target_modules": ["k_proj", "v_proj", "down_proj"], "feedforward_modules": ["down_proj"]},
    "LN_TUNING": {"target_modules": None},
    "TRAINABLE_TOKENS": {"target_modules": ["embed_tokens"], "token_indices": list(range(64, 128))},
    "VBLORA": {"num_vectors": 32, "vector_length": 32},
}
LEARNING_RATES = {"LN_TUNING": 1e-2}
"""Learning rates other than 1e-3. Norm weights train in the dtype of the base, and bfloat16 rounds 1 + 1e-3 to 1."""
STUDY = """
[workload]
model = "random:tiny-llama"
layout = "padded"
sequence_length = 64

[protocol]
phases = ["train"]
replicates = 1
turns = 1
allow_disturbed = true
"""


def build_variants() -> list[PeftVariant]:
    """Build a variant for each method and base dtype, with the arguments that the method requires."""
    from peft.mapping import PEFT_TYPE_TO_CONFIG_MAPPING

    variants = []
    for kind, config in sorted(PEFT_TYPE_TO_CONFIG_MAPPING.items()):
        name = str(kind.value)
        fields = {one.name for one in dataclasses.fields(config)}
        arguments = {key: value for key, value in COMMON_ARGUMENTS.items() if key in fields}
        arguments |= METHOD_ARGUMENTS.get(name, {})
        peft = {"peft_type": name, **{key: value for key, value in arguments.items() if value is not None}}
        for quantization in ("none", "nf4"):
            label = f"{name.lower()}-{'bf16' if quantization == 'none' else quantization}"
            rate = LEARNING_RATES.get(name, 1e-3)
            variants.append(PeftVariant(name=label, peft=peft, quantization=quantization, learning_rate=rate))
    return variants


def format_toml(value: Any) -> str:
    """Format a value as TOML."""
    if isinstance(value, dict):
        return "{ " + ", ".join(f"{key} = {format_toml(item)}" for key, item in value.items()) + " }"
    if isinstance(value, list):
        return "[" + ", ".join(map(format_toml, value)) + "]"
    return str(value).lower() if isinstance(value, bool) else f'"{value}"' if isinstance(value, str) else str(value)


def main() -> int:
    """Print a line for each variant; return 1 if one neither trains with active checks nor is refused by PEFT."""
    print_origin()
    variants = build_variants()
    facts = method_facts(variants)
    accepted = [one for one in variants if not facts[one.name].refused]
    tables = [
        f'[[variant]]\nname = "{one.name}"\nlearning_rate = {one.learning_rate}\nquantization = "{one.quantization}"\n'
        f"peft = {format_toml(one.peft)}\n"
        for one in accepted
    ]
    outcomes = {name: f"refused: {one.refused}" for name, one in facts.items() if one.refused}
    with tempfile.TemporaryDirectory() as folder:
        path, runs = Path(folder, "methods.toml"), Path(folder, "runs")
        path.write_text(STUDY + "\n".join(tables), encoding="utf-8")
        run_lorameter(["run", str(path), "--runs-dir", str(runs), "--interleave", "replicates", "--json"])
        (run,) = (path for path in runs.iterdir() if path.is_dir())
        for record in store.read_run(str(run), runs).records:
            if record.role == "variant" and "-isolated" not in record.trial:
                reason = "" if record.failure is None else f": {' '.join(record.failure.message.split())}"
                outcomes[record.name] = f"{record.status}{reason}"
    violations = []
    for one in variants:
        fact = facts[one.name]
        abilities = {"b": fact.keeps_base, "s": fact.several, "m": fact.mixes, "g": fact.merges, "r": fact.reloads}
        marks = "".join("?" if value is None else letter if value else "-" for letter, value in abilities.items())
        outcome = outcomes.get(one.name, "not measured")
        print(f"{one.name:32} {marks}  {outcome[:200]}")
        if outcome != "ok" and not outcome.startswith(("refused", "crashed")):
            violations.append(f"{one.name}: {outcome}")
    print("b keeps the base, s several on one base, m mixed batches, g merges, r reloads; - not, ? not tried")
    ok = sum(outcomes.get(one.name) == "ok" for one in variants)
    refused = len(variants) - ok - len(violations)
    print(f"{ok} of {len(variants)} train with their checks, {refused} are refused in PEFT's words")
    return report_violations(violations)


if __name__ == "__main__":
    sys.exit(main())
