"""One look at a file, or two: its facts, whatever has to be read otherwise on the way."""

from __future__ import annotations

from collections.abc import Callable, Iterable

from tunesmith.data.facts import Facts, FileFold, Lengths
from tunesmith.data.rows import Batch
from tunesmith.data.source import Changed, Source

Progress = Callable[[int], None]
"""Told how many bytes of the file have been read."""


def analyse(source: Source, lengths: Lengths | None, progress: Progress) -> tuple[Source, Facts]:
    """The facts of a file, and the source as it is really to be read. Raises InvalidRequest as `Source.batches`."""
    while True:
        try:
            return source, _analyse(source, lengths, progress)
        except Changed as changed:
            source = changed.source


def summarise(batches: Iterable[Batch]) -> Facts:
    """What is told of rows as they are written: task, classes, prefixes and suffixes."""
    with FileFold(None, thorough=False) as fold:
        for batch in batches:
            fold.add(batch)
        return fold.result()


def _analyse(source: Source, lengths: Lengths | None, progress: Progress) -> Facts:
    with FileFold(lengths, thorough=True) as fold:
        for batch in source.batches():
            fold.add(batch)
            progress(batch.read_bytes)
        if fold.prompts.unsure or fold.completions.unsure:
            for batch in source.batches():
                fold.prompts.look_inside(batch.prompts)
                fold.completions.look_inside([text for text in batch.completions if text])
                progress(batch.read_bytes)
        return fold.result()
