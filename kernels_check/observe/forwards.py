"""Forwards of a model that can be compared to the bit, and what makes that impossible.

Two forwards of equal inputs are equal only if they draw the same random numbers: dropout need not be a module (GPT-2
and OPT have theirs in a function), so every generator is set back before each. And a token's logits depend on its own
row alone only if nothing is computed over the whole batch: the statistics of a batch norm and the outlier columns of
LLM.int8 are, and both can be switched to what they do for a single row.
"""

from __future__ import annotations

import copy
import inspect
import random
import sys
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from kernels_check.check import name_some
from kernels_check.observe.inputs import ModelCall, unwrapped
from kernels_check.observe.module_tree import every_module
from kernels_check.observe.random_state import RandomState
from kernels_check.observe.stored_layout import without_repacking

_NOT_INPUTS = ("num_items_in_batch", "logits_to_keep")
_LABELS = "labels"
"""With labels some models return no logits at all, without them others do not run."""


class ForwardError(RuntimeError):
    """A forward that cannot be compared: what it raised or returned, and what to pass."""


class Forwards:
    """Makes one call again and again, with other tokens.

    Args:
        call: what is called, and the state in which it was; with no gradients where it had none.
    """

    def __init__(self, call: ModelCall) -> None:
        self.module = unwrapped(call.module)
        self._call = call
        self.arguments: Mapping[str, Any] = {
            name: value for name, value in call.arguments.items() if name not in (*_NOT_INPUTS, _LABELS)
        }
        labels = call.arguments.get(_LABELS)
        self._labels = {} if labels is None else {_LABELS: labels}
        self._generators = _Generators(self.module)

    def logits(self, changed: Mapping[str, Tensor], shape: tuple[int, int]) -> Tensor:
        """Logits, or what stands for them, of each token: [rows, tokens, features].

        Args:
            changed: arguments to replace.
            shape: rows and tokens.

        Raises:
            ForwardError: the model raised, or returned nothing of that shape.
        """
        arguments = {**self.arguments, **changed}
        try:
            output = self._run(arguments)
        except Exception as error:
            if not self._labels:
                raise ForwardError(_raised(self.module, arguments, error)) from error
            try:
                output = self._run(arguments | self._labels)
            except Exception as again:
                raise ForwardError(_raised(self.module, arguments | self._labels, again)) from again
        found = _per_token(output, shape)
        if found is None and self._labels:
            found = _per_token(self._run(arguments | self._labels), shape)
        if found is None:
            raise ForwardError(
                f"{type(self.module).__name__} returned {_shapes(output)}, none of it of [rows, tokens] = "
                f"{list(shape)}: pass a batch for which it returns the logits of every token"
            )
        return found

    def again(self) -> None:
        """Make the call as it was made, whatever comes of it."""
        self._run(self._call.arguments)

    def noise(self, shape: tuple[int, int]) -> str:
        """Where two forwards of the same inputs first part: a module by name, or words to that effect."""
        first, second = self._outputs({}, shape), self._outputs({}, shape)
        for (name, left), (_, right) in zip(first, second, strict=False):
            if left != right:
                return f"first in {name or 'the model'} ({type(self.module.get_submodule(name)).__name__})"
        return "in no module of its own"

    def _outputs(self, changed: Mapping[str, Tensor], shape: tuple[int, int]) -> list[tuple[str, float]]:
        """A number for the output of each module, in the order in which they were done."""
        marks: list[tuple[str, float]] = []

        def note(name: str) -> Callable[[Any, Any, Any], None]:
            def hook(module: Any, inputs: Any, output: Any) -> None:
                value = next((one for one in _tensors(output) if one.is_floating_point()), None)
                if value is not None:
                    marks.append((name, float(value.detach().double().abs().sum())))

            return hook

        with ExitStack() as hooks:
            for name, module in self.module.named_modules():
                hooks.callback(module.register_forward_hook(note(name)).remove)
            self.logits(changed, shape)
        return marks

    def _run(self, arguments: Mapping[str, Any]) -> Any:
        self._generators.restore()
        # What fills up as it is read, such as a cache, is used once.
        given = {name: fresh(value) for name, value in arguments.items()}
        with ExitStack() as stack:
            stack.enter_context(torch.set_grad_enabled(self._call.gradients))
            for kind in ("cpu", "cuda"):
                dtype = dict(self._call.autocast).get(kind)
                if dtype is not None or torch.is_autocast_enabled(kind):
                    stack.enter_context(torch.autocast(kind, dtype=dtype, enabled=dtype is not None))
            return self.module(**given)


