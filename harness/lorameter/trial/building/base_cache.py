"""Prepares the base of a run once, in a file that every process of the run maps.

The cache holds the tensors of the model that `load_base` made (parameters, buffers, and the constants that bitsandbytes
stores with each quantised weight) and the attributes that transformers sets on a loaded model. `map_base` builds the
architecture without storage and inserts them. On a CPU tensors are not copied: the file is mapped privately, so that
all processes share its pages, and a process that writes to a weight gets its own copy. A base from the cache is
bit-equal to a loaded one; tests verify this.

4-bit weights are saved in their stored layout. On CPUs with AVX512-BF16 bitsandbytes repacks them at the first forward
pass in eval mode, separately in each process; no such pass has run when they are saved.

The file is written by `torch.save`, which aligns each tensor to 64 bytes, as malloc does. safetensors aligns to 8, and
a product with such a weight takes up to 8 % longer for one row, 0 to 4 % for 128 (AVX-512, one thread).
"""

from __future__ import annotations

import hashlib
import importlib
import inspect
import json
import os
import time
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import msgspec
import torch
import transformers
import xxhash
from torch import nn
from transformers.initialization import no_init_weights

from lorameter.errors import refused_value
from lorameter.models import bases, catalogue
from lorameter.models.catalogue import ModelSource
from lorameter.records import codec
from lorameter.records.fileio import draft_folder, hold_lock, write_document
from lorameter.records.record import BaseSummary, PartialRecord
from lorameter.studies.request import BaseRequest, TrialRequest, base_words
from lorameter.studies.variant import Variant
from lorameter.trial.building import base_model
from lorameter.trial.building.base_model import load_base, make_skeleton
from lorameter.trial.building.quantizers import make_quantizer


def open_base(request: TrialRequest) -> tuple[transformers.PreTrainedModel, bool]:
    """The base of a trial, and whether this process made it from its source, because no base was prepared, or because
    the prepared one was removed or has another size."""
    model = map_base(Path(request.base), request.variant, request.device) if request.base else None
    if model is not None:
        return model, False
    source = catalogue.resolve(request.workload.model)
    return load_base(source, request.variant, device=request.device, seed=request.workload.data_seed), True


def prepare_base(request: BaseRequest) -> PartialRecord:
    """Make the base of a request unless it exists; returns its summary (`BaseSummary`) as a fragment.

    Raises:
        UsageError: the model cannot be loaded (`load_base`).
        OSError: writing failed.
    """
    begin = time.perf_counter()
    if request.device == "cpu":
        torch.set_num_threads(request.threads)
    source = catalogue.resolve(request.workload.model)
    folder = bases.base_folder(_facts_of(source, request))
    with hold_lock(folder, "waiting for another process that makes the same base", print):
        summary = bases.read_description(folder)
        if summary is not None:
            summary = msgspec.structs.replace(summary, conversions=0, quantisations=0)
        else:
            began = time.perf_counter()
            model = load_base(source, request.variant, device=request.device, seed=request.workload.data_seed)
            summary = _write(model, folder, request, time.perf_counter() - began)
        bases.mark_used(folder)
    words, seconds = base_words(request.variant, request.workload), time.perf_counter() - begin
    summary = msgspec.structs.replace(summary, path=str(folder.absolute()), base=words, seconds=seconds)
    return PartialRecord(tokens={"base": codec.to_json(summary)})


def map_base(folder: Path, variant: Variant, device: str) -> transformers.PreTrainedModel | None:
    """The base in a folder, mapped, on `device`; None if its file does not have its original size."""
    if bases.read_description(folder) is None:
        return None
    saved = torch.load(folder / bases.TENSORS, map_location="cpu", mmap=True)
    config = transformers.AutoConfig.from_pretrained(folder)
    if hasattr(config, "quantization_config"):  # quantised layers are inserted below
        del config.quantization_config
    config.name_or_path = saved["name_or_path"]
    quantizer = make_quantizer(variant)
    with no_init_weights():  # random initialisation without storage would take longer than everything else here
        model = make_skeleton(config, variant)
        quantizer.outline(model)
    for name, stored in saved["weights"].items():
        place, _, key = name.rpartition(".")
        module, weight = model.get_submodule(place), stored.to(device)
        if key in module._buffers:
            module._buffers[key] = weight
        elif constants := saved["constants"].get(name):
            quantizer.fill(module, weight, {part: constant.to(device) for part, constant in constants.items()})
        else:
            module.register_parameter(key, nn.Parameter(weight, requires_grad=name not in saved["frozen"]))
    model.tie_weights()
    quantizer.mark(model)
    for name in saved["marks"].keys() - vars(model).keys():
        setattr(model, name, saved["marks"][name])
    if getattr(model, "use_kernels", False):  # transformers replaces forward functions of a loaded model
        model.set_use_kernels(True)
    if saved["device_map"] is not None:
        model.hf_device_map = saved["device_map"]
    model.generation_config = transformers.GenerationConfig.from_dict(saved["generation"])
    return model.eval()


