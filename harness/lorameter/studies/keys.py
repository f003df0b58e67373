"""Keys that a study file does not have, answered with the key that was meant.

Other tools call the same things by other names, and put all of them into one table. So a key is looked for under its
other names and in the other tables before the nearest spelling is.
"""

from __future__ import annotations

import dataclasses
import difflib
from collections.abc import Mapping, Sequence
from typing import Any, Literal

from lorameter.errors import UsageError, impossible
from lorameter.studies.protocol import Protocol
from lorameter.studies.study import OF_WORKLOAD
from lorameter.studies.variant import KEYS as VARIANT_KEYS
from lorameter.studies.workload import OF_VARIANTS, Workload

Table = Literal["workload", "protocol", "controls"]
KEYS: Mapping[Table, tuple[str, ...]] = {
    "workload": tuple(field.name for field in dataclasses.fields(Workload)),
    "protocol": tuple(field.name for field in dataclasses.fields(Protocol)),
    "controls": VARIANT_KEYS,
}
"""Keys of each table; those of the controls are those of a variant."""
_CALLED: Mapping[Table, str] = {
    "workload": "[workload]",
    "protocol": "[protocol]",
    "controls": "[controls] and [[variant]]",
}
OTHER_NAMES: Mapping[str, str] = {
    "lr": "learning_rate",
    "lora_r": "r",
    "rank": "r",
    "lora_rank": "r",
    "load_in_4bit": "quantization",
    "load_in_8bit": "quantization",
    "bnb_4bit_quant_type": "quantization",
    "bnb_4bit_use_double_quant": "double_quant",
    "bnb_4bit_compute_dtype": "compute_dtype",
    "torch_dtype": "dtype",
    "bf16": "autocast",
    "fp16": "autocast",
    "attn_implementation": "attention",
    "optim": "optimizer",
    "lr_scheduler_type": "schedule",
    "torch_compile": "compile",
    "per_device_train_batch_size": "batch_size",
    "max_length": "sequence_length",
    "max_seq_length": "sequence_length",
    "packing": "layout",
    "model_name_or_path": "model",
    "dataset_name": "data",
    "max_new_tokens": "new_tokens",
    "num_train_epochs": "epochs",
    "max_steps": "turns",
    "steps": "turns",
}
"""Keys by what PEFT, transformers, TRL and their users call the same."""
_METHODS = ("peft_type", "peft_method", "use_vera", "use_adalora", "use_loha", "use_lokr", "use_ia3", "use_oft")
"""Keys that choose another method than LoRA."""


def check_keys(where: str, table: Table, content: Any) -> None:
    """Raises `UsageError` for a key that a table of a study file does not have; `where` names both. What is no table is
    refused where it is read."""
    for key, value in content.items() if isinstance(content, Mapping) else ():
        if key not in KEYS[table]:
            raise unknown_key(where, key, value, KEYS[table])


def check_axes(where: str, content: Mapping[str, Any]) -> None:
    """Raises `UsageError` for a key of [axes], [sweeps] or a variant that neither a variant nor its workload has."""
    for key, value in content.items():
        name = key.removeprefix(OF_WORKLOAD)
        if name == key:
            check_keys(where, "controls", {key: value})
        elif name not in KEYS["workload"]:
            raise unknown_key(where, name, value, OF_VARIANTS, shown=key)
        elif name not in OF_VARIANTS:
            raise impossible(where, key, value, "equal for all variants", "Write one value in [workload].")


def unknown_key(where: str, key: str, value: Any, known: Sequence[str], *, shown: str = "") -> UsageError:
    """What to answer to a key that is none of those known there; `shown` is the key as it was written."""
    shown, meant = shown or key, OTHER_NAMES.get(key, key)
    if key in _METHODS:
        why = "a method of PEFT is named in peft"
        return impossible(where, shown, value, why, 'Write peft = { peft_type = "IA3" }.')
    if meant not in known and (home := next((table for table, keys in KEYS.items() if meant in keys), None)):
        return impossible(where, shown, value, "unknown key here", f"{meant} is a key of {_CALLED[home]}.")
    near = [meant] if meant in known else difflib.get_close_matches(key, known, n=1)
    remedy = f"Did you mean {near[0]}?" if near else "`lorameter list keys` prints all keys."
    return impossible(where, shown, value, "unknown key", remedy)
