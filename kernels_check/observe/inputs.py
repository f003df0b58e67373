"""What the step gave its model: the arguments of each call, and how much of them is padding.

None of the inputs alone is believed: a mask of ones may lie over padded rows, and the token that pads need not be the
one in the configuration. What a mask hides is padding. So is a run of one token at either end of a record, if labels
of -100 all over it, positions that stay the same, or a configuration that names the token say so. Any other
run may be text, and is counted separately.
"""

from __future__ import annotations

import copy
import inspect
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence, Set
from contextlib import ExitStack, suppress
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from kernels_check.check import name_some
from kernels_check.observe.hooks import HookGuard, ModuleHook, backward_task
from kernels_check.observe.loss import BackwardPasses, LossMade, read_log_probs, read_loss
from kernels_check.observe.modules import Model, attribute, every_module
from kernels_check.observe.records import PADDING, LayoutError, Records, find_records, hidden_by

_WRAPS = ("module", "base_model", "model")
"""Attributes under which a wrapper holds what it wraps: DistributedDataParallel, PEFT, models with a head."""
_POSITIONAL = ("input_ids", "attention_mask", "position_ids")
_NO_TOKENS = ("labels", "token_type_ids", "seq_idx", "sequence_ids", "segment_ids", "document_ids")
_COPIED_ELEMENTS = 2**24


@dataclass(frozen=True, slots=True, kw_only=True)
class ModelCall:
    """One call of the model, outside which no other call of it was under way."""

    module: nn.Module
    """The one that was called, which lies inside the model where a step goes round its wrapper."""
    arguments: Mapping[str, Any]
    """By name; token tensors as they were then, since their memory may be used again."""
    training: bool = True
    gradients: bool = True
    """Whether autograd recorded it."""
    autocast: tuple[tuple[str, torch.dtype], ...] = ()
    """Kinds of devices under autocast, each with its dtype."""
    inside: list[ModelCall] = field(default_factory=list)
    """Calls that it made of what the module wraps."""
    loss_gradients: list[Tensor] = field(default_factory=list)
    """What reached the loss that it returned, in each backward pass; of a call outside of all others."""
    losses: list[LossMade] = field(default_factory=list)
    """How that loss was made; none where it has no gradient."""
    number: int | None = None
    """Of the call in the log of all calls, where there is one."""

    def matching(self, matches: Callable[[Mapping[str, Any]], bool]) -> list[ModelCall]:
        """This call if its arguments match, else those inside that do: wrappers have names of their own."""
        return [self] if matches(self.arguments) else [one for call in self.inside for one in call.matching(matches)]


