"""Names of classes as a base reads them: which are one token, which begin alike, and names that would do. Pure."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass

Encode = Callable[[Sequence[str]], list[list[int]]]
"""Texts that follow a prompt to token ids."""

_WORD = re.compile(r"[^\W_]+")
_FEWEST_LETTERS = 3
"""A shorter beginning of a word says nothing to a reader."""


@dataclass(frozen=True, slots=True)
class ClassNames:
    """What is wrong with names of classes, and what they could be called."""

    several_tokens: tuple[str, ...]
    """Their first token alone is judged by the metrics, and the others cost time with each answer."""
    alike: tuple[str, ...]
    """Begin with the same token as another: by the first token they cannot be told apart."""
    spellings: dict[str, str]
    """For each of these a name that is one token, with which all classes differ in it."""


def judge_classes(names: Sequence[str], encode: Encode) -> ClassNames:
    """`names` as they stand in the rows, without a stop sequence: each once, and none empty."""
    ids = dict(zip(names, encode(names), strict=True))
    firsts = Counter(some[0] for some in ids.values() if some)
    several = tuple(name for name, some in ids.items() if len(some) != 1)
    alike = tuple(name for name, some in ids.items() if some and firsts[some[0]] > 1)
    wrong = {*several, *alike}
    taken = {some[0] for name, some in ids.items() if name not in wrong}
    spellings = {}
    for name in names:
        # One of those that begin alike may keep its name, if that is one token.
        if name in wrong and len(ids[name]) == 1 and ids[name][0] not in taken:
            taken.add(ids[name][0])
            wrong.remove(name)
    numbers = _Options(map(str, range(len(names))), encode) if wrong else None
    for name in names:
        if name in wrong:
            spelling = _Options(_likenesses(name.strip()), encode).take(taken)
            if spelling is None and numbers is not None:
                spelling = numbers.take(taken)
            if spelling is not None:
                spellings[name] = spelling
    return ClassNames(several, alike, spellings)


class _Options:
    """Names to choose from, the best first; an iterator over those that are one token."""

    def __init__(self, names: Iterable[str], encode: Encode) -> None:
        spelt = list(dict.fromkeys(f" {name}" for name in names))
        self._left = iter([(name, ids[0]) for name, ids in zip(spelt, encode(spelt), strict=True) if len(ids) == 1])

    def take(self, taken: set[int]) -> str | None:
        """The next name whose token is not in `taken`, where it is then."""
        for name, token in self._left:
            if token not in taken:
                taken.add(token)
                return name
        return None


def _likenesses(name: str) -> Iterator[str]:
    """Other names for a class that a reader knows it by, those that say most first."""
    words = _WORD.findall(name)
    for word in (name, *sorted(words, key=len, reverse=True)):
        yield from (word, word.lower(), word.capitalize(), word.upper())
    if len(words) > 1:
        yield "".join(word[0] for word in words).upper()
    for word in words:
        yield from (word[:size].lower() for size in range(len(word) - 1, _FEWEST_LETTERS - 1, -1))
