"""Loads base models, quantised as required by the variant, from files or with random weights of the exact architecture.

Random weights are initialised and quantised one module at a time, so that a 7B model in NF4 never needs the 13.5 GB of
its 16-bit form: the peak is the quantised model plus one layer. The architecture's own `_init_weights` initialises each
module in float32 from a separate seed (run seed and module name), and the result is cast. So the weights depend only on
the seed and the name: two builds are bit-equal, an NF4 variant quantises the same weights as an unquantised variant
has, and float32 and bfloat16 differ only by rounding. CPU and CUDA generate different numbers.
"""

from __future__ import annotations

import contextlib
import hashlib
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import accelerate
import torch
import transformers
from torch import nn

from kernels_check.observe.modules import Modes, without_repacking
from lorameter.errors import LorameterError, format_error, refused_value, shorten
from lorameter.models import catalogue
from lorameter.models.catalogue import ModelSource
from lorameter.records.os_errors import is_out_of_memory
from lorameter.studies.variant import Variant
from lorameter.trial.building.quantizers import make_quantizer


def load_base(source: ModelSource, variant: Variant, *, device: str, seed: int) -> transformers.PreTrainedModel:
    """The base model on `device`, in eval mode like a model from `from_pretrained`, without an adapter.

    Args:
        source: result of `catalogue.resolve`.
        variant: its dtype, its storage format with the fields that this reads, and its attention are used.
        device: torch device ("cpu", "cuda", "cuda:1").
        seed: seed of random weights; otherwise unused. The global random state is not changed.

    Raises:
        UsageError: the files cannot be loaded, lack weights, or contain an already quantised checkpoint.
    """
    if source.random:
        return _random_model(source, variant, device, seed)
    hub = source.kind == "hub"
    options: dict[str, Any] = {"local_files_only": not hub or not catalogue.hub_answers(source.location)}
    with _refusals(source.label, hub=source if hub else None):
        config = transformers.AutoConfig.from_pretrained(source.location, **options)
        if own := getattr(config, "quantization_config", None):
            method = own.get("quant_method") if isinstance(own, dict) else own.quant_method
            why = f"the checkpoint is already quantised ({method}), which overrides the variant"
            raise refused_value("models", "model", source.label, why, "Name the unquantised checkpoint.")
        quantizer = make_quantizer(variant)
        model = _load_whole(
            source.label,
            source.location,
            config=config,
            dtype=getattr(torch, variant.dtype),
            attn_implementation=variant.attention,
            device_map={"": device},
            **quantizer.load_options(),
            **options,
        )
        quantizer.convert(model, device)
        return model


def empty_model(source: ModelSource, variant: Variant) -> transformers.PreTrainedModel:
    """The unquantised architecture on the meta device: every shape and dtype of the base, without storage.

    Raises:
        UsageError: its configuration cannot be loaded, or transformers cannot build a model from it.
    """
    with torch.device("meta"), _refusals(source.label):
        return transformers.AutoModelForCausalLM.from_config(
            read_architecture(source), dtype=getattr(torch, variant.dtype)
        )


def make_skeleton(config: transformers.PretrainedConfig, variant: Variant) -> transformers.PreTrainedModel:
    """The unquantised architecture, with its parameters on the meta device and real buffers."""
    with accelerate.init_empty_weights(include_buffers=False):
        return transformers.AutoModelForCausalLM.from_config(
            config, dtype=getattr(torch, variant.dtype), attn_implementation=variant.attention
        )


def convert_gguf(gguf_path: Path, out_dir: Path) -> None:
    """Dequantise a GGUF file into a bfloat16 safetensors directory with its tokenizer.

    The original checkpoints are published in bfloat16, so loading takes the same time; the rounding (2^-9) is far below
    that of the 4-bit source.
    """
    import gguf

    folder, name = gguf_path.parent, gguf_path.name
    options: dict[str, Any] = {}
    if hasattr(transformers, "GgufConfig"):  # otherwise packed blocks run in special kernels, if installed
        options["quantization_config"] = transformers.GgufConfig(dequantize=True)
    with _refusals(str(gguf_path)):
        model = _load_whole(str(gguf_path), folder, gguf_file=name, dtype=torch.bfloat16, **options)
    quantizer = getattr(model, "hf_quantizer", None)
    if quantizer is not None:  # it would describe the dequantised weights as quantised
        quantizer.remove_quantization_config(model)
    model.save_pretrained(out_dir)
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder, gguf_file=name)
    fields = gguf.GGUFReader(gguf_path).fields
    for role, key in (("bos", "bos"), ("eos", "eos"), ("pad", "padding")):
        token = fields.get(f"tokenizer.ggml.{key}_token_id")
        if token is not None:  # transformers 5.17 mistakes BOS for EOS and drops PAD
            setattr(tokenizer, f"{role}_token", tokenizer.convert_ids_to_tokens(int(token.contents())))
    tokenizer.save_pretrained(out_dir)


