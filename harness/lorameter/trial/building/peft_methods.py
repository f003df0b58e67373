"""PEFT's methods: the configuration of a variant, attaching and removing its adapter, its dtype, and its files.

This is the only module that calls PEFT. Methods, their fields and their optimizers are read from PEFT's registry, so
that a method of a later PEFT version needs no code here. Adapter parameters are never recognised by name: PEFT's layers
list the parts that they have added, and names in a base are arbitrary.

Full fine-tuning has no adapter: its model is the base, and functions about adapters do nothing.
"""

from __future__ import annotations

import dataclasses
import inspect
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any, cast

import peft
import peft.optimizers
import torch
from peft import LoraConfig, PeftConfig, PeftModel, get_peft_model, get_peft_model_state_dict
from peft.mapping import PEFT_TYPE_TO_CONFIG_MAPPING
from peft.tuners.lora.corda import preprocess_corda
from peft.tuners.lora.layer import MultiheadAttention, ParamWrapper
from peft.tuners.tuners_utils import BaseTunerLayer
from transformers.pytorch_utils import Conv1D

from kernels_check.observe.adapter import adapter_attributes
from kernels_check.observe.modules import find_enclosing
from lorameter.errors import UsageError, format_error, refused_value, suggest
from lorameter.models import catalogue, shapes
from lorameter.studies.study_file import OTHER_NAMES
from lorameter.studies.variant import ADAMW, ALL_LINEAR, PAGED, FullVariant, LoraVariant, PeftVariant, Variant
from lorameter.trial.building.quantizers import unpack_4bit
from lorameter.trial.data.tokens import load_tokenizer

_PAGED = dict(zip(PAGED, ("PagedAdamW32bit", "PagedAdamW8bit"), strict=True))
_BITSANDBYTES = "bitsandbytes."
"""Prefix of the names of bitsandbytes optimizers."""


def make_config(variant: Variant, *, steps: int | None = None) -> PeftConfig:
    """The PEFT configuration of a variant; `steps` is the length of its training, for methods that need it.

    Raises:
        UsageError: the method or field does not exist, or PEFT refuses a value; the message is PEFT's.
    """
    if isinstance(variant, LoraVariant):
        return _lora_config(variant)
    assert isinstance(variant, PeftVariant)
    where, name = f"variant {variant.name!r}", str(variant.peft["peft_type"]).upper()
    known = {str(kind.value): config for kind, config in PEFT_TYPE_TO_CONFIG_MAPPING.items()}
    if name not in known:
        why = f"PEFT {peft.__version__} has no such method"
        raise refused_value(where, "peft.peft_type", variant.peft["peft_type"], why, suggest(name, sorted(known)))
    fields = {field.name for field in dataclasses.fields(known[name]) if field.init}
    # Files of another version have further keys, which have no effect if off.
    arguments = {
        key: value for key, value in variant.peft.items() if key in fields or value not in (None, False, {}, [])
    }
    for key in arguments.keys() - fields:
        why, near = f"{known[name].__name__} has no such field", suggest(OTHER_NAMES.get(key, key), sorted(fields))
        raise refused_value(where, f"peft.{key}", arguments[key], why, near)
    arguments |= {"peft_type": name, "inference_mode": False}  # a saved configuration is in inference mode
    arguments["task_type"] = arguments.get("task_type") or "CAUSAL_LM"
    if "total_step" in fields and arguments.get("total_step") is None and steps is not None:
        arguments["total_step"] = steps
    try:
        return known[name](**arguments)
    except Exception as error:  # the exception's type depends on the value that PEFT refused
        raise UsageError(
            f"{where}: peft: {known[name].__name__} refuses it: {format_error(error).rstrip('.')}."
        ) from None


def attach(
    base: Any,
    variant: Variant,
    adapter: str = "default",
    *,
    batches: Callable[[], list[Any]] = list,
    steps: int | None = None,
) -> Any:
    """The base with a fresh adapter, as PEFT makes it; for full fine-tuning, the base with all weights trainable.

    Args:
        base: frozen or not; afterwards only the weights that the method requires are trainable.
        variant: the variant to train.
        adapter: name of the adapter.
        batches: returns inputs of the model; called for data-dependent initialisations only (EVA, CorDA).
        steps: optimizer steps of the training.
    """
    base = _prepare(base, variant)
    if variant.gradient_checkpointing:
        base.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
        base.enable_input_require_grads()
    if isinstance(variant, FullVariant):
        return base.requires_grad_(True)
    config = make_config(variant, steps=steps)
    init = getattr(config, "init_lora_weights", None)
    if init == "corda":
        with torch.no_grad():
            preprocess_corda(base, config, run_model=lambda: [base(**batch) for batch in batches()])
    model = get_peft_model(base, config, adapter_name=adapter, autocast_adapter_dtype=_upcasts(variant))
    if init == "eva":
        peft.initialize_lora_eva_weights(model, batches(), adapter_name=adapter, show_progress_bar=False)
    _cast(model, variant)
    return model


