"""Which rows repeat, and how many texts differ, among more rows than fit into memory. Knows keys, no texts."""

from __future__ import annotations

import tempfile
from collections.abc import Iterable, Iterator
from types import TracebackType
from typing import Self

import numpy as np
from numpy.typing import NDArray

IN_MEMORY_BYTES = 48 << 20
"""Keys beyond that go to a temporary file."""
AT_ONCE = 2_000_000
"""So many keys are compared at a time; of more, a share after the other, each read from the whole file."""
_BLOCK_KEYS = 1 << 16

Table = NDArray[np.int64]


class KeyLog:
    """Keys of `width` 64-bit words in the order of their rows.

    The words are hashes of Python, seeded anew in each process: nobody can make up rows that collide. By chance two
    texts have one hash once in 2^64 pairs: among 10^6 rows with the same completion, once in 4 * 10^7 files.
    """

    def __init__(self, width: int) -> None:
        self.width = width
        self._file = tempfile.SpooledTemporaryFile(max_size=IN_MEMORY_BYTES)  # noqa: SIM115  closed in __exit__
        self.rows = 0

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        self._file.close()

    def add(self, *words: Iterable[int]) -> None:
        """The keys of the next rows: their first words, their second words, ..."""
        columns = [np.fromiter(column, dtype=np.int64) for column in words]
        assert len(columns) == self.width
        self._file.write(np.column_stack(columns).tobytes())
        self.rows += len(columns[0])

    def repeats(self) -> NDArray[np.bool_]:
        """For each row whether an earlier one has the same key."""
        found = np.zeros(self.rows, dtype=np.bool_)
        for keys, rows in self._shares():
            # One number for all words sorts faster, and faster still where equal ones may change places: those that
            # have an equal one, mostly few, are put in the order of their rows afterwards.
            mixed = _mixed(keys)
            order = np.argsort(mixed)
            again = np.diff(mixed[order]) == 0
            suspects = np.sort(order[np.append(again, False) | np.append(False, again)])
            order = suspects[np.argsort(mixed[suspects], kind="stable")]
            ordered = keys[order]
            same = np.all(ordered[1:] == ordered[:-1], axis=1)
            found[rows[order[1:][same]]] = True
        return found

    def disputes(self, without: int) -> NDArray[np.bool_]:
        """For each row whether another has the same first word, and another second one. `without` is no first word."""
        assert self.width == 2
        found = np.zeros(self.rows, dtype=np.bool_)
        for keys, rows in self._shares():
            order = np.lexsort(keys.T[::-1])
            order = order[keys[order, 0] != without]
            if not len(order):
                continue
            ordered = keys[order]
            new = np.ones(len(ordered), dtype=np.bool_)
            new[1:] = ordered[1:, 0] != ordered[:-1, 0]
            starts = np.flatnonzero(new)
            ends = np.append(starts[1:], len(ordered))
            several = ordered[starts, 1] != ordered[ends - 1, 1]
            found[rows[order[np.repeat(several, ends - starts)]]] = True
        return found

    def distinct(self, word: int) -> int:
        """How many of the words at one place differ."""
        return sum(len(np.unique(keys[:, word])) for keys, _ in self._shares(word))

    def _shares(self, word: int = 0) -> Iterator[tuple[Table, Table]]:
        """Keys and their row numbers, parted by one of the words, so that equal keys are in one share."""
        parts = -(-self.rows // AT_ONCE) or 1
        for part in range(parts):
            keys, rows, start = [], [], 0
            for block in self._blocks():
                chosen = np.arange(len(block)) if parts == 1 else np.flatnonzero(block[:, word] % parts == part)
                keys.append(block[chosen])
                rows.append(chosen + start)
                start += len(block)
            if any(map(len, keys)):
                yield np.concatenate(keys), np.concatenate(rows)

    def _blocks(self) -> Iterator[Table]:
        self._file.seek(0)
        row_bytes = 8 * self.width
        while block := self._file.read(_BLOCK_KEYS * row_bytes):
            yield np.frombuffer(block, dtype=np.int64).reshape(-1, self.width)
        self._file.seek(0, 2)


def _mixed(keys: Table) -> NDArray[np.int64]:
    """A number for each key. Keys that share one, without being equal, come once in 2^64 pairs."""
    mixed = keys[:, 0].copy()
    with np.errstate(over="ignore"):  # modulo 2^64; an odd factor loses nothing
        for word in range(1, keys.shape[1]):
            mixed = mixed * np.int64(-7046029254386353131) + keys[:, word]
    return mixed
