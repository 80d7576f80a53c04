"""One look at a file, or two: its facts, whatever has to be read otherwise on the way."""

from __future__ import annotations

from collections.abc import Callable, Iterator

from tunesmith.data.facts import Facts, FileFold, Lengths
from tunesmith.data.rows import Batch
from tunesmith.data.source import Changed, Source

REMEMBERED_BYTES = 272 << 20
"""As many rows of a file are kept for the second pass, which then need not read it; of a larger file none are."""
ROW_BYTES = 130
"""What two texts take in memory at most, besides the bytes of the file that they were read from."""

Progress = Callable[[int], None]
"""Told how many bytes of the file have been read."""


class Rows:
    """The rows of a source, which are read once where they fit into memory, and otherwise each time."""

    def __init__(self, source: Source) -> None:
        self.source = source
        self._kept: list[Batch] | None = None

    def batches(self) -> Iterator[Batch]:
        """All rows, from the beginning. Raises as `Source.batches`."""
        if self._kept is not None:
            self.source.check_unchanged()
            yield from self._kept
            return
        kept: list[Batch] | None = [] if self.source.size_bytes <= REMEMBERED_BYTES else None
        rows = 0
        for batch in self.source.batches():
            rows += len(batch)
            if batch.read_bytes + ROW_BYTES * rows > REMEMBERED_BYTES:
                kept = None
            if kept is not None:
                kept.append(batch)
            yield batch
        self._kept = kept


def analyse(source: Source, lengths: Lengths | None, progress: Progress) -> tuple[Rows, Facts]:
    """The rows of a file as they are really to be read, and its facts. Raises InvalidRequest as `Source.batches`."""
    while True:
        rows = Rows(source)
        try:
            return rows, _analyse(rows, lengths, progress)
        except Changed as changed:
            source = changed.source


def _analyse(rows: Rows, lengths: Lengths | None, progress: Progress) -> Facts:
    with FileFold(lengths) as fold:
        for batch in rows.batches():
            fold.add(batch)
            progress(batch.read_bytes)
        if fold.prompts.unsure or fold.completions.unsure:
            for batch in rows.batches():
                fold.prompts.look_inside(batch.prompts)
                fold.completions.look_inside([text for text in batch.completions if text])
                progress(batch.read_bytes)
        return fold.result()
