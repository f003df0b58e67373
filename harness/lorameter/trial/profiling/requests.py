"""Profiled requests: the same call that a user makes, with borders where a forward pass begins and ends.

transformers' `generate` is one call from prompt to last token. Where the model itself is entered and left divides it:
what comes before the first pass, the pass over the prompt (prefill), the passes over one token each (decode), and what
lies between passes, on the host: choosing a token, handing it over, getting the inputs of the next one ready.

What a request finds (how many rows of logits it makes, what kind of cache it fills, whether the model trains) is seen
by the same borders in a request of its own, which nothing is timed in.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch.profiler import record_function
from transformers.pytorch_utils import Conv1D

from lorameter.machine.memory import PeakMemoryTracker
from lorameter.records.activity import CACHE, HEAD, REQUEST_PHASES, ModelSize, RequestFacts
from lorameter.trial.building import peft_methods
from lorameter.trial.memory import output_head, resident_tensors, storage_bytes
from lorameter.trial.process import give_back_free
from lorameter.trial.profiling.activity import PART
from lorameter.trial.profiling.phases import Phases
from lorameter.trial.serving.generate import Request

Ask = Callable[[], Request]


class BorderedRequest:
    """A request with the time of each of its phases."""

    def __init__(self, model: Any, ask: Ask, device: str) -> None:
        """`model` is PEFT's; `ask` makes a request of it."""
        self._model = peft_methods.wrapped(model)
        self._ask = ask
        self.phases = Phases(REQUEST_PHASES, device)

    def __call__(self) -> Request:
        """The request, with a border at each end of each forward pass."""
        passes = 0

        def enter(module: Any, args: Any, given: dict[str, Any]) -> None:
            nonlocal passes
            self.phases.turn("decode" if passes else "prefill")
            if self.phases.marked and not passes:
                parts.enter_context(_marked_cache(_cache_of(given)))
            passes += 1

        with ExitStack() as parts:
            parts.callback(self._model.register_forward_pre_hook(enter, with_kwargs=True).remove)
            parts.callback(self._model.register_forward_hook(lambda *_: self.phases.turn("choose")).remove)
            if self.phases.marked:
                parts.enter_context(_marked_head(self._model))
            with self.phases.within("prepare"):
                return self._ask()


@contextmanager
def _marked_cache(cache: Any) -> Iterator[None]:
    """Marks updates of this cache for the profiler; nothing for one that is no cache of transformers."""
    update = getattr(cache, "update", None)
    if update is None:
        yield
        return

    def marked(*args: Any, **given: Any) -> Any:
        with record_function(PART + CACHE):
            return update(*args, **given)

    cache.update = marked
    try:
        yield
    finally:
        del cache.update


@contextmanager
def _marked_head(model: Any) -> Iterator[None]:
    """Marks the output head for the profiler; the mark ends with it, also if it raises."""
    head = model.get_output_embeddings()
    if head is None:
        yield
        return
    with ExitStack() as hooks, ExitStack() as opened:

        def enter(*_: Any) -> None:
            opened.enter_context(record_function(PART + HEAD))

        def leave(*_: Any) -> None:
            opened.close()

        hooks.callback(head.register_forward_pre_hook(enter).remove)
        hooks.callback(head.register_forward_hook(leave, always_call=True).remove)
        yield


def request_samples(request: Request, is_plain: bool) -> dict[str, float]:
    """Samples for `pair_times`: the token times of a plain request, by metric."""
    if not is_plain:
        return {}
    return {
        "first_token_time_s": request.first_token_time_s,
        "time_per_output_token_s": request.time_per_output_token_s,
    }


def see_request(model: Any, ask: Ask, device: str) -> RequestFacts:
    """What one request finds and leaves; nothing in it is timed."""
    base = peft_methods.wrapped(model)
    rows: list[int] = []
    logits: list[int] = []
    cache: list[Any] = []
    places: list[tuple[int, ...]] = []

    def entered(module: Any, args: Any, given: dict[str, Any]) -> None:
        tokens = given.get("input_ids", args[0] if args else None)
        rows.append(1 if tokens is None else int(tokens.shape[-1]))

    def left(module: Any, args: Any, output: Any) -> None:
        found = getattr(output, "logits", None)
        logits.append(1 if found is None else int(found.shape[-2]))
        kept = _cache_of(dict(output) if isinstance(output, dict) else {})
        if kept is not None:
            cache[:] = [kept]
            places.append(tuple(tensor.data_ptr() for tensor in _cached(kept)))

    hooks = [
        base.register_forward_pre_hook(entered, with_kwargs=True),
        base.register_forward_hook(left),
    ]
    try:
        ask()
    finally:
        for hook in hooks:
            hook.remove()
    head = base.get_output_embeddings()
    held = list(_cached(cache[0])) if cache else []
    moved = [before != after for before, after in itertools.pairwise(places)]
    return RequestFacts(
        prompt_rows=rows[0],
        logit_rows=logits[0],
        cache=type(cache[0]).__name__ if cache else "",
        cache_bytes=sum(map(storage_bytes, held)),
        cache_moved=sum(moved) / len(moved) if moved else 0.0,
        head=next((f"{name}.weight" for name, one in base.named_modules() if one is head), ""),
        size=size_of(model),
    )