@contextmanager
def by_row(model: nn.Module, training: bool) -> Iterator[None]:
    """Let a token depend on its own row alone, as far as that can be switched; modes are the caller's to put back."""
    model.train(training)
    one_by_one = (nn.modules.dropout._DropoutNd, nn.modules.batchnorm._NormBase)
    thresholds = []
    for module in every_module(model):
        if isinstance(module, one_by_one):
            module.eval()
        state = getattr(module, "state", None)
        if getattr(state, "threshold", 0.0) and type(module).__module__.startswith("bitsandbytes"):
            thresholds.append((state, state.threshold))  # type: ignore[union-attr]
    with without_repacking(model):
        try:
            for state, _ in thresholds:
                state.threshold = 0.0  # type: ignore[union-attr]
            yield
        finally:
            for state, threshold in thresholds:
                state.threshold = threshold  # type: ignore[union-attr]


class _Generators:
    """The generators of the process, and those that modules hold."""

    def __init__(self, model: nn.Module) -> None:
        self._common = RandomState()
        numpy = sys.modules.get("numpy.random")
        held = [value for module in every_module(model) for value in vars(module).values()]
        self._torch = [(one, one.get_state()) for one in held if isinstance(one, torch.Generator)]
        self._python = [(one, one.getstate()) for one in held if isinstance(one, random.Random)]
        kinds: Any = () if numpy is None else (numpy.Generator,)
        self._numpy = [(one.bit_generator, one.bit_generator.state) for one in held if isinstance(one, kinds)]

    def restore(self) -> None:
        self._common.restore()
        for generator, state in self._torch:
            generator.set_state(state)
        for drawn, before in self._python:
            drawn.setstate(before)
        for bits, numbers in self._numpy:
            bits.state = numbers


def _per_token(output: Any, shape: tuple[int, int]) -> Tensor | None:
    """The first output with features for each token, logits before all others."""
    logits = output.get("logits") if isinstance(output, Mapping) else getattr(output, "logits", None)
    for value in (logits, *_tensors(output)):
        if not isinstance(value, Tensor) or not value.is_floating_point():
            continue
        if value.dim() >= 3 and tuple(value.shape[:2]) == shape:
            return value.detach().flatten(2)
        if value.dim() == 2 and value.shape[0] == shape[0] * shape[1]:  # rows without a dimension of their own
            return value.detach().reshape(*shape, -1)
    return None


def _tensors(output: Any) -> Iterator[Tensor]:
    if isinstance(output, Tensor):
        yield output
    elif isinstance(output, Mapping):
        yield from (one for value in output.values() for one in _tensors(value))
    elif isinstance(output, list | tuple):
        yield from (one for value in output for one in _tensors(value))


def _shapes(output: Any) -> str:
    found = [str(list(one.shape)) for one in _tensors(output)]
    return f"tensors of {name_some(found)}" if found else f"a {type(output).__name__} without tensors"


def is_sharded(model: nn.Module) -> bool:
    """Whether its parameters lie in several processes, all of which would have to make the same forwards."""
    fully = any(type(one).__name__ == "FullyShardedDataParallel" for one in model.modules())
    return fully or any(type(one).__name__ == "DTensor" or hasattr(one, "ds_id") for one in model.parameters())


def fresh(value: Any) -> Any:
    """What fills up as it is read, such as a cache, as it is now; all else itself."""
    if not hasattr(value, "get_seq_length"):
        return value
    return copy.deepcopy(value)


def _raised(module: nn.Module, arguments: Mapping[str, Any], error: Exception) -> str:
    first = str(error).partition("\n")[0]
    given = ", ".join(arguments) or "nothing"
    message = f"{type(module).__name__} given {given} raised {type(error).__name__}: {first}"
    try:
        needed = inspect.signature(module.forward).parameters
    except (TypeError, ValueError):
        return message
    unknown = [name for name in arguments if name not in needed]
    passes = any(one.kind is one.VAR_KEYWORD for one in needed.values())
    return message if passes or not unknown else f"{message}; it takes no {', '.join(unknown)}"
