"""Which rows are for validation: as many of each class as it has, and never a prompt on both sides. Knows no files."""

from __future__ import annotations

import itertools
import tempfile
import zlib
from collections.abc import Iterator, Sequence
from types import TracebackType
from typing import Self

import numpy as np
from numpy.typing import NDArray

from tunesmith.data.rows import Batch

MAX_VALIDATION_ROWS = 1_000
TRAINING_SHARE = 0.8
SAMPLE_SEED = 42
"""That of the published command."""
MAX_STRATA = 10_000
"""Classes beyond that many are not told apart."""

_SPARE = 8
"""So many times the rows that a class needs are looked at, since of a group of equal prompts all go or none."""
_BLOCK_ROWS = 1 << 16
_IN_MEMORY_BYTES = 16 << 20
_RECORD = np.dtype([("rank", "<u8"), ("stratum", "<i8")])


def training_rows(rows: int) -> int:
    """How many of `rows` train; the others, at most MAX_VALIDATION_ROWS, validate.

    >>> [training_rows(rows) for rows in (10, 4_999, 5_000, 10_000)]
    [8, 3999, 4000, 9000]
    """
    return max(rows - MAX_VALIDATION_ROWS, int(TRAINING_SHARE * rows))


def sampled_order(rows: int) -> NDArray[np.int64]:
    """Places of the training rows in the order in which the published command writes them.

    Source: `DataFrame.sample(n, random_state=42)` of pandas, as `write_out_file` of openai 0.28.1 calls it.
    """
    chance = np.random.RandomState(SAMPLE_SEED)
    return chance.choice(rows, size=training_rows(rows), replace=False).astype(np.int64)


class Strata:
    """Remembers of each row its class and a rank that equal prompts share; a context, for it keeps them on disk."""

    def __init__(self) -> None:
        self._file = tempfile.SpooledTemporaryFile(max_size=_IN_MEMORY_BYTES)  # noqa: SIM115  closed in __exit__
        self._strata: dict[str, int] = {}
        self._sizes = np.zeros(MAX_STRATA + 1, dtype=np.int64)
        self._rows = 0

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        self._file.close()

    def add(self, batch: Batch) -> None:
        """The next rows."""
        records = np.empty(len(batch), dtype=_RECORD)
        records["rank"] = _ranks(batch.prompts)
        records["stratum"] = self._numbers(batch.completions)
        self._sizes += np.bincount(records["stratum"], minlength=len(self._sizes))
        self._file.write(records.tobytes())
        self._rows += len(batch)

    def validation(self) -> Iterator[NDArray[np.bool_]]:
        """For each row whether it is for validation, a block of rows at a time.

        Every class gives its share of the rows, but keeps at least one; rows with equal prompts go together. The same
        rows give the same split.
        """
        chosen = np.fromiter(self._chosen(), dtype=np.uint64)
        for block in self._blocks():
            yield np.isin(block["rank"], chosen)

    def _numbers(self, completions: Sequence[str]) -> NDArray[np.int64]:
        strata = self._strata
        if len(strata) < MAX_STRATA:
            for completion in dict.fromkeys(completions):  # in their order: a set would differ from run to run
                if len(strata) < MAX_STRATA:
                    strata.setdefault(completion, len(strata))
        numbers = map(strata.get, completions, itertools.repeat(MAX_STRATA))
        return np.fromiter(numbers, dtype=np.int64, count=len(completions))

    def _chosen(self) -> Iterator[int]:
        """The ranks of the prompts that go to validation."""
        sizes = self._sizes
        quotas = _shares(sizes, self._rows - training_rows(self._rows))
        # Ranks are spread evenly, so a share of them is that share of the prompts: enough of each class.
        share = np.minimum(1.0, _SPARE * (quotas + 10) / np.maximum(sizes, 1))
        highest = (share * float(2**64 - 2**11)).astype(np.uint64)
        highest[share == 1.0] = np.iinfo(np.uint64).max
        candidates = [block[block["rank"] <= highest[block["stratum"]]] for block in self._blocks()]
        rows = np.concatenate(candidates) if candidates else np.empty(0, dtype=_RECORD)
        groups, counts = np.unique(rows, return_counts=True)  # by rank, then by class
        taken = np.zeros_like(quotas)
        seen_twice = set(groups["rank"][1:][groups["rank"][1:] == groups["rank"][:-1]].tolist())
        for group, count in zip(groups, counts.tolist(), strict=True):
            rank, stratum = int(group["rank"]), int(group["stratum"])
            # A prompt with several completions trains: as a measure of the model it is worth little.
            if rank not in seen_twice and taken[stratum] + count <= quotas[stratum]:
                taken[stratum] += count
                yield rank

    def _blocks(self) -> Iterator[NDArray[np.void]]:
        self._file.seek(0)
        while block := self._file.read(_BLOCK_ROWS * _RECORD.itemsize):
            yield np.frombuffer(block, dtype=_RECORD)
        self._file.seek(0, 2)


def _shares(sizes: NDArray[np.int64], wanted: int) -> NDArray[np.int64]:
    """`wanted` shared out in proportion to sizes, the largest remainders rounded up; each keeps one at least."""
    exact = wanted * sizes / max(1, int(sizes.sum()))
    shares = np.floor(exact).astype(np.int64)
    order = np.argsort(shares - exact, kind="stable")[: wanted - int(shares.sum())]
    shares[order] += 1
    return np.minimum(shares, np.maximum(sizes - 1, 0))


def _ranks(prompts: Sequence[str]) -> NDArray[np.uint64]:
    """A number for each prompt, spread evenly over 64 bits, the same in every process.

    Checksums of different prompts agree now and then; such prompts stay together, which does no harm.
    """
    checks = np.fromiter(map(zlib.crc32, map(str.encode, prompts)), dtype=np.uint64, count=len(prompts))
    with np.errstate(over="ignore"):  # the finisher of SplitMix64 (Steele et al. 2014) works modulo 2^64
        checks += np.uint64(0x9E3779B97F4A7C15)
        checks = (checks ^ (checks >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
        checks = (checks ^ (checks >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
        return checks ^ (checks >> np.uint64(31))