def _write(model: Any, folder: Path, request: BaseRequest, load_s: float) -> BaseSummary:
    places, parameters = getattr(model, "hf_device_map", None), dict(model.named_parameters())  # tied ones appear once
    constants = make_quantizer(request.variant).constants
    saved = {
        "weights": dict(model.named_buffers()) | {name: one.data for name, one in parameters.items()},
        "constants": {name: constants(one) for name, one in parameters.items()},
        "frozen": [name for name, one in parameters.items() if not one.requires_grad],
        "marks": {name: mark for name, mark in vars(model).items() if type(mark) in (bool, str) and name != "training"},
        "name_or_path": model.config.name_or_path,
        "device_map": None if places is None else {name: str(place) for name, place in places.items()},
        "generation": json.loads(model.generation_config.to_json_string(use_diff=False)),
    }
    with draft_folder(folder) as draft:
        with (draft / bases.TENSORS).open("w+b") as file:
            torch.save(saved, file)
            file.flush()
            os.fsync(file.fileno())
            size = file.tell()
            file.seek(0)
            digest = hashlib.file_digest(file, xxhash.xxh3_128).hexdigest()  # SHA-256: half a minute for 14 GB
        model.config.to_json_file(draft / "config.json", use_diff=False)
        summary = BaseSummary(
            path=str(folder.absolute()), hash=digest, base=base_words(request.variant, request.workload), bytes=size,
            conversions=1, quantisations=int(request.variant.format.is_quantised), seconds=load_s, load_s=load_s,
        )  # fmt: skip
        write_document(draft / bases.DESCRIPTION, summary)  # completes the base
    return summary


def _facts_of(source: ModelSource, request: BaseRequest) -> dict[str, Any]:
    """Everything that determines the content of a base."""
    variant, cuda = request.variant, request.device.startswith("cuda")
    classes = type(make_quantizer(variant)).__mro__[:-1]  # without `object`, which has no file
    files = (base_model.__file__, __file__, *map(inspect.getfile, classes))
    return {
        "code": _digest(Path(str(one)).read_bytes() for one in files),
        "source": _identity(source),
        "seed": request.workload.data_seed if source.random else None,
        "dtype": variant.dtype,
        "quantization": variant.quantization,
        "double_quant": variant.effective("double_quant"),
        # Other kernels may generate and round numbers differently.
        "device": torch.cuda.get_device_name() if cuda else torch.backends.cpu.get_cpu_capability(),
        "libraries": {"torch": f"{torch.__version__} {torch.version.git_version}"}
        | {name: _installed(name) for name in ("transformers", *variant.format.libraries)},
    }


def _identity(source: ModelSource) -> Any:
    """An identifier of the weights of a source, or of the shape of a random model. Files are identified by their state
    on disk, which every change alters: hashing 14 GB would take as long as loading them."""
    if source.random:
        return _digest([catalogue.config_file(source).read_bytes()])
    if source.kind == "directory":
        return [_stamp(path) for path in sorted(Path(source.location).iterdir()) if path.is_file()]
    offline = not catalogue.hub_answers(source.location)
    config = transformers.AutoConfig.from_pretrained(source.location, local_files_only=offline)
    if config._commit_hash is None:
        why = "its revision in the cache of the hub is unknown"
        raise refused_value("models", "model", source.label, why, "Nothing to do: each process loads it itself.")
    return [source.location, config._commit_hash]


def _stamp(path: Path) -> list[Any]:
    state = path.stat()
    return [str(path), state.st_dev, state.st_ino, state.st_size, state.st_mtime_ns, state.st_ctime_ns]


def _installed(name: str) -> str:
    """An identifier of a library's code, which may differ between the sides of an A/B under the same version."""
    folder = Path(str(importlib.import_module(name).__file__)).parent
    files = sorted(path for ending in ("py", "so") for path in folder.rglob(f"*.{ending}"))
    states = [(str(path.relative_to(folder)), path.stat()) for path in files]
    return _digest(f"{path} {state.st_size} {state.st_mtime_ns}".encode() for path, state in states)


def _digest(parts: Iterable[bytes]) -> str:
    digest = hashlib.sha256()
    for part in parts:
        digest.update(part)
    return digest.hexdigest()[:16]