def _cache_of(given: Mapping[str, Any]) -> Any:
    """The cache among what a forward pass takes or gives; its name changed within transformers 5."""
    return next((found for name in ("cache", "past_key_values") if (found := given.get(name)) is not None), None)


def _cached(cache: Any) -> Iterator[torch.Tensor]:
    for layer in getattr(cache, "layers", ()):
        for name in ("keys", "values"):
            tensor = getattr(layer, name, None)
            if isinstance(tensor, torch.Tensor):
                yield tensor


def size_of(model: Any) -> ModelSize:
    """What a forward pass multiplies with and reads, counted from the modules of whatever model this is."""
    base = peft_methods.wrapped(model)
    own = peft_methods.own_parameters(model)
    head: Any = output_head(base)
    head_elements = 0 if head is None else head.weight.numel()
    head_bytes = 0 if head is None else head.weight.numel() * head.weight.element_size()
    linear = [sizes for module, sizes in _linear_sizes(model) if module is not head]
    kinds = resident_tensors(base, None)
    frozen = {key: sum(map(storage_bytes, tensors)) for key, tensors in kinds.items()}
    return ModelSize(
        linear_elements=sum(outputs * inputs for outputs, inputs in linear),
        linear_bytes=frozen["linear_weights"] + frozen["quantization_state"],
        head_elements=head_elements,
        head_bytes=head_bytes,
        adapter_elements=sum(parameter.numel() for parameter in own.values()),
        adapter_bytes=sum(parameter.numel() * parameter.element_size() for parameter in own.values()),
        norm_bytes=sum(size for kind, size in frozen.items() if kind.startswith("norms_")),
    )


def weights_by_shape(model: Any) -> dict[tuple[int, int], str]:
    """Outputs and inputs of the weights that a forward pass multiplies with, and what they are called; where several
    have one shape, the first and how many there are."""
    known = {module: name for name, module in peft_methods.wrapped(model).named_modules()}
    names: dict[tuple[int, int], list[str]] = {}
    for module, sizes in _linear_sizes(model):
        names.setdefault(sizes, []).append(f"{known[module].removesuffix('.base_layer')}.weight")
    return {
        sizes: found[0] if len(found) == 1 else f"{found[0]} and {len(found) - 1} like it"
        for sizes, found in names.items()
    }


def _linear_sizes(model: Any) -> Iterator[tuple[torch.nn.Module, tuple[int, int]]]:
    """The linear layers of the base with their outputs and inputs, however they store their weights."""
    own = {id(parameter) for parameter in peft_methods.own_parameters(model).values()}
    layers = {id(layer) for layer in peft_methods.adapted_layers(model).values()}
    for module in peft_methods.wrapped(model).modules():
        weight = getattr(module, "weight", None)
        if id(module) in layers or not isinstance(weight, torch.nn.Parameter) or id(weight) in own:
            continue  # PEFT's layers show the weight of what they wrap
        if isinstance(module, torch.nn.Linear):
            yield module, (module.out_features, module.in_features)
        elif isinstance(module, Conv1D):
            yield module, (int(module.nf), int(module.nx))


def first_token_peak(ask_once: Callable[[], object], device: str) -> dict[str, int]:
    """The peaks of a request that ends with its first token."""
    gauge = PeakMemoryTracker(device)
    give_back_free()
    gauge.begin()
    ask_once()
    return gauge.peaks("first_token")


def length_times(ask: Callable[[int], Request], lengths: list[int]) -> dict[str, tuple[float, ...]]:
    """Times to the first token at new prompt lengths: of the first request, and of a second one."""
    new, again = [], []
    for length in lengths:
        new.append(ask(length).first_token_time_s)
        again.append(ask(length).first_token_time_s)
    return {"new_length_first_token_s": tuple(new), "known_length_first_token_s": tuple(again)}
