"""Whether an adapter was attached wherever its configuration asks, and what each call of its layers ran.

PEFT refuses a list of targets if none matches. If one matches, PEFT takes it and is silent about the rest. Each name is
asked of PEFT's own matching. Of models whose experts transformers 5 holds in one parameter, PEFT turns the names of
their projections into names of that parameter, in the configuration itself.

Flags that are read before or after a step say nothing of the step: ``disable_adapter()`` around the forward switches
back before. A part is counted for the layer in whose call it ran, since layers may share one.
"""

from __future__ import annotations

import copy
import threading
from collections.abc import Collection, Iterable, Iterator, Set
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
from torch import nn

from kernels_check.observe.adapter import AdapterLayer, active_in, adapter_layers, is_a, is_disabled
from kernels_check.observe.calls import CallRecorder
from kernels_check.observe.hooks import HookGuard, ModuleHook
from kernels_check.observe.modules import Model, ModelTree, named_modules

_HEADS = frozenset({"classifier", "score", "qa_outputs"})
"""Names that PEFT adds to ``modules_to_save`` by itself for a task; a model has one of them."""
_TASKS = ("SEQ_CLS", "TOKEN_CLS", "QUESTION_ANS")


def unmatched_names(model: Model) -> list[str]:
    """Each name that was asked for an adapter in use and matched nothing, as ``target_modules 'qurey'``.

    Raises:
        Exception: of PEFT, where its matching cannot be asked; nothing is known then.
    """
    return list(dict.fromkeys(name for used in _in_use(model) for name in _unmatched(*used)))


def layers_left_to_experts(model: Model) -> list[str]:
    """Layers without an adapter of a name that PEFT has made a parameter of experts of, which carries one.

    Such are the dense layers and the shared experts of a DeepSeek. PEFT keeps no trace of whether they were asked for.
    """
    left = dict[str, None]()
    for configuration, places in _in_use(model):
        for name in _asked(configuration, "target_parameters"):
            if any(_ends_with(place, name) for place in places.parameters):
                words = places.of_experts.get(name, frozenset())
                left |= dict.fromkeys(bare for bare in places.bare if bare.rpartition(".")[2] in words)
    return list(left)


def _in_use(model: Model) -> Iterator[tuple[Any, _Places]]:
    """The configuration of each adapter in use, and where adapters are in the model that it was given to."""
    layers = adapter_layers(model)
    used = {adapter for layer in layers for adapter in layer.held}
    seen: set[int] = set()
    for path, module in named_modules(model):
        configurations = vars(module).get("peft_config")
        if not isinstance(configurations, dict) or id(configurations) in seen:
            continue
        seen.add(id(configurations))
        places = _Places(path, module, layers)
        yield from ((one, places) for adapter, one in configurations.items() if adapter in used)


class _Places:
    """Where adapters are, by names as PEFT matches them: relative to the model that was wrapped."""

    def __init__(self, path: str, module: nn.Module, layers: Iterable[AdapterLayer]) -> None:
        inner = module._modules.get("model")
        self.tuner = module if hasattr(module, "targeted_module_names") and inner is not None else None
        prefix = f"{path}.model." if self.tuner is not None else f"{path}."
        prefix = prefix.removeprefix(".")
        near = [(layer, layer.name.removeprefix(prefix)) for layer in layers if layer.name.startswith(prefix)]
        self.modules = {_bare(name) for layer, name in near if not layer.copied}
        self.copies = {_bare(name) for layer, name in near if layer.copied or name.endswith(".token_adapter")}
        self.parameters = {
            f"{_bare(name)}.{layer.module.parameter_name}" for layer, name in near if _adapts_parameter(layer.module)
        }
        self.of_experts = _names_of_experts(inner if self.tuner is not None else module)
        adapted = tuple(f"{layer.name}." for layer, _ in near)
        named = (name for name, _ in named_modules(module, path)) if self.of_experts else ()
        self.bare = [name for name in named if not f"{name}.".startswith(adapted)]
        """Modules that are neither adapted nor part of what is; looked for only where there may be experts."""
        self._module, self._path, self._prefix = module, path, prefix

    def every_module(self) -> Iterator[str]:
        """Names of all modules of the wrapped model, as PEFT matches them."""
        for name, _ in named_modules(self._module, self._path):
            if name.startswith(self._prefix):
                yield _bare(name.removeprefix(self._prefix))


