"""Which validation rows the training rows hold already: the same, the same but for spelling, and nearly the same.

Nearly the same are texts that share most of their runs of three words. All pairs above the threshold are found (but for
MOST_COMPARED), not only most as with MinHash: a training row is dropped at once if too few of its runs are known from
validation, and the others are compared with the rows that hold their rarest runs (prefix filter; Bayardo, Ma, Srikant
2007). Knows no files. Memory: about 60 bytes a validation row, and 150 MB for their runs at most.
"""

from __future__ import annotations

import math
import re
import unicodedata
from array import array
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from fractions import Fraction

import numpy as np
from numpy.typing import NDArray

from tunesmith.data.rows import SHOWN_ROWS, Batch, RowList

NEAR = Fraction(3, 4)
"""So large a share of the runs of two rows together is in both (Jaccard index).

Two texts of thirty words that differ in one are nearer than that.
"""
FEWEST_RUNS = 10
"""Shorter texts are compared whole only: among them a word makes another text."""
MOST_RUNS = 4_000_000
"""Validation rows beyond that many runs in all are compared whole only."""
MOST_COMPARED = 200
"""A training row is compared with no more validation rows than that, those with its rarest runs first."""

_WIDE = "\u3040-\u30ff\u3400-\u9fff"
"""Scripts without spaces: each character is a word."""
_WORD = re.compile(f"[{_WIDE}]|[^\\W{_WIDE}]+")

Counts = NDArray[np.int64]
Hashes = NDArray[np.uint64]


@dataclass(frozen=True, slots=True)
class Overlap:
    """Validation rows that stand in the training rows too. Each is named once, where it fits first."""

    exact: RowList
    spelling: RowList
    """The same but for case, punctuation, white space and compatible characters."""
    near: RowList
    unlooked: int
    """Validation rows that were compared whole only, for want of room."""
    masks: Mapping[str, NDArray[np.bool_]] = field(default_factory=dict, repr=False, compare=False)
    """Of each kind, by the id of its finding: for each validation row whether it is one."""


class ValidationRows:
    """Takes the validation rows with `add`, then the training rows with `meet`."""

    def __init__(self, separator: str | None = None) -> None:
        """`separator`, which ends prompts, is no part of what is compared."""
        self._separator = separator or ""
        self._exact, self._spelling = array("q"), array("q")
        self._runs: list[Hashes] = []
        self._sizes: list[Counts] = []
        self._held = self._unlooked = 0
        self._index: _Index | None = None

    def add(self, batch: Batch) -> None:
        """The next validation rows."""
        assert self._index is None  # the index is built when the first training rows come
        exact, spelling, words = self._keys(batch)
        self._exact.extend(exact)
        self._spelling.extend(spelling)
        if self._held < MOST_RUNS:
            rows, runs = _runs(words)
            self._runs.append(runs)
            self._sizes.append(np.bincount(rows, minlength=len(batch)))
            self._held += len(runs)
        else:
            self._unlooked += len(batch)

    def meet(self, batch: Batch) -> None:
        """The next training rows."""
        if self._index is None:
            self._index = _Index(self._exact, self._spelling, self._runs, self._sizes)
            self._runs, self._sizes = [], []
        exact, spelling, words = self._keys(batch)
        self._index.meet(exact, spelling, words)

    def result(self) -> Overlap:
        """What has been met so far."""
        if self._index is None:
            return Overlap(RowList(), RowList(), RowList(), self._unlooked)
        exact = self._index.exact.met
        spelling = self._index.spelling.met & ~exact
        near = np.zeros_like(exact)
        near[: len(self._index.near)] = self._index.near
        near = near & ~spelling & ~exact
        masks = {"overlap_exact": exact, "overlap_spelling": spelling, "overlap_near": near}
        return Overlap(_listed(exact), _listed(spelling), _listed(near), self._unlooked, masks)

    def _keys(self, batch: Batch) -> tuple[list[int], list[int], list[list[str]]]:
        """Of each row the key of its prompt, the key of the prompt's words, and the words of the row.

        Where there is no prompt, the completion stands in for it: texts without prompts overlap too.
        """
        asked = [prompt.removesuffix(self._separator) for prompt in batch.prompts]
        rows = list(zip(asked, batch.completions, strict=True))
        prompts = [prompt or completion for prompt, completion in rows]
        prompt_words = [normal_words(text) for text in prompts]
        spelling = [hash(tuple(words) or text) for words, text in zip(prompt_words, prompts, strict=True)]
        words = [
            known + normal_words(completion) if prompt else known
            for known, (prompt, completion) in zip(prompt_words, rows, strict=True)
        ]
        return list(map(hash, prompts)), spelling, words


def normal_words(text: str) -> list[str]:
    """The words of a text in their plainest spelling.

    >>> normal_words("Don\u2019t  PANIC!")
    ['don', 't', 'panic']
    """
    plain = text if text.isascii() else unicodedata.normalize("NFKC", text)
    return _WORD.findall(plain.casefold())


