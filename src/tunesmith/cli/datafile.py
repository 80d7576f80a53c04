"""What the commands on local data files share: the base whose tokens count, where a large file is, findings as JSON."""

from __future__ import annotations

import gc
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, DownloadColumn, TextColumn, TimeRemainingColumn
from rich.progress import Progress as Bars

from tunesmith.cli.output import Output, UsageError
from tunesmith.core.bases import Base, Bases
from tunesmith.data.analysis import Progress
from tunesmith.data.facts import Lengths
from tunesmith.data.findings import Finding
from tunesmith.tokenizer import Tokenizer

LARGE_BYTES = 8 << 20
"""Smaller files are read before a bar could be drawn."""
COLLECT_EVERY = 100_000
"""New objects between two looks for garbage. Batches make many at once, and none in circles: with the usual 700 a
fifth of the time goes into looking."""
SHOWN_EVERY = 0.1
"""A log gets a line each time so much more of a large file is read."""


def base_and_folder(home: Path, name: str) -> tuple[Base, Path]:
    """A base by name, and its checkpoint. Raises UsageError naming those that there are."""
    try:
        bases = Bases(home)
        return bases.get(name), bases.folder(name)
    except KeyError as error:
        raise UsageError(
            f"{name} is no base model here. Bases are {', '.join(b.name for b in bases.list())}."
        ) from error
    except ValueError as error:
        raise UsageError(str(error)) from error


def lengths_of(base: Base, tokenizer: Tokenizer) -> Lengths:
    """How long rows are for a base."""

    def count(pairs: Sequence[tuple[str, str]]) -> list[int]:
        prompts = tokenizer.prompt_ids_many([prompt for prompt, _ in pairs])
        completions = tokenizer.encode_many([completion for _, completion in pairs])
        return [len(prompt) + len(completion) for prompt, completion in zip(prompts, completions, strict=True)]

    return Lengths(base.name, base.context_tokens, count)


def finding_record(finding: Finding) -> dict[str, Any]:
    """A finding as both commands show it to machines."""
    return {
        "id": finding.id,
        "severity": finding.severity.value,
        "explanation": finding.explanation,
        "rows": asdict(finding.rows),
        "fix": None if finding.fix is None else finding.fix.action,
    }


@contextmanager
def watching(output: Output, what: str, size_bytes: int) -> Iterator[Progress]:
    """Where a large file is: a bar on a terminal, lines in a log. Meanwhile garbage is looked for less often."""
    thresholds = gc.get_threshold()
    gc.set_threshold(COLLECT_EVERY)
    try:
        with _shown(output, what, size_bytes) as progress:
            yield progress
    finally:
        gc.set_threshold(*thresholds)


@contextmanager
def _shown(output: Output, what: str, size_bytes: int) -> Iterator[Progress]:
    if size_bytes < LARGE_BYTES or output.machine:
        yield lambda read_bytes: None
        return
    if not sys.stderr.isatty():
        yield _Log(what, size_bytes)
        return
    columns = TextColumn("{task.description}"), BarColumn(), DownloadColumn(), TimeRemainingColumn()
    with Bars(*columns, console=Console(stderr=True), transient=True) as bars:
        task = bars.add_task(what, total=size_bytes)
        yield lambda read_bytes: bars.update(task, completed=read_bytes)


class _Log:
    """A line on standard error for each tenth."""

    def __init__(self, what: str, size_bytes: int) -> None:
        self._what, self._size_bytes, self._shown = what, size_bytes, 0.0

    def __call__(self, read_bytes: int) -> None:
        share = read_bytes / self._size_bytes
        if share >= self._shown + SHOWN_EVERY:
            self._shown = share
            sys.stderr.write(f"{self._what}: {share:.0%} of {self._size_bytes:,} bytes\n")