def _unmatched(configuration: Any, places: _Places) -> Iterator[str]:
    for name in _asked(configuration, "target_modules"):
        if (
            not _by_default(configuration, places)
            and not _targets(configuration, name, places.modules)
            and not _is_excluded(configuration, name, places.every_module())
        ):
            yield f"target_modules {name!r}"
    for name in _asked(configuration, "feedforward_modules"):
        if not any(_ends_with(place, name) for place in places.modules) and not _is_excluded(
            configuration, name, places.every_module()
        ):
            yield f"feedforward_modules {name!r}"
    yield from _unmatched_parameters(_asked(configuration, "target_parameters"), places)
    copies = _asked(configuration, "modules_to_save")
    task = str(getattr(configuration, "task_type", ""))
    added = _HEADS if any(one in task for one in _TASKS) else frozenset()
    for name in copies:
        # PEFT takes any name that ends so, also in the middle of a word.
        if name not in added and not any(place.endswith(name) for place in places.copies):
            yield f"modules_to_save {name!r}"
    tokens = getattr(configuration, "trainable_token_indices", None)
    for name in tokens if isinstance(tokens, dict) else ():
        if not any(place.endswith(name) for place in places.copies):
            yield f"trainable_token_indices {name!r}"


def _unmatched_parameters(asked: Collection[str], places: _Places) -> Iterator[str]:
    """Names of parameters; of those that PEFT has made of others, only where what is there was asked for."""
    words = {name.rpartition(".")[2] for name in places.bare}
    by_all_linear = bool(places.of_experts) and places.of_experts.keys() <= set(asked)
    for name in asked:
        if any(_ends_with(place, name) for place in places.parameters):
            continue
        layers = sorted(places.of_experts.get(name, frozenset()) & words)
        if layers:
            made = " and ".join(map(repr, layers))
            yield f"target_modules {made} (PEFT makes target_parameters {name!r} of it in models of this type)"
        elif not (by_all_linear and name in places.of_experts):
            yield f"target_parameters {name!r}"


def _names_of_experts(model: Any) -> dict[str, frozenset[str]]:
    """The parameters of experts in a type of models, with the names of layers that PEFT turns into them."""
    kind = getattr(getattr(model, "config", None), "model_type", None)
    with suppress(ImportError, AttributeError):  # of transformers 4, and of what PEFT does not call its interface
        from peft.utils import transformers_weight_conversion as conversion

        pattern = conversion._MODEL_TO_CONVERSION_PATTERN.get(kind)
        if conversion._MOE_FUSED_TARGETS.get(pattern):
            table = conversion._MOE_TARGET_MODULE_MAPPING.get(pattern, {})
            return {new: frozenset(old for old in table if table[old] == new) for new in table.values()}
    return {}


def _asked(configuration: Any, field: str) -> list[str]:
    asked = getattr(configuration, field, None)
    if isinstance(asked, str):
        return [asked]
    return sorted(map(str, asked)) if isinstance(asked, Collection) else []


def _by_default(configuration: Any, places: _Places) -> bool:
    """Whether PEFT chose the targets by the model's type, and not the user by name."""
    tables = getattr(places.tuner, "target_module_mapping", None) or {}
    asked = configuration.target_modules
    return not isinstance(asked, str) and any(set(asked) == set(table) for table in tables.values())


def _targets(configuration: Any, name: str, modules: Iterable[str]) -> bool:
    from peft.tuners.tuners_utils import check_target_module_exists

    if name == "all-linear" or not isinstance(configuration.target_modules, str | list | set | tuple):
        return any(True for _ in modules)
    if "dummy-target-modules" in name:  # PEFT's own word for an adapter without targets
        return True
    if _is_prompt_of_attention(configuration):
        return any(_ends_with(module, name) for module in modules)
    alone = _with_one_target(configuration, name)
    return any(check_target_module_exists(alone, module) for module in modules)


def _is_excluded(configuration: Any, name: str, modules: Iterable[str]) -> bool:
    """Whether a target matches modules that the configuration itself excludes, by ``exclude_modules`` or as copies."""
    from peft.tuners.tuners_utils import check_target_module_exists

    alone = _with_one_target(configuration, name)
    without = copy.copy(alone)
    without.exclude_modules = without.modules_to_save = None
    return any(
        check_target_module_exists(without, module) and not check_target_module_exists(alone, module)
        for module in modules
    )


def _with_one_target(configuration: Any, name: str) -> Any:
    alone = copy.copy(configuration)
    alone.target_modules = name if isinstance(configuration.target_modules, str) else [name]
    return alone


def _is_prompt_of_attention(configuration: Any) -> bool:
    """Adaption prompts name the attention by its last word."""
    return bool(getattr(configuration, "is_adaption_prompt", False))


