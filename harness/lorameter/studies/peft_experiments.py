"""Reads files of PEFT: saved configurations, and PEFT's own experiments as a study.

Experiments are unchanged folders of huggingface/peft's `method_comparison/MetaMathQA`:
`experiments/METHOD/NAME/adapter_config.json` is the PEFT configuration (without it, the experiment is full
fine-tuning); `training_params.json` there overrides `default_training_params.json`. Each key has the same effect on a
variant or the workload as in their `run.py`; keys of its evaluation are ignored, since no answers are generated.
"""

from __future__ import annotations

import fnmatch
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from lorameter.errors import UsageError, refused_value, require
from lorameter.records import codec, fileio
from lorameter.records.codec import NotReadableError
from lorameter.studies.protocol import Protocol
from lorameter.studies.study import Study, unknown_word_message
from lorameter.studies.variant import FullVariant, PeftVariant, Variant
from lorameter.studies.workload import DataColumns, Workload

CONFIG_NAME = "adapter_config.json"
_SAVING_KEYS = ("auto_mapping", "base_model_name_or_path", "inference_mode", "peft_version", "revision")
"""Keys of a saved configuration that describe the saving, not the method."""
DEFAULTS, PARAMS = "default_training_params.json", "training_params.json"
_STORED: Mapping[str, dict[str, Any]] = {
    "int8": {"dtype": "float32", "quantization": "int8"},
    "int4": {"dtype": "float32", "quantization": "fp4", "double_quant": False, "compute_dtype": "float32"},
}
"""The experiments' names for quantisation with transformers' defaults."""


def read_config(where: str, path: Path) -> dict[str, Any]:
    """Read the configuration in a file written by PEFT's `save_pretrained`, or in its folder; a null key has its
    default. Raises `UsageError`."""
    file = path / CONFIG_NAME if path.is_dir() else path
    data = _read(f"{where}: peft", file, f"Name an {CONFIG_NAME} or its folder.")
    return {key: value for key, value in data.items() if key not in _SAVING_KEYS and value is not None}


def study_of_experiments(folder: str, select: Sequence[str] = (), *, quality: bool = False) -> Study:
    """The study of the experiments in a folder.

    Args:
        folder: the folder that contains `experiments` and the default parameters.
        select: globs over METHOD/NAME; a glob that begins with "!" excludes. Default: all experiments.
        quality: train each experiment for its number of steps, for the losses, with seeds as replicates; else for tens
            of steps, for the times.

    Raises:
        UsageError: there is no such folder or experiment, or a key is invalid.
    """
    root = Path(folder)
    paths = {
        f"{path.parent.name}/{path.name}": path
        for path in sorted((root / "experiments").glob("*/*"))
        if (path / CONFIG_NAME).is_file() or (path / PARAMS).is_file()
    }
    require(
        paths,
        f"run: --peft-experiments = {folder!r}: no experiments/METHOD/NAME/{CONFIG_NAME} in it. Name "
        "method_comparison/MetaMathQA of a checkout of huggingface/peft.",
    )
    included, excluded = set[str](), set[str]()
    for glob in select:
        matching = fnmatch.filter(paths, glob.removeprefix("!"))
        require(matching, f"run: --select = {glob!r}: {unknown_word_message(glob, list(paths))}")
        (excluded if glob.startswith("!") else included).update(matching)
    chosen = [name for name in paths if name in (included or paths) and name not in excluded]
    require(chosen, f"run: --select = {' '.join(select)}: nothing is left. Exclude less.")
    default = _read("run", root / DEFAULTS)
    params = {
        name: default | (_read("run", paths[name] / PARAMS) if (paths[name] / PARAMS).is_file() else {})
        for name in chosen
    }
    variants = {name: _variant(paths[name], params[name], default) for name in chosen}
    workloads = {name: _workload(params[name], quality=quality) for name in chosen}
    reference = min(chosen, key=lambda name: (paths[name].parent.name != "lora", len(paths[name].name), name))
    common = codec.to_json(workloads[reference])
    own = {
        variants[name].name: {key: value for key, value in codec.to_json(workload).items() if value != common[key]}
        for name, workload in workloads.items()
        if workload != workloads[reference]
    }
    methods = {variant.method_name for variant in variants.values()}
    return Study(
        name="peft-experiments",
        title=f"{len(chosen)} experiments of PEFT, {len(methods)} methods",
        workload=workloads[reference],
        workloads=own,
        protocol=Protocol(phases=("train",), merged=False, peak_replicates=1, epochs=1.0 if quality else 0.0),
        variants=tuple(variants.values()),
        reference=variants[reference].name,
        notes=(
            "Variants are experiments of PEFT's method_comparison; the words around a question are those of "
            "prompt_format.",
        ),
    )


def _read(where: str, path: Path, remedy: str = "Restore it from the checkout.") -> dict[str, Any]:
    try:
        return codec.from_json(dict[str, Any], fileio.read_json(path), str(path))
    except (NotReadableError, UsageError) as error:
        raise UsageError(f"{where}: {path} cannot be read as a table of keys ({error}). {remedy}") from None


def _variant(path: Path, params: Mapping[str, Any], default: Mapping[str, Any]) -> Variant:
    where, name = str(path / PARAMS), f"{path.parent.name}--{path.name}"
    for key, value in params.items():
        if key not in default:
            raise refused_value(where, key, value, "unknown key", unknown_word_message(key, list(default)))
    if params["use_amp"]:
        raise refused_value(where, "use_amp", True, "gradients are not scaled here", "Use dtype in place of it.")
    arguments = dict(params["optimizer_kwargs"])
    optimizer = str(params["optimizer_type"])
    decay = 0.01 if optimizer == "AdamW" else 0.0  # torch's own default
    fields: dict[str, Any] = {
        "name": name,
        "optimizer": "adamw" if optimizer == "AdamW" else optimizer,
        "learning_rate": arguments.pop("lr"),
        "weight_decay": arguments.pop("weight_decay", decay),
        "optimizer_args": arguments,
        "schedule": params["lr_scheduler"] or "constant",
        "warmup_ratio": 0.1 if params["lr_scheduler"] else 0.0,  # WARMUP_STEP_RATIO of their run.py
        "max_grad_norm": params["grad_norm_clip"],
        "gradient_checkpointing": params["use_gc"],
        "compile": params["compile"],
        **_STORED.get(params["dtype"], {"dtype": params["dtype"]}),
    }
    optional = {"attention": params["attn_implementation"]}
    form: type[Variant] = FullVariant
    if (path / CONFIG_NAME).is_file():
        form = PeftVariant
        fields["peft"] = read_config(name, path)
        optional |= {
            "adapter_dtype": None if params["autocast_adapter_dtype"] else fields["dtype"],
            "prefix_text": params["init_kv_cache_prefix"],
        }
    else:
        fields["method"] = "full"
    fields |= {key: value for key, value in optional.items() if value is not None}
    return codec.from_json(form, fields, where)


def _workload(params: Mapping[str, Any], *, quality: bool) -> Workload:
    epoch: dict[str, Any] = {"train_sequences": params["max_steps"] * params["batch_size"]} if quality else {}
    return Workload(
        model=params["model_id"],
        data="meta-math/MetaMathQA",
        columns=DataColumns(prompt="query", completion="response"),
        layout="bucketed",
        sequence_length=params["max_seq_length"],
        batch_size=params["batch_size"],
        **epoch,
    )