def attach_second(model: Any, variant: Variant, adapter: str) -> None:
    """Add another adapter to a model that has adapters; it is not active yet."""
    model.add_adapter(adapter, make_config(variant), autocast_adapter_dtype=_upcasts(variant))
    _cast(model, variant)


def attach_random(model: Any, variant: Variant, adapter: str, seed: int) -> None:
    """Add an adapter like `attach_second`, with large random weights: the values do not affect times, but an adapter
    with small weights would give the same answers as the base.

    An entry of A has the variance 1 / inputs, and an entry of B the variance 1 / r over the square of the scaling, so
    that their product preserves the magnitude of the input for every r and alpha.
    """
    attach_second(model, variant, adapter)
    generator = torch.Generator().manual_seed(seed)  # on the host, so that every device gets the same values
    for layer in adapted_layers(model).values():
        for part in layer.adapter_layer_names:
            weights = getattr(layer, part)
            if adapter not in weights:
                continue
            weight = weights[adapter] if isinstance(weights[adapter], torch.nn.Parameter) else weights[adapter].weight
            drawn = torch.randn(weight.shape, generator=generator) * (weight[0].numel() ** -0.5)
            weight.data.copy_(drawn / layer.scaling[adapter] if part.endswith("_B") else drawn)


def start_prefix(model: Any, name: str, text: str) -> None:
    """Initialise a prefix with the keys and values of a text, tokenised with the tokenizer of the model `name`."""
    source = catalogue.resolve(name)
    tokenizer, _ = load_tokenizer(source, vocab_size=shapes.shape(source).vocab_size)
    peft.initialize_kv_prefix_from_text(model, tokenizer, text=text)


def find_update_hook(model: Any) -> Callable[[int], None] | None:
    """A function that a method calls after each update with the number of the step, from 1: AdaLoRA moves ranks between
    layers. None for a method without one."""
    return getattr(getattr(model, "base_model", None), "update_and_allocate", None)


def unmixable_layers(model: torch.nn.Module) -> tuple[str, ...]:
    """Names of the layers that cannot process rows for different adapters: PEFT refuses this if it wraps a parameter of
    a layer instead of the layer (experts that are stored as one tensor), or torch's own attention."""
    refusing = (ParamWrapper, MultiheadAttention)
    return tuple(name for name, layer in adapted_layers(model).items() if isinstance(layer, refusing))


def activate(model: Any, adapter: str) -> None:
    """Activate this adapter only, and make it trainable."""
    if isinstance(model, PeftModel) and model.active_adapter != adapter:
        model.set_adapter(adapter)


def unwrap(model: Any) -> Any:
    """transformers' own model inside the PEFT model, with its layers replaced; the model itself if PEFT has not wrapped
    it."""
    return model.get_base_model() if isinstance(model, PeftModel) else model


def is_merged(model: Any) -> bool:
    """Whether an adapter is merged into the base."""
    return any(layer.merged for layer in adapted_layers(model).values())


@contextmanager
def without_adapter(model: Any) -> Iterator[None]:
    """Disable the adapter inside the block. Afterwards the same parameters train as before: PEFT would make all of the
    adapter trainable, of which LoRA-FA keeps one factor frozen."""
    if not isinstance(model, PeftModel):
        yield
        return
    trains = [(parameter, parameter.requires_grad) for parameter in model.parameters()]
    with model.disable_adapter():
        yield
    for parameter, before in trains:
        parameter.requires_grad_(before)


def merge(model: Any) -> None:
    """Merge the active adapter into the base, whose 4-bit weights must be in their stored layout; does nothing if it is
    already merged."""
    if is_merged(model):
        return
    unpack_4bit(model)
    model.merge_adapter()


def adapted_layers(model: torch.nn.Module) -> dict[str, Any]:
    """The PEFT layers that replace layers of the base, by name."""
    return {name: module for name, module in model.named_modules() if isinstance(module, BaseTunerLayer)}


def is_on_linear(model: torch.nn.Module) -> bool:
    """Whether linear layers carry the adapter, and not only norms, embeddings or a prompt."""
    layers = (layer.get_base_layer() for layer in adapted_layers(model).values())
    return any(isinstance(layer, (torch.nn.Linear, Conv1D)) for layer in layers)


def own_parameters(model: torch.nn.Module) -> dict[str, torch.nn.Parameter]:
    """Parameters that adapters have added to a model, of all adapters together, by name; wrapped parameters belong to
    the base."""
    own = adapter_attributes(model.named_modules())
    return {name: value for name, value in model.named_parameters() if find_enclosing(name, own) is not None}


def save(model: Any, folder: Path, *, initial: Path | None = None) -> None:
    """Write the trained adapter; `initial` is the folder of `save_initial`, if the initialisation changed the base."""
    before = None if initial is None else str(initial)
    model.save_pretrained(str(folder), path_initial_model_for_weight_conversion=before)


def save_initial(model: Any, folder: Path) -> None:
    """Save the untrained adapter of an initialisation that changed the base (OLoRA, PiSSA).

    The trained adapter is relative to the changed base; PEFT converts it into one for the original base, with twice the
    rank, by subtracting the initial adapter.
    """
    config = model.peft_config["default"]
    original, config.init_lora_weights = config.init_lora_weights, True
    model.save_pretrained(str(folder))
    config.init_lora_weights = original