def _adapts_parameter(module: Any) -> bool:
    return is_a(module, "peft.tuners.lora.layer", "ParamWrapper")


def _ends_with(place: str, name: str) -> bool:
    return place == name or place.endswith(f".{name}")


def _bare(name: str) -> str:
    """The name as it was before anything was wrapped."""
    parts = [part for part in name.split(".") if part not in ("base_layer", "token_adapter", "_orig_mod")]
    return ".".join(part for part in parts if part != "_fsdp_wrapped_module")


@dataclass(slots=True, kw_only=True)
class LayerCall:
    """One call of one layer."""

    active: tuple[str, ...]
    disabled: bool
    merged: bool
    with_gradients: bool
    aside: bool = False
    """Whether the whole entry into the model records no gradients, as an evaluation or a reference does."""
    number: int | None = None
    """Of the call in the log of all calls, where there is one."""
    ran: dict[str, float] = field(default_factory=dict)
    """Parts that ran in it, by name; of a dropout the probability by which it dropped, which is 0 in evaluation."""

    @property
    def adapted(self) -> bool:
        """Whether the layer was to use its adapter."""
        return bool(self.active) and not self.disabled and not self.merged


@dataclass(slots=True)
class AdapterCalls:
    """Hooks on the layers of a model's adapters and on their parts, and what they noted."""

    shield: HookGuard
    """What hooks are wrapped in."""
    layers: dict[str, list[LayerCall]] = field(default_factory=dict)
    """The calls of each layer, by its name."""
    _log: CallRecorder | None = None
    _entered: dict[int, list[tuple[str, LayerCall]]] = field(default_factory=dict)
    """The layers that a thread is in, outermost first."""

    @contextmanager
    def watched(self, tree: ModelTree, log: CallRecorder) -> Iterator[None]:
        """Hook every layer and part; all hooks are off afterwards, whatever raised.

        Args:
            tree: of the model as it is.
            log: of all calls, which hooks the same modules.
        """
        self.forget()
        self._log = log
        found = adapter_layers(tree)
        with ExitStack() as hooks:
            parts: dict[int, tuple[nn.Module, dict[str, str]]] = {}
            for layer in found:
                self._hook_layer(hooks, layer)
                for name, part in layer.parts():
                    parts.setdefault(id(part), (part, {}))[1][layer.name] = name
            for part, names in parts.values():
                noted = ModuleHook(part, self.shield(partial(self._note_part, names)))
                hooks.push(part.register_forward_pre_hook(noted))
            yield

    def forget(self) -> None:
        """Drop what was noted."""
        self.layers = {}
        self._entered.clear()
        self._log = None

    def drop(self, failed: Set[int]) -> None:
        """Drop the calls of these numbers, which came to nothing."""
        for name, calls in self.layers.items():
            self.layers[name] = [call for call in calls if call.number not in failed]

    def _hook_layer(self, hooks: ExitStack, layer: AdapterLayer) -> None:
        if layer.module._compiled_call_impl is not None:  # compiled in place, it would be compiled again with the hook
            return
        entered = ModuleHook(layer.module, self.shield(partial(self._enter, layer)))
        left = ModuleHook(layer.module, self.shield(self._leave))
        hooks.push(layer.module.register_forward_pre_hook(entered))
        hooks.push(layer.module.register_forward_hook(left, always_call=True))

    def _enter(self, layer: AdapterLayer, module: nn.Module, inputs: Any) -> None:
        call = LayerCall(
            active=tuple(name for name in layer.held if name in active_in(module, layer.held)),
            disabled=is_disabled(module),
            merged=bool(layer.merged),
            with_gradients=torch.is_grad_enabled(),
            aside=self._log is not None and not self._log.in_training(),
            number=None if self._log is None else self._log.current(),
        )
        self.layers.setdefault(layer.name, []).append(call)
        self._entered.setdefault(threading.get_ident(), []).append((layer.name, call))

    def _leave(self, module: nn.Module, inputs: Any, output: Any) -> None:
        entered = self._entered.get(threading.get_ident())
        if entered:
            entered.pop()

    def _note_part(self, names: dict[str, str], part: nn.Module, inputs: Any) -> None:
        for layer, call in reversed(self._entered.get(threading.get_ident(), [])):
            if layer in names:
                probability = getattr(part, "p", None)
                dropped = float(probability) if isinstance(probability, float | int) and part.training else 0.0
                call.ran[names[layer]] = max(dropped, call.ran.get(names[layer], 0.0))
                return
