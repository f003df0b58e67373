"""Whether records packed into one row see each other: change some, and look at the others.

Packing relies on ``position_ids`` that restart at each record, and on a mask that the model derives from them only if
it is given no attention mask and builds no cache. When that fails nothing crashes; the benchmark even gets faster,
because attention over the whole row is cheaper to dispatch than a block mask. No flag shows it, so the model is asked.

Every ordered pair of records is probed, in both directions. A forward for each record would be the plain way; instead
each forward changes half of the records, a different half each time, chosen so that of any two records each is at some
time changed without the other. Those are the subsets of half of k forwards, of which there are binomial(k, k/2)
(Sperner 1928): 4 forwards do for 6 records a row, 8 for 70, 14 for 3432, and all rows are changed at once.

Equality is exact: a masked position contributes an exact zero, and each row of a matrix product depends on its own
input only. Where that does not hold, rows see each other too, which attention cannot bring about; so before anything is
called a leak, a row is compared with its own copy beside a changed one.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import combinations, islice
from math import comb

import torch
from torch import Tensor, nn

from kernels_check.check import name_some
from kernels_check.observe.forwards import ForwardError, Forwards, by_row, is_sharded
from kernels_check.observe.inputs import ModelCall, find_tokens
from kernels_check.observe.records import PADDING, PASSED_ON, LayoutError, Records, find_records
from kernels_check.observe.restore import restored
from kernels_check.observe.token_perturbation import largest_difference, other_tokens, three_of

_BEYOND_NOISE = 10.0
"""How many times what rows do to each other a leak must be to be called one."""
_FILLS = 8
"""Rows of a single token that a leaking row is put between, to see whether rows change each other."""
_SETTLING = 3
"""How often probing begins anew where the first forward was not like those after it."""


@dataclass(frozen=True, slots=True, kw_only=True)
class IsolationResult:
    """What perturbing the records of one batch showed."""

    records: int = 0
    leaks: tuple[str, ...] = ()
    """Perturbations that reached other logits, each as a phrase."""
    unclear: str | None = None
    """Why nothing can be told."""
    packed: bool = True
    """Whether any row holds two records."""
    probed: tuple[str, ...] = ()
    """Modes in which records were changed."""
    notes: tuple[str, ...] = ()
    """What was not probed, and what else there is to know."""


def perturb_records(model: nn.Module, calls: Sequence[ModelCall], records: Records | None = None) -> IsolationResult:
    """Make calls as they were and perturbed; everything is left as found.

    Args:
        model: the one that ``calls`` are calls of.
        calls: of equal arguments, in the modes that are to be probed.
        records: where they lie, if the arguments do not tell.
    """
    call = calls[0]
    unfit = _unfit(model)
    tokens = find_tokens(call.arguments)
    if unfit is not None or tokens is None:
        return IsolationResult(unclear=unfit or _no_tokens(call))
    rows, length = tokens[1].shape[:2]
    try:
        records = records or find_records(call.arguments, rows, length)
    except LayoutError as error:
        return IsolationResult(unclear=str(error))
    if records is None:
        return IsolationResult(unclear=f"nothing tells where records begin: pass {PASSED_ON}", packed=False)
    if not records.packed:
        reason = f"no row of the batch packs two records, as {records.by} has it"
        return IsolationResult(records=records.count, unclear=reason, packed=False)
    leaks, notes = list[str](), dict[str, None]()
    with restored(model):
        for one in calls:
            mode = "train" if one.training else "eval"
            with by_row(model, one.training):
                probe = _Probe(Forwards(one), tokens, records, _is_causal(model))
                try:
                    leaks += [f"{mode}: {leak}" for leak in probe.leaks()]
                except (_UnclearError, ForwardError) as error:
                    return IsolationResult(records=records.count, unclear=f"{mode}: {error}", leaks=tuple(leaks))
                notes |= dict.fromkeys(probe.notes)
    modes = tuple("train" if one.training else "eval" for one in calls)
    return IsolationResult(records=records.count, leaks=tuple(leaks), probed=modes, notes=tuple(notes))


def separating_sets(count: int) -> list[frozenset[int]]:
    """For each of so many records the forwards in which it is changed: as few as let each differ from every other."""
    forwards = next(k for k in range(1, count + 2) if comb(k, k // 2) >= count)
    return [frozenset(chosen) for chosen in islice(combinations(range(forwards), forwards // 2), count)]


class _UnclearError(RuntimeError):
    """Why nothing can be told."""


class _SettledError(RuntimeError):
    """The first forward differed from all later ones, as where something is set up at first use."""


class _Probe:
    """Changes the records of one call, in one mode."""

    def __init__(self, forwards: Forwards, tokens: tuple[str, Tensor], records: Records, causal: bool | None) -> None:
        self._forwards = forwards
        self._name, self._tokens = tokens
        self._records = records
        self._numbers = records.numbers.to(self._tokens.device)
        self._shape = (self._tokens.shape[0], self._tokens.shape[1])
        self._causal = causal
        self._other, changeable = other_tokens(self._tokens, forwards.module)
        self._changeable = changeable & (self._numbers != PADDING)
        self.notes: list[str] = []

    def leaks(self) -> list[str]:
        """Phrases for what was reached that must not be.

        Raises:
            _UnclearError: a difference, or none, proves nothing here.
        """
        for _ in range(_SETTLING):
            self._reference = self._forward(self._tokens)
            try:
                return self._between_records() or self._inside_records()  # what leaks between shows inside as well
            except _SettledError:
                continue
        raise _UnclearError("forwards of the same batch differ from one to the next, so a leak cannot be told")

    def _between_records(self) -> list[str]:
        packed = self._numbers.amax(dim=1, keepdim=True) > 0
        sets = separating_sets(int(self._numbers.max()) + 1)
        moved = torch.zeros(self._shape, dtype=torch.bool, device=self._tokens.device)
        reached = torch.zeros_like(moved)
        worst: tuple[float, Tensor, Tensor] | None = None
        for forward in range(max(max(one) for one in sets if one) + 1):
            chosen = torch.tensor([forward in one for one in sets] + [False], device=self._tokens.device)
            members = chosen[self._numbers] & packed  # the last, which padding reads, is never chosen
            difference = self._difference(members & self._changeable)
            moved |= (difference > 0) & members
            leaked = (difference > 0) & ~members & (self._numbers != PADDING)
            reached |= leaked
            if bool(leaked.any()) and (worst is None or float(difference[leaked].max()) > worst[0]):
                worst = float(difference[leaked].max()), members & self._changeable, leaked
        self._require_effect(self._changeable & packed, moved, "changing a record")
        if worst is None:
            return []
        largest, members, leaked = worst
        self._exclude_noise(members, leaked, largest)
        row = self._leaking_row(members, leaked)
        target = int(self._numbers[row][leaked[row]].min()) + 1
        sources = sorted(set(self._numbers[row][members[row]].tolist()))
        count = int((self._numbers.amax(dim=1) + 1).sum())
        others = len({(row, int(self._numbers[row, token])) for row, token in reached.nonzero().tolist()})
        return [
            f"changing {_ordinals(sources)} of row {row} changed the logits of {int(leaked.sum())} other tokens by up "
            f"to {largest:.2g}, first those of record {target}; {others} of {count} records see others"
        ]

    def _inside_records(self) -> list[str]:
        """Later tokens must not reach earlier ones of their own record, where the model is causal."""
        if self._causal is False:
            self.notes.append("attention runs both ways inside a record, as it does in this model anyway")
            return []
        place, length = self._records.places()
        # Both cuts in one forward: a row that packs has records of either kind.
        row = torch.arange(self._shape[0], device=self._numbers.device)[:, None]
        start = torch.where((self._numbers + row) % 2 == 0, length - 1, (length + 1) // 2)
        later = (place >= start.clamp(min=1)) & (self._numbers != PADDING)
        difference = self._difference(later & self._changeable)
        what = "changing the last token or the second half"
        self._require_effect(later & self._changeable, (difference > 0) & later, what)
        leaked = (difference > 0) & ~later & (self._numbers != PADDING)
        if not bool(leaked.any()):
            return []
        largest = float(difference[leaked].max())
        self._exclude_noise(later & self._changeable, leaked, largest)
        count = int(leaked.sum())
        phrase = f"{what} of every record changed the logits of {count} earlier tokens by up to {largest:.2g}"
        if self._causal is None:
            raise _UnclearError(f"{phrase}, and the model does not say whether it is causal (can_generate)")
        return [phrase]

    def _require_effect(self, changed: Tensor, moved: Tensor, what: str) -> None:
        """Every record that was changed must show it itself, or it would show nowhere else."""
        keys = self._numbers + torch.arange(self._shape[0], device=self._numbers.device)[:, None] * self._shape[1]
        deaf = set(keys[changed].tolist()) - set(keys[moved].tolist())
        if deaf:
            row, record = divmod(min(deaf), self._shape[1])
            raise _UnclearError(f"{what} did not even change its own logits (record {record + 1} of row {row})")

    def _difference(self, where: Tensor) -> Tensor:
        """By how much the logits of each token change, [rows, tokens], if some tokens are changed."""
        return largest_difference(self._forward(self._replaced(where)), self._reference)

    def _replaced(self, where: Tensor) -> Tensor:
        chosen = where.unsqueeze(-1) if self._tokens.dim() == 3 else where
        return torch.where(chosen, self._other, self._tokens)

    def _forward(self, tokens: Tensor) -> Tensor:
        logits = self._forwards.logits({self._name: tokens}, self._shape)
        if not bool(torch.isfinite(logits).all(dim=-1)[self._numbers != PADDING].all()):
            raise _UnclearError("its logits are not finite, which hides what changes them")
        return logits

    def _exclude_noise(self, changed: Tensor, leaked: Tensor, largest: float) -> None:
        """Make sure that a difference comes from attention.

        Raises:
            _UnclearError: equal inputs give other logits, or rows change each other just as much.
        """
        again = self._forward(self._tokens)
        if bool((largest_difference(again, self._reference) > 0).any()):
            second = self._forward(self._tokens)
            if bool((largest_difference(again, second) > 0).any()):
                raise _UnclearError(
                    "two forwards of the same batch differ even with the same random numbers, "
                    f"{self._forwards.noise(self._shape)}, so a leak cannot be told from noise: make it deterministic"
                )
            raise _SettledError
        row = self._leaking_row(changed, leaked)
        crossed = self._crossed(row, changed)
        if not bool(changed[row].any()) or largest <= _BEYOND_NOISE * crossed:
            raise _UnclearError(
                f"changing one row of the batch changes the logits of another by up to {crossed or largest:.2g}, which "
                "no attention does (experts of limited capacity, activations quantised over the batch), and a change "
                f"of {largest:.2g} inside a row is not beyond that: make the forward depend on each row alone"
            )

    def _leaking_row(self, changed: Tensor, leaked: Tensor) -> int:
        """The first row with a leak, of those in which something was changed where there is one."""
        rows = leaked.any(dim=1)
        both = rows & changed.any(dim=1)
        return int((both if bool(both.any()) else rows).nonzero()[0])

    def _crossed(self, row: int, changed: Tensor) -> float:
        """By how much a row changes if only other rows are changed."""
        only = changed.clone()
        only[:row] = only[row + 1 :] = False
        alone, together = self._forward(self._replaced(only)), self._forward(self._replaced(changed))
        others = self._forward(self._replaced(changed & ~only))
        kept = self._numbers[row] != PADDING
        apart = largest_difference(alone, together), largest_difference(others, self._reference)
        beside = [float(one[row, kept].max()) for one in apart]
        return max(*beside, self._crossed_by_neighbours(row, only))

    def _crossed_by_neighbours(self, row: int, changed: Tensor) -> float:
        """The same of a row that is put between two others.

        What is left alone is the row as it was and as it was perturbed, and the others are also of one token over and
        over: what is computed over a batch may be a maximum, or a queue that has to be filled before it shows.
        """
        tokens = self._tokens
        three = {name: three_of(value, row, tokens.shape[0]) for name, value in self._forwards.arguments.items()}
        if any(value is None and self._forwards.arguments[name] is not None for name, value in three.items()):
            return 0.0
        versions = tokens[row], self._replaced(changed)[row]
        places = torch.linspace(0, self._shape[1] - 1, _FILLS + 2, device=tokens.device).long()[1:-1]
        neighbours = [*versions, *(tokens[row, place].expand_as(tokens[row]) for place in places)]
        kept, most = self._numbers[row] != PADDING, 0.0
        for version in versions:
            first = None
            for neighbour in neighbours:
                batch = torch.stack([neighbour, version, neighbour])
                try:
                    logits = self._forwards.logits({**three, self._name: batch}, (3, self._shape[1]))[1:2]
                except ForwardError:  # it does not take other rows, so there are none to be changed by
                    return 0.0
                first = logits if first is None else first
                most = max(most, float(largest_difference(first, logits)[0, kept].max()))
        return most


def _ordinals(records: Sequence[int]) -> str:
    """Records by their numbers from 1; the first is called so."""
    rest = [str(record + 1) for record in records if record]
    named = f"record{'s' if len(rest) > 1 else ''} {name_some(rest)}" if rest else ""
    return " and ".join(filter(None, ["the first record" if 0 in records else "", named]))


def _is_causal(model: nn.Module) -> bool | None:
    """Whether later tokens may reach earlier ones by the model's own word; None where it does not say."""
    said = [one.is_causal for one in model.modules() if isinstance(getattr(one, "is_causal", None), bool)]
    generates = (getattr(type(one), "can_generate", None) for one in model.modules())
    if True in said or any(bool(ask()) for ask in generates if callable(ask)):
        return True
    return False if said else None


def _unfit(model: nn.Module) -> str | None:
    """Why a model cannot be probed by forwards of this process alone."""
    if any(getattr(getattr(one, "config", None), "is_encoder_decoder", False) is True for one in model.modules()):
        return "an encoder-decoder is told of no records by its inputs, so that packing is not judged"
    if is_sharded(model):
        return (
            "its parameters are sharded over processes, all of which would have to make the same forwards: "
            "probe_isolation(model, batch) before it is sharded"
        )
    return None


def _no_tokens(call: ModelCall) -> str:
    given = name_some(f"{name} {list(one.shape)}" for name, one in call.arguments.items() if isinstance(one, Tensor))
    return f"no input_ids or inputs_embeds of [rows, tokens] among its arguments ({given or 'no tensors'})"