def _load_whole(label: str, location: str | Path, **options: Any) -> transformers.PreTrainedModel:
    """Load a model from files. Raises `UsageError` for a missing weight, which transformers would initialise at
    random."""
    model, found = transformers.AutoModelForCausalLM.from_pretrained(location, output_loading_info=True, **options)
    if lacking := sorted(found["missing_keys"]):
        why = f"its files lack {len(lacking)} of its weights, {shorten(lacking[0], 60)} among them"
        raise refused_value("models", "model", label, why, _REMEDY)
    loaded: transformers.PreTrainedModel = model
    return loaded


@contextlib.contextmanager
def _refusals(label: str, hub: ModelSource | None = None) -> Iterator[None]:
    """Convert exceptions of the libraries into a `UsageError`, except out of memory."""
    try:
        yield
    except Exception as error:  # the exception's type depends on the fault in the files
        if isinstance(error, LorameterError) or is_out_of_memory(error):
            raise
        if hub is not None and isinstance(error, OSError):
            raise catalogue.hub_failure(hub, error) from None
        why = f"its files cannot be loaded ({format_error(error)})"
        raise refused_value("models", "model", label, why, _REMEDY) from None


_REMEDY = "Save the model again."


def _random_model(source: ModelSource, variant: Variant, device: str, seed: int) -> transformers.PreTrainedModel:
    model = make_skeleton(read_architecture(source), variant)
    quantizer = make_quantizer(variant)
    packed = set(quantizer.names(model))
    with torch.no_grad(), torch.random.fork_rng(devices=[torch.device(device)] if device.startswith("cuda") else []):
        for name in [
            name for name, _ in model.named_modules()
        ]:  # by name: a reference to a module would keep its weights
            torch.manual_seed(int.from_bytes(hashlib.sha256(f"{seed}/{name}".encode()).digest()[:8]) >> 1)
            module = model.get_submodule(name)
            _materialise(model, name, module, device)
            if name in packed:
                model.set_submodule(name, quantizer.quantise(module, device))
    model.tie_weights()
    quantizer.mark(model)
    return model.eval()


def read_architecture(source: ModelSource) -> transformers.PretrainedConfig:
    """The configuration of a model whose weights are not loaded."""
    config = transformers.AutoConfig.from_pretrained(catalogue.config_file(source))
    if hasattr(config, "quantization_config"):  # it describes weights that are not used
        del config.quantization_config
    return config


def _materialise(model: transformers.PreTrainedModel, name: str, module: nn.Module, device: str) -> None:
    """Give the module's own parameters storage on `device` with random values; buffers are only moved.

    A tied parameter stays on meta, and `tie_weights` replaces it. NaN marks values that the architecture does not
    initialise.
    """
    tied = model.all_tied_weights_keys
    own = {
        key: meta
        for key, meta in module.named_parameters(recurse=False)
        if f"{name}.{key}".removeprefix(".") not in tied
    }
    for key, meta in own.items():
        blank = torch.full(meta.shape, torch.nan, dtype=torch.float32, device=device)
        module.register_parameter(key, nn.Parameter(blank, requires_grad=False))
    if own:
        model._init_weights(module)
    for key, meta in own.items():
        parameter = module.get_parameter(key)
        if parameter.isnan().any():
            why = f"the architecture does not say how to initialise {name}.{key}"
            raise refused_value("models", "model", model.config.model_type, why, "Use real weights.")
        module.register_parameter(key, nn.Parameter(parameter.to(meta.dtype), requires_grad=meta.requires_grad))
    for key, buffer in module.named_buffers(recurse=False):
        module._buffers[key] = buffer.to(device)


@contextlib.contextmanager
def evaluation_mode(model: Any) -> Iterator[None]:
    """Evaluate between training steps: every module in eval mode, without gradients and without repacking. Modes are
    restored afterwards.

    All dropout must be off; otherwise the losses of a sweep over dropout would be biased.
    """
    modes = Modes(model)
    model.eval()
    try:
        with without_repacking(model), torch.no_grad():
            yield
    finally:
        modes.restore()


if __name__ == "__main__":  # `lorameter.models.bases` runs the conversion in a separate process
    convert_gguf(Path(sys.argv[1]), Path(sys.argv[2]))
