"""Seeded instruction records of dolly's schema, for when no data set is at hand.

The tasks are small enough for a model of a few million parameters to learn something from, and their lengths spread
like those of real records (a log-normal body), because packing and padding costs depend on lengths. Numbers that
rest on these are shown with "synthetic".
"""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator

Record = dict[str, str]

_NOUNS = tuple(
    "river harbour lantern orchard violin glacier market bridge garden engine library meadow kettle island compass "
    "tower forest canvas mirror station valley feather hammer window letter planet copper saddle anchor basket".split()
)  # fmt: skip
_TRAITS = tuple(
    "old quiet narrow bright heavy distant wooden hollow gentle broken early silver round steep warm dry".split()
)
_VERBS = tuple("crosses holds guards feeds lights follows carries hides opens meets turns covers shows keeps".split())


def synthetic_records(seed: int) -> Iterator[Record]:
    """Endless records with keys instruction, context, response, category; equal seeds give equal records."""
    source = random.Random(seed)
    makers: tuple[Callable[[random.Random], Record], ...] = (_addition, _ordering, _closed, _summary, _list)
    while True:
        yield source.choice(makers)(source)


def _record(instruction: str, response: str, category: str, context: str = "") -> Record:
    return {"instruction": instruction, "context": context, "response": response, "category": category}


def _sentence(source: random.Random) -> str:
    first, second = source.sample(_NOUNS, 2)
    return f"The {source.choice(_TRAITS)} {first} {source.choice(_VERBS)} the {source.choice(_TRAITS)} {second}."


def _length(source: random.Random, median: float, most: int) -> int:
    return max(1, min(most, round(source.lognormvariate(0, 0.7) * median)))


def _addition(source: random.Random) -> Record:
    left, right = source.randrange(100), source.randrange(100)
    return _record(f"What is {left} plus {right}?", f"{left} plus {right} is {left + right}.", "open_qa")


def _ordering(source: random.Random) -> Record:
    words = source.sample(_NOUNS, min(len(_NOUNS), 2 + _length(source, 3, 12)))
    return _record(
        f"Put these words in alphabetical order: {', '.join(words)}.", ", ".join(sorted(words)) + ".", "classification"
    )


def _closed(source: random.Random) -> Record:
    sentences = [_sentence(source) for _ in range(_length(source, 3, 14))]
    asked = source.choice(sentences).split()
    return _record(
        f"What does the {asked[1]} {asked[2]} do?", " ".join(asked), "closed_qa", context=" ".join(sentences)
    )


def _summary(source: random.Random) -> Record:
    sentences = [_sentence(source) for _ in range(2 + _length(source, 4, 20))]
    nouns = sorted({sentence.split()[2] for sentence in sentences})
    return _record(
        "Name what this passage is about.", f"It is about the {', the '.join(nouns)}.", "summarization",
        context=" ".join(sentences),
    )  # fmt: skip


def _list(source: random.Random) -> Record:
    trait = source.choice(_TRAITS)
    items = [f"a {trait} {noun}" for noun in source.sample(_NOUNS, 1 + _length(source, 4, 16))]
    return _record(f"List {len(items)} things that can be {trait}.", "; ".join(items) + ".", "brainstorming")