def saved_tensors(model: Any) -> Mapping[str, torch.Tensor]:
    """The tensors of the adapter file, by their names in it; for full fine-tuning, the tensors of the model."""
    if not isinstance(model, PeftModel):
        return cast("Mapping[str, torch.Tensor]", model.state_dict())
    return cast("Mapping[str, torch.Tensor]", get_peft_model_state_dict(model, save_embedding_layers=False))


def load(base: Any, variant: Variant, folder: Path) -> Any:
    """Load the adapter written by `save` onto a base, for inference."""
    base = _prepare(base, variant)
    model: Any = PeftModel.from_pretrained(base, str(folder), autocast_adapter_dtype=_upcasts(variant))
    _cast(model, variant)
    return model


def make_optimizer(model: Any, variant: Variant) -> torch.optim.Optimizer:
    """The variant's optimizer over the trainable parameters.

    Raises:
        UsageError: the optimizer does not exist, or does not accept an argument.
    """
    parameters = [parameter for parameter in model.parameters() if parameter.requires_grad]
    options: dict[str, Any] = {"lr": variant.learning_rate, "weight_decay": variant.weight_decay}
    if variant.optimizer in ADAMW:
        options["fused"] = variant.optimizer == "adamw_fused" or None
    where, found = f"variant {variant.name!r}", find_optimizer(variant)
    takes = inspect.signature(found).parameters
    if "model" not in takes:
        options = {key: value for key, value in options.items() if key in takes}
        arguments: tuple[Any, ...] = (parameters,)
    else:  # a PEFT optimizer, which may need the adapter's rank and a base optimizer class
        adapter = model.peft_config[model.active_adapter] if isinstance(model, PeftModel) else None
        fields = {key: getattr(adapter, key) for key in ("r", "lora_alpha") if key in takes and hasattr(adapter, key)}
        base = {"optimizer_cls": torch.optim.AdamW} if "optimizer_cls" in takes else {}
        arguments, options = (model,), options | fields | base
    try:
        return cast(torch.optim.Optimizer, found(*arguments, **{**options, **variant.optimizer_args}))
    except (TypeError, ValueError) as error:
        raise UsageError(
            f"{where}: optimizer = {variant.optimizer!r}: it refuses its arguments: {format_error(error).rstrip('.')}."
        ) from None


def find_optimizer(variant: Variant) -> Callable[..., Any]:
    """The class of an optimizer, or the PEFT function that makes it. Raises `UsageError` with the nearest name."""
    import bitsandbytes

    known: dict[str, Callable[..., Any]] = {}
    for prefix, module in (("", torch.optim), (_BITSANDBYTES, bitsandbytes.optim)):
        kinds = {name: kind for name, kind in vars(module).items() if isinstance(kind, type)}
        known |= {prefix + name: kind for name, kind in kinds.items() if issubclass(kind, torch.optim.Optimizer)}
    known |= dict.fromkeys(ADAMW, torch.optim.AdamW)
    known |= {short: known[_BITSANDBYTES + name] for short, name in _PAGED.items()}
    for name in peft.optimizers.__all__:
        known[name.removeprefix("create_").removesuffix("_optimizer")] = getattr(peft.optimizers, name)
    name = variant.optimizer
    plain = name.replace("+", "plus").replace("-", "")  # the spelling of LoRA+ and LoRA-FA in PEFT's experiments
    found = known.get(name) or known.get(plain)
    if found is None:
        why = f"neither torch, bitsandbytes nor PEFT {peft.__version__} has such an optimizer"
        raise refused_value(f"variant {variant.name!r}", "optimizer", name, why, suggest(name, sorted(known)))
    return found


def _prepare(base: Any, variant: Variant) -> Any:
    """The base with unquantised weights cast to float32, if the variant uses PEFT's preparation."""
    if not variant.prepare_for_kbit:
        return base
    return peft.prepare_model_for_kbit_training(base, use_gradient_checkpointing=False)


def _upcasts(variant: Variant) -> bool:
    """Whether PEFT may cast the adapter to float32, its default."""
    return variant.adapter_dtype in (None, "float32")


def _cast(model: Any, variant: Variant) -> None:
    """Cast the adapter to the variant's dtype, if it has one."""
    if variant.adapter_dtype is not None:
        for parameter in own_parameters(model).values():
            parameter.data = parameter.data.to(getattr(torch, variant.adapter_dtype))


def _lora_config(variant: LoraVariant) -> LoraConfig:
    targets: Any = list(variant.target_modules) or None
    if variant.target_modules == (ALL_LINEAR,):
        targets = ALL_LINEAR
    return LoraConfig(
        task_type="CAUSAL_LM",
        r=variant.r,
        lora_alpha=cast(int, variant.lora_alpha),
        lora_dropout=variant.lora_dropout,
        target_modules=targets,
        bias=variant.bias,
        use_rslora=variant.use_rslora,
        use_dora=variant.use_dora,
        init_lora_weights=True if variant.init_lora_weights == "default" else variant.init_lora_weights,
    )