class _Keys:
    """Keys of rows, and which of the rows have been met."""

    def __init__(self, keys: Iterable[int]) -> None:
        self._known, self._row_keys = np.unique(np.array(keys, dtype=np.int64), return_inverse=True)
        self._met = np.zeros(len(self._known), dtype=np.bool_)

    def meet(self, keys: Sequence[int]) -> None:
        wanted = np.array(keys, dtype=np.int64)
        places = np.searchsorted(self._known, wanted)
        inside = places < len(self._known)
        places, wanted = places[inside], wanted[inside]
        self._met[places[self._known[places] == wanted]] = True

    @property
    def met(self) -> NDArray[np.bool_]:
        """For each row."""
        return self._met[self._row_keys]


class _Index:
    """Validation rows by key, and by run."""

    def __init__(
        self, exact: Iterable[int], spelling: Iterable[int], runs: Sequence[Hashes], sizes: Sequence[Counts]
    ) -> None:
        """`runs` of all rows one after the other, `sizes` how many each row has; both in any number of pieces."""
        self.exact, self.spelling = _Keys(exact), _Keys(spelling)
        self._sizes = np.concatenate(sizes) if sizes else np.empty(0, dtype=np.int64)
        self._starts = np.concatenate([[0], np.cumsum(self._sizes)])
        every = np.concatenate(runs) if runs else np.empty(0, dtype=np.uint64)
        self._known, ids, self._counts = np.unique(every, return_inverse=True, return_counts=True)
        self._ids = ids.astype(np.int32)
        order = np.argsort(self._ids, kind="stable")
        self._holders = np.repeat(np.arange(len(self._sizes), dtype=np.int32), self._sizes)[order]
        self._firsts = np.concatenate([[0], np.cumsum(self._counts)])
        self.near = np.zeros(len(self._sizes), dtype=np.bool_)

    def meet(self, exact: Sequence[int], spelling: Sequence[int], words: Sequence[list[str]]) -> None:
        self.exact.meet(exact)
        self.spelling.meet(spelling)
        if not len(self._known):
            return
        rows, runs = _runs(words)
        sizes = np.bincount(rows, minlength=len(words))
        places = np.minimum(np.searchsorted(self._known, runs), len(self._known) - 1)
        known = self._known[places] == runs
        hits = np.bincount(rows[known], minlength=len(words))
        starts = np.concatenate([[0], np.cumsum(sizes)])
        # Of rows as near as that, at least this share of the runs of each is in the other.
        for row in np.flatnonzero(
            (sizes >= FEWEST_RUNS) & (hits * NEAR.denominator >= sizes * NEAR.numerator)
        ).tolist():
            part = slice(starts[row], starts[row + 1])
            self._compare(places[part][known[part]], int(sizes[row]))

    def _compare(self, ids: NDArray[np.int64], size: int) -> None:
        """One training row of `size` runs, of which `ids` are known."""
        rarest = ids[np.argsort(self._counts[ids], kind="stable")]
        # Unknown runs are the rarest of all; among the rarest runs of a row a near one holds at least one.
        prefix = size - math.ceil(NEAR * size) + 1 - (size - len(ids))
        holders = [self._holders[self._firsts[run] : self._firsts[run + 1]] for run in rarest[:prefix].tolist()]
        compared = 0
        for row in dict.fromkeys(np.concatenate([some[:MOST_COMPARED] for some in holders]).tolist()):
            if self.near[row] or self._sizes[row] < FEWEST_RUNS:
                continue
            shared = int(np.isin(self._ids[self._starts[row] : self._starts[row + 1]], ids).sum())
            self.near[row] = shared >= NEAR * (size + int(self._sizes[row]) - shared)
            compared += 1
            if compared == MOST_COMPARED:
                break


def _runs(words: Sequence[list[str]]) -> tuple[NDArray[np.int64], Hashes]:
    """Rows and their runs of three words as hashes, each once a row, in the order of the rows."""
    counts = np.fromiter(map(len, words), dtype=np.int64, count=len(words))
    hashes = np.fromiter((hash(word) for some in words for word in some), dtype=np.int64, count=int(counts.sum()))
    rows = np.repeat(np.arange(len(words)), counts)
    if len(rows) < 3:
        return np.empty(0, dtype=np.int64), np.empty(0, dtype=np.uint64)
    one, two, three = (hashes[start : len(hashes) - 2 + start].view(np.uint64) for start in range(3))
    with np.errstate(over="ignore"):  # modulo 2^64; odd factors lose nothing
        runs = (one * np.uint64(0x9E3779B97F4A7C15) + two) * np.uint64(0xBF58476D1CE4E5B9) + three
        runs = (runs ^ (runs >> np.uint64(31))) * np.uint64(0x94D049BB133111EB)
    whole = rows[:-2] == rows[2:]
    rows, runs = rows[:-2][whole], runs[whole]
    order = np.lexsort((runs, rows))
    rows, runs = rows[order], runs[order]
    first = np.ones(len(rows), dtype=np.bool_)
    first[1:] = (rows[1:] != rows[:-1]) | (runs[1:] != runs[:-1])
    return rows[first], runs[first]


def _listed(met: NDArray[np.bool_]) -> RowList:
    places = np.flatnonzero(met)
    return RowList(len(places), tuple((places[:SHOWN_ROWS] + 1).tolist()))
