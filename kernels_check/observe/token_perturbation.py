"""Other tokens in the place of those that a model was given, and by how much its logits differ."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from kernels_check.observe.module_tree import Model, attribute, every_module

_SLICE = 2**24
"""Elements that are compared at a time, so that a large vocabulary does not take their memory twice."""


def other_tokens(tokens: Tensor, model: nn.Module) -> tuple[Tensor, Tensor]:
    """A replacement for every token, and which of them may be replaced.

    Tokens become other tokens of the same batch, which the vocabulary surely has. Special ones stay: an image's place
    holder or padding means more to some models than its embedding.

    Args:
        tokens: ids [rows, tokens], or embeddings [rows, tokens, features].
        model: whose configuration names the special tokens.
    """
    if tokens.is_floating_point():
        rolled = tokens.roll(1, -1)
        return rolled, (rolled != tokens).any(dim=-1)
    special = torch.tensor(sorted(special_tokens(configurations(model))), dtype=tokens.dtype, device=tokens.device)
    changeable = ~torch.isin(tokens, special)
    known = tokens[changeable].unique()
    if known.numel() < 2:  # one token over and over: its neighbour must do
        return torch.where(tokens > 0, tokens - 1, tokens + 1), changeable
    following = torch.searchsorted(known, tokens.contiguous(), right=True) % known.numel()
    return known[following], changeable


def special_tokens(
    configs: Iterable[Any], kinds: tuple[str, ...] = ("",), *, but: tuple[str, ...] = ()
) -> frozenset[int]:
    """Ids that configurations name, of some kinds (``pad``, ``eos``) or of all but some."""
    found: set[int] = set()
    for config in configs:
        for name, value in vars(config).items():
            if name.endswith(("_token_id", "_token_index")) and name.startswith(kinds) and not name.startswith(but):
                found.update(one for one in (value if isinstance(value, list | tuple) else [value]) if _is_id(one))
    return frozenset(found)


def largest_difference(left: Tensor, right: Tensor) -> Tensor:
    """The largest absolute difference of the features of each token, [rows, tokens]; a NaN counts as infinite."""
    flat = left.flatten(0, 1), right.flatten(0, 1)
    step = max(1, _SLICE // max(1, left.shape[-1]))
    wide = torch.promote_types(left.dtype, torch.float32)
    parts = [
        (one.to(wide) - other.to(wide)).abs().amax(dim=-1)
        for one, other in zip(flat[0].split(step), flat[1].split(step), strict=True)
    ]
    return torch.cat(parts).nan_to_num(nan=torch.inf, posinf=torch.inf).reshape(left.shape[:2])


def three_of(value: Any, row: int, rows: int) -> Any:
    """An argument for so many rows, as it is for one of them three times; None where it cannot be taken apart."""
    if isinstance(value, Mapping):
        parts = {name: three_of(one, row, rows) for name, one in value.items()}
        return None if any(one is None and value[name] is not None for name, one in parts.items()) else parts
    if isinstance(value, Tensor) and value.dim() > 1:
        if value.shape[0] == 1:
            return torch.cat([value] * 3)
        return value[[row] * 3] if value.shape[0] == rows else None
    return value if not isinstance(value, Tensor) or value.dim() == 0 else None


def _is_id(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value >= 0


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