class InputLog:
    """Hooks that keep the calls of a model.

    Args:
        shield: what hooks are wrapped in.
    """

    def __init__(self, shield: HookGuard) -> None:
        self.calls: list[ModelCall] = []
        self._shield = shield
        self._hooks: ExitStack | None = None
        self.backwards: BackwardPasses | None = None
        """What went back from these calls; None before any."""
        self._open: list[ModelCall] = []
        self._current: Callable[[], int | None] = lambda: None

    def attach(self, model: nn.Module, hooks: ExitStack, current: Callable[[], int | None] = lambda: None) -> None:
        """Forget earlier calls and keep those to come, until ``hooks`` is closed.

        Args:
            model: whose calls are kept.
            hooks: that take the hooks off.
            current: gives the number of the call that has just begun in the log of all calls.
        """
        self._current = current
        self.calls.clear()
        self._open.clear()
        self._hooks = hooks
        self.backwards = BackwardPasses(model)
        for module in _reachable(model):
            begun, ended = (ModuleHook(module, self._shield(hook)) for hook in (self._begin, self._end))
            hooks.push(module.register_forward_pre_hook(begun, with_kwargs=True))
            hooks.push(module.register_forward_hook(ended, always_call=True))

    def clear(self) -> None:
        """Drop all calls."""
        self.calls.clear()
        self.backwards = self._hooks = None
        self._current = lambda: None

    def drop(self, failed: Set[int]) -> None:
        """Drop the calls of these numbers, which came to nothing."""
        self.calls[:] = [_without(call, failed) for call in self.calls if call.number not in failed]

    def _begin(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        call = replace(_describe(module, args, kwargs), number=self._current())
        if backward_task() == -1:  # in a backward pass it is a recomputation
            (self._open[-1].inside if self._open else self.calls).append(call)
        self._open.append(call)

    def _end(self, module: nn.Module, args: Any, output: Any) -> None:
        if not self._open:  # none if the hook before it failed
            return
        call = self._open.pop()
        hooks, backwards = self._hooks, self.backwards
        if self._open or hooks is None or backwards is None:
            return
        loss = _loss(output)
        if loss is not None and loss.requires_grad:
            hooks.push(loss.register_hook(self._shield(partial(_keep, call))))
            call.losses.append(read_loss(loss, backwards, hooks, self._shield))
        call.losses.append(read_log_probs(output, backwards, hooks, self._shield))


def _without(call: ModelCall, failed: Set[int]) -> ModelCall:
    call.inside[:] = [_without(one, failed) for one in call.inside if one.number not in failed]
    return call


def training_calls(calls: Sequence[ModelCall]) -> list[ModelCall]:
    """Those that were trained on: an evaluation or a reference inside the step needs no gradients."""
    return [call for call in calls if call.gradients] or list(calls)


def names_tokens(arguments: Mapping[str, Any]) -> bool:
    """Whether the tokens are called what transformers calls them."""
    return isinstance(arguments.get("input_ids"), Tensor) or isinstance(arguments.get("inputs_embeds"), Tensor)


def find_tokens(arguments: Mapping[str, Any]) -> tuple[str, Tensor] | None:
    """Name and value of the argument with the tokens, [rows, tokens], or embeddings, [rows, tokens, features]."""
    for name, dimensions in (("input_ids", 2), ("inputs_embeds", 3)):
        value = arguments.get(name)
        if isinstance(value, Tensor) and value.dim() == dimensions:
            return name, value
    for name, value in arguments.items():  # a model written by hand calls them as it likes
        numbers = isinstance(value, Tensor) and value.dim() == 2 and value.dtype in (torch.long, torch.int32)
        if numbers and name not in (*_NO_TOKENS, *_POSITIONAL):
            return name, value
    return None


def unwrapped(module: nn.Module) -> nn.Module:
    """Without what synchronises the processes around it, whose own state a call would move."""
    while isinstance(module, nn.parallel.DistributedDataParallel | nn.DataParallel):
        module = module.module
    return module


def _reachable(model: nn.Module) -> Iterator[nn.Module]:
    """The model and what its wrappers hold, as far as no hook would be compiled in."""
    seen: set[int] = set()
    module: Any = model
    while isinstance(module, nn.Module) and id(module) not in seen:
        if module._compiled_call_impl is not None:
            return
        seen.add(id(module))
        yield module
        if isinstance(module, torch._dynamo.OptimizedModule) or hasattr(module.forward, "_torchdynamo_orig_callable"):
            return
        held = (getattr(module, name, None) for name in _WRAPS)
        module = next((one for one in held if isinstance(one, nn.Module) and id(one) not in seen), None)


def _describe(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> ModelCall:
    names = _positional_names(module) if args else ()
    arguments = dict(zip(names, args, strict=False)) | kwargs
    kinds = [kind for kind in ("cpu", "cuda") if torch.is_autocast_enabled(kind)]
    return ModelCall(
        module=module,
        arguments={name: _kept(value) for name, value in arguments.items()},
        training=module.training,
        gradients=torch.is_grad_enabled(),
        autocast=tuple((kind, torch.get_autocast_dtype(kind)) for kind in kinds),
    )


def _positional_names(module: nn.Module) -> Sequence[str]:
    """What the positional arguments are called, by the first that does not merely pass them on."""
    for one in _reachable(module):
        with suppress(TypeError, ValueError):
            parameters = inspect.signature(one.forward).parameters.values()
            if not any(parameter.kind is parameter.VAR_POSITIONAL for parameter in parameters):
                return [parameter.name for parameter in parameters if parameter.kind is not parameter.VAR_KEYWORD]
    return _POSITIONAL


def _loss(output: Any) -> Tensor | None:
    """The loss that a model returned; models that return tuples put it first."""
    found = output.get("loss") if isinstance(output, Mapping) else getattr(output, "loss", None)
    if found is None and isinstance(output, tuple) and output:
        found = output[0]
    return found if isinstance(found, Tensor) and found.numel() == 1 else None


def _keep(call: ModelCall, gradient: Tensor) -> None:
    call.loss_gradients.append(gradient.detach())


def _kept(value: Any) -> Any:
    if isinstance(value, Tensor):
        small = value.dim() <= 2 and value.numel() <= _COPIED_ELEMENTS and not value.requires_grad
        return value.detach().clone() if small else value
    if hasattr(value, "get_seq_length"):  # a cache, which the call is about to fill
        with suppress(Exception):
            return copy.deepcopy(value)
    return value


def special_tokens(
    configs: Iterable[Any], kinds: tuple[str, ...] = ("",), *, but: tuple[str, ...] = ()
) -> frozenset[int]:
    """Ids that configurations name, of some kinds (``pad``, ``eos``) or of all but some."""
    found: set[int] = set()
    for config in configs:
        for name, value in vars(config).items():
            if name.endswith(("_token_id", "_token_index")) and name.startswith(kinds) and not name.startswith(but):
                values = value if isinstance(value, list | tuple) else [value]
                found.update(one for one in values if isinstance(one, int) and not isinstance(one, bool) and one >= 0)
    return frozenset(found)


def configurations(model: Model) -> Iterator[Any]:
    """Of the model, of what it wraps, and of their parts, such as the text of a vision model."""
    seen: set[int] = set()
    modules = list(every_module(model))
    waiting = [attribute(module, name) for name in ("config", "generation_config") for module in modules]
    while waiting:
        config = waiting.pop()
        if hasattr(config, "__dict__") and id(config) not in seen:
            seen.add(id(config))
            yield config
            waiting += [one for name, one in vars(config).items() if name.endswith("_config")]


_IGNORED = -100
"""The label that no loss is computed for."""


@dataclass(frozen=True, slots=True, kw_only=True)
class PaddingSeen:
    """Padding in the inputs of the calls of one step."""

    tokens: int
    padded: int
    """Positions that are padding by all that is known."""
    doubtful: int = 0
    """Further positions at the end of a record, in runs of one token or of a token that pads, which may be text."""
    by: tuple[str, ...] = ()
    """What in the inputs showed it."""
    by_call: tuple[tuple[int, int], ...] = ()
    """Padded positions and all positions of each call."""
    unseen: str | None = None
    """Why the tokens of a call could not be read."""


def count_padding(model: nn.Module, calls: Sequence[ModelCall]) -> PaddingSeen | None:
    """Count padded positions over the calls that were trained on; None where no call was seen."""
    trained = training_calls(calls)
    if not trained:
        return None
    named = _Named.by(model)
    signs, counts, doubtful, unseen = set[str](), list[tuple[int, int]](), 0, None
    given = [one for outer in trained for one in outer.matching(names_tokens) or [outer]]
    for call in [one for encoded in given for one in (encoded, *_decoded(encoded))]:
        counted = _Counted.read(call, named)
        if counted is None:
            unseen = f"a call of {type(call.module).__name__} was given no tokens of [rows, tokens]"
            continue
        if counted.unseen is not None:
            unseen = counted.unseen
        counts.append((int(counted.padded.sum()), counted.padded.numel()))
        doubtful += int(counted.doubtful.sum())
        signs |= counted.signs
    return PaddingSeen(
        tokens=sum(total for _, total in counts),
        padded=sum(padded for padded, _ in counts),
        doubtful=doubtful,
        by=tuple(sorted(signs)),
        by_call=tuple(counts),
        unseen=unseen,
    )


def _decoded(call: ModelCall) -> Iterator[ModelCall]:
    """What an encoder-decoder decodes, which is padded by itself; without its own tokens it is made from the labels."""
    if not any(
        getattr(attribute(one, "config"), "is_encoder_decoder", False) is True for one in every_module(call.module)
    ):
        return
    labels, mask = (call.arguments.get(name) for name in ("labels", "decoder_attention_mask"))
    tokens = call.arguments.get("decoder_input_ids")
    if isinstance(tokens, Tensor) or isinstance(labels, Tensor):
        given = {"input_ids": labels if tokens is None else tokens, "labels": labels, "attention_mask": mask}
        yield replace(call, arguments=given)


@dataclass(frozen=True, slots=True, kw_only=True)
class _Named:
    """Tokens that the configuration names."""

    ends: frozenset[int]
    """They end texts, begin them, or pad."""
    pads: frozenset[int]
    """They pad, and are named for nothing else."""
    holders: frozenset[int]
    """They repeat for another reason, such as the places of an image."""

    @classmethod
    def by(cls, model: nn.Module) -> _Named:
        """Read the configurations of a model."""
        named = list(configurations(model))
        ends = special_tokens(named, ("pad", "eos", "bos"))
        others = special_tokens(named, but=("pad",))
        return cls(ends=ends, pads=ends - others, holders=others - ends)


@dataclass(frozen=True, slots=True, kw_only=True)
class _Counted:
    """The padding of one call, [rows, tokens]."""

    padded: Tensor
    doubtful: Tensor
    signs: frozenset[str]
    unseen: str | None = None

    @classmethod
    def read(cls, call: ModelCall, tokens: _Named) -> _Counted | None:
        """Count one call; None where it had no tokens."""
        found = find_tokens(call.arguments)
        if found is None:
            return None
        rows, length = found[1].shape[:2]
        hidden = hidden_by(call.arguments.get("attention_mask"), rows, length)
        signs = {"attention_mask"} if hidden is not None and bool(hidden.any()) else set()
        if found[1].is_floating_point():
            nothing = torch.zeros(rows, length, dtype=torch.bool)
            unseen = None
            if not signs:  # a mask of ones may lie over anything
                unseen = (
                    f"{found[0]} of {list(found[1].shape)} hides the tokens, and no attention_mask shows any padding"
                )
            return cls(
                padded=nothing if hidden is None else hidden, doubtful=nothing, signs=frozenset(signs), unseen=unseen
            )
        ids = found[1]
        masked = torch.zeros_like(ids, dtype=torch.bool) if hidden is None else hidden.to(ids.device)
        numbers = _records(call, ids).numbers.to(ids.device)
        runs, spare = _end_runs(ids, numbers)
        runs &= ~_among(ids, tokens.holders)
        ignored = _ignored(call.arguments.get("labels"), runs, spare)
        still = runs & _repeated(call.arguments.get("position_ids"), numbers)
        named = runs & ~spare & _among(ids, tokens.ends)
        by_mask = runs & ~spare & torch.isin(ids, ids[masked].unique())
        for what, where in (("labels of -100", ignored), ("positions that do not change", still)):
            signs |= {what} if bool((where & ~masked).any()) else set()
        for token in ids[(named | by_mask) & ~masked].unique().tolist():
            signs.add(f"runs of token {token} at the ends of the records")
        padded = masked | ignored | still | named | by_mask
        # Where a mask hides anything, it was made for these rows, and what else repeats in them is text.
        # The last before the text, too, and one alone: what is named as nothing but padding hardly is a word.
        nothing_else = (runs | _ends(numbers)) & _among(ids, tokens.pads)
        doubtful = ((runs & ~spare) | nothing_else) & ~padded & ~masked.any()
        return cls(padded=padded, doubtful=doubtful, signs=frozenset(signs))


def _records(call: ModelCall, ids: Tensor) -> Records:
    """The records, or each row as one where nothing gives them."""
    rows, length = ids.shape
    try:
        found = find_records(call.arguments, rows, length)
    except LayoutError:
        found = None
    return found or Records(numbers=torch.zeros_like(ids, dtype=torch.long), by="rows")


def _among(ids: Tensor, tokens: frozenset[int]) -> Tensor:
    return torch.isin(ids, torch.tensor(sorted(tokens), dtype=ids.dtype, device=ids.device))


def _end_runs(ids: Tensor, numbers: Tensor) -> tuple[Tensor, Tensor]:
    """Tokens that repeat one another up to an end of their record, and of each such run the one that may be text.

    Padding is often done with the token that ends a text, so the one next to the text is spared; a run of one is none.
    """
    head, head_inner = _leading_runs(ids, numbers)
    tail, tail_inner = (one.flip(1) for one in _leading_runs(ids.flip(1), numbers.flip(1)))
    whole = head & tail  # one token over and over: its last is spared, as if padding came before it
    return (head | tail) & (numbers != PADDING), (head_inner & ~whole) | (tail_inner & ~whole) | (head_inner & whole)


def _ends(numbers: Tensor) -> Tensor:
    """The first and the last token of each record."""
    ends = torch.ones_like(numbers, dtype=torch.bool)
    ends[:, 1:-1] = (numbers[:, 1:-1] != numbers[:, :-2]) | (numbers[:, 1:-1] != numbers[:, 2:])
    return ends & (numbers != PADDING)


def _leading_runs(ids: Tensor, numbers: Tensor) -> tuple[Tensor, Tensor]:
    """Tokens of two or more equal ones from the beginning of their record, and of those the last."""
    same, begins = torch.zeros_like(ids, dtype=torch.bool), torch.ones_like(ids, dtype=torch.bool)
    begins[:, 1:] = numbers[:, 1:] != numbers[:, :-1]
    same[:, 1:] = (ids[:, 1:] == ids[:, :-1]) & ~begins[:, 1:]
    index = torch.arange(ids.shape[1], device=ids.device).expand_as(ids)
    start = torch.where(begins, index, 0).cummax(dim=1).values
    broken = torch.where(~same & ~begins, index, -1).cummax(dim=1).values
    leading = broken < start  # nothing else has come since the record began
    follows = torch.zeros_like(leading)
    follows[:, :-1] = leading[:, 1:] & same[:, 1:]
    run = leading & (same | follows)
    return run, run & ~follows


def _ignored(labels: Any, runs: Tensor, spare: Tensor) -> Tensor:
    """Runs without a label, all of them but the one that may be text, while others have one."""
    if not isinstance(labels, Tensor) or labels.shape != runs.shape or not bool((labels != _IGNORED).any()):
        return torch.zeros_like(runs)
    return runs & ~spare & labels.eq(_IGNORED).to(runs.device)


def _repeated(positions: Any, numbers: Tensor) -> Tensor:
    """Where a position is that of the token before or after it in the same record: each record begins at the same."""
    still = torch.zeros_like(numbers, dtype=torch.bool)
    if not isinstance(positions, Tensor) or positions.dim() not in (1, 2) or positions.shape[-1] != numbers.shape[1]:
        return still
    rows = (positions.unsqueeze(0) if positions.dim() == 1 else positions).expand_as(numbers).to(numbers.device)
    equal = (rows[:, 1:] == rows[:, :-1]) & (numbers[:, 1:] == numbers[:, :-1])
    still[:, 1:] |= equal
    still[:, :-1] |= equal
    return still


def describe(padding: PaddingSeen) -> str:
    """Both numbers, what showed it, and the calls where they differ."""
    share = padding.padded / padding.tokens if padding.tokens else 0.0
    by = f", shown by {' and '.join(padding.by)}" if padding.by else ""
    text = f"{padding.padded} of {padding.tokens} positions ({share:.0%}) are padding{by}"
    if len(set(padding.by_call)) > 1:
        text += f" (by call: {name_some(f'{padded} of {total}' for padded, total in padding.by_call)})"
    if padding.doubtful:
        text += (
            f"; {padding.doubtful} more at the ends of records repeat one token, or are one that pads, and nothing "
            "says whether they are text"
        )
    return text
