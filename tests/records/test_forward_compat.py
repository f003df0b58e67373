"""What is read of a newer version's tables: the known part, by name, and never a guess."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import pytest

from lorameter.errors import UsageError
from lorameter.records.forward_compat import read_known
from lorameter.records.record import SCHEMA, is_newer


@dataclass(frozen=True, slots=True, kw_only=True)
class Leaf:
    size: int = 0


@dataclass(frozen=True, slots=True, kw_only=True)
class Tree:
    name: str
    leaf: Leaf | None = None
    leaves: tuple[Leaf, ...] = ()
    by_name: dict[str, Leaf] = field(default_factory=dict)
    plain: dict[str, Any] = field(default_factory=dict)


def read(data):
    left = {}
    return read_known(Tree, data, "it", left), list(left)


def test_unknown_keys_are_left_out_wherever_they_stand():
    """Each named once, however often it comes; what is of any kind is kept as it is."""
    new = {"size": 1, "hue": "red"}
    tree, left = read(
        {"name": "a", "age": 3, "leaf": new, "leaves": [new, new], "by_name": {"x": new}, "plain": {"hue": 1}}
    )
    one = Leaf(size=1)
    assert tree == Tree(name="a", leaf=one, leaves=(one, one), by_name={"x": one}, plain={"hue": 1})
    assert left == ["it, age", "it, leaf, hue", "it, leaves, hue", "it, by_name, x, hue"]


def test_an_item_that_does_not_fit_is_left_out_whole():
    """And said with its reason; the others are kept."""
    tree, left = read({"name": "a", "leaves": [{"size": 1}, {"size": "large"}]})
    assert tree.leaves == (Leaf(size=1),)
    assert len(left) == 1
    assert "size = 'large': int is expected" in left[0]


@pytest.mark.parametrize("data", [{"name": 1}, {}, {"name": "a", "leaf": {"size": "large"}}, [], None])
def test_nothing_is_put_in_the_place_of_what_does_not_fit(data):
    """A default there would be a statement that nobody made."""
    with pytest.raises(UsageError):
        read(data)


@pytest.mark.parametrize(
    ("schema", "newer"),
    [(SCHEMA, False), (SCHEMA + 1, True), (10**30, False), (True, False), ("99", False), (6.0, False), (None, False)],
)
def test_a_schema_is_newer_by_its_number_alone(schema, newer):
    """What is no schema at all is none that came later."""
    assert is_newer(schema) is newer
